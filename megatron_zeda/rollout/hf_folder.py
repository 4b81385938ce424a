"""Opens Hugging Face folders, static and dynamic, for generation and scoring.

No pickle is read and no code from a folder is run unless the caller trusts it: a dynamic folder is loaded with the
modelling classes of the installed package, the same that the export put beside its weights.
"""

from __future__ import annotations

import hashlib
import importlib
from pathlib import Path
from typing import Any

import torch

from megatron_zeda.conversion.hf_folder import HfFolder
from megatron_zeda.conversion.safetensors_io import SafetensorsReader
from megatron_zeda.errors import InputError, ZedaError
from megatron_zeda.models import ExpertLayout, HfConfig, family_for, load_hf_config

DTYPES = ("auto", "float32", "bfloat16")


def read_config(folder: Path) -> HfConfig:
    """Return the folder's ``config.json`` after checking that its family is known and all its keys are right.

    Raises:
        InputError: no such folder or configuration, another family, or a wrong key.
    """
    config = load_hf_config(folder)
    family_for(config)
    return config


def weights_version(folder: Path) -> str:
    """Return a hash of the names and bytes of the folder's safetensors files, as ``sha256:<64 hex digits>``.

    Raises:
        InputError: missing or damaged files.
    """
    total = hashlib.sha256()
    with SafetensorsReader(folder) as reader:
        for path in sorted(reader.files):
            with path.open("rb") as file:
                total.update(path.name.encode() + b"\0" + hashlib.file_digest(file, "sha256").digest())
    return f"sha256:{total.hexdigest()}"


def resolve_dtype(name: str, config: HfConfig, device: torch.device) -> torch.dtype:
    """Return the dtype to compute in. ``auto``: the folder's own on a GPU, float32 on the CPU (bf16 is slow there)."""
    if name == "auto":
        if device.type == "cpu":
            return torch.float32
        name = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise InputError("unknown dtype", where="dtype", value=name, rule=" or ".join(DTYPES))
    return dtype


def load_model(
    folder: Path,
    *,
    device: torch.device,
    dtype: str = "auto",
    trust_remote_code: bool = False,
    num_experts_per_token: int | None = None,
) -> Any:
    """Return the model of a folder as a ``transformers`` causal language model in evaluation mode.

    Args:
        folder: the Hugging Face folder, static or dynamic.
        device: where it computes.
        dtype: one of :data:`DTYPES`, see :func:`resolve_dtype`.
        trust_remote_code: run the modelling code found in the folder instead of the installed one.
        num_experts_per_token: use another K than the configuration's (static models only).

    Raises:
        InputError: what :func:`read_config` and :func:`weight_files` refuse, code that was not asked for, weights
            that do not fit the configuration, a K that is not there.
    """
    with HfFolder(folder) as checked:
        config, carried = checked.config, _carried_names(checked)
    if num_experts_per_token is not None:
        _check_experts_per_token(config, num_experts_per_token)
    model_class, hf_config = _class_and_config(folder, config, trust_remote_code)
    if num_experts_per_token is not None:
        hf_config.num_experts_per_tok = num_experts_per_token
    arguments = {"trust_remote_code": True} if trust_remote_code else {}
    try:
        model, info = model_class.from_pretrained(
            folder,
            config=hf_config,
            dtype=resolve_dtype(dtype, config, device),
            use_safetensors=True,
            output_loading_info=True,
            **arguments,
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(f"the model cannot be loaded: {reason}", where=folder, fix="check the folder") from error
    unexpected = set(info["unexpected_keys"]) - carried
    unfilled = sorted(map(str, {*info["missing_keys"], *info["mismatched_keys"], *unexpected}))
    if unfilled:
        raise ZedaError(
            f"transformers did not use the weights as they are: {len(unfilled)} tensors",
            where=folder,
            value=unfilled[0],
            fix="use the versions of constraints.txt",
        )
    if not type(model).__module__.startswith("transformers_modules."):  # code from the folder stays as it is
        family_for(config).adapt_stock_model(model, config)
    return model.to(device).eval()


def _carried_names(folder: HfFolder) -> set[str]:
    """Tensors beside the model, by the names that transformers reports: it stacks the experts of those, too."""
    if not folder.carried:
        return set()
    layouts: tuple[ExpertLayout, ...] = ("per_expert", "fused")
    return {row.key for layout in layouts for row in folder.family.carried_rows(folder.config, layout)}


def _check_experts_per_token(config: HfConfig, topk: int) -> None:
    family = family_for(config)
    if family.num_zero_experts(config):
        raise InputError(
            "another number of experts per token was asked of a dynamic model",
            where=config.where,
            value=topk,
            rule="it is the control for static models",
            fix="set `zeda_zero_logit_bias` in config.json to change how much a dynamic model skips",
        )
    if not 1 <= topk <= family.num_experts(config):
        raise InputError(
            "impossible number of experts per token",
            where=config.where,
            value=topk,
            rule=f"1 to {family.num_experts(config)}, the number of experts",
        )


def _class_and_config(folder: Path, config: HfConfig, trust_remote_code: bool) -> tuple[Any, Any]:
    """Return what to call ``from_pretrained`` of, and the configuration to give it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    if trust_remote_code:
        return AutoModelForCausalLM, AutoConfig.from_pretrained(folder, trust_remote_code=True)
    family = family_for(config)
    dynamic = family.needs_modeling_code(config)
    if config.get("auto_map") and not dynamic:
        raise InputError(
            "the folder brings its own modelling code",
            where=config.where,
            value=config["auto_map"],
            rule="code from a folder is not run unless it is trusted",
            fix="read the code, then pass --trust-remote-code",
        )
    # The first model type is the one transformers knows; the others name the same model elsewhere.
    native = {**config, "model_type": family.model_types[0]}
    native.pop("auto_map", None)
    hf_config = AutoConfig.for_model(**native)
    if not dynamic:
        return AutoModelForCausalLM, hf_config
    module = importlib.import_module(f"megatron_zeda.serving.{Path(family.modeling_files[0]).stem}")
    return getattr(module, family.dynamic_architecture), hf_config
