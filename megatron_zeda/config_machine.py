"""What a configuration asks of the machine: settings that need hardware or libraries that are not there.

A login node has neither GPU nor Transformer Engine, and yet configurations are checked on it: what is missing is a note
of ``zeda check`` and an error of ``zeda train``.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_zeda import platform
from megatron_zeda.config import Config
from megatron_zeda.config_io import ConfigErrors
from megatron_zeda.config_megatron import transformer_config
from megatron_zeda.errors import InputError

# The library behind each of the flex dispatcher's backends: whether Megatron-Core could import it (a name in its
# transformer.moe.fused_a2a), and what it is called.
_DISPATCH_LIBRARIES = {
    "deepep": ("HAVE_DEEP_EP", "DeepEP"),
    "hybridep": ("HAVE_HYBRIDEP", "DeepEP's HybridEP"),
    "ncclep": ("HAVE_TE_EP", "Transformer Engine's NCCL-EP"),
}

# Transformer Engine's function that says whether this GPU has what a recipe needs.
_RECIPE_CHECKS = {
    "tensorwise": "is_fp8_available",
    "blockwise": "is_fp8_block_scaling_available",
    "mxfp8": "is_mxfp8_available",
}

# Recomputed in a way that asks Transformer Engine for the state of FP8, used or not.
_RECOMPUTED_BY_TRANSFORMER_ENGINE = frozenset({"layernorm", "mla_up_proj", "moe_act"})

# Fields of TransformerConfig for which Megatron-Core itself asks for a version of Transformer Engine, or for FP8.
_NEED_TRANSFORMER_ENGINE = frozenset(
    {
        "fp8_output_proj",
        "moe_single_grouped_bias",
        "moe_single_grouped_weight",
        "overlap_dispatch_backward_with_experts_wgrad",
        "symmetric_ar_type",
    }
)


def check_with_megatron(config: Config, hf_config: dict[str, Any]) -> None:
    """Let Megatron-Core judge the model's settings, without those that need what this machine lacks.

    Raises:
        ConfigErrors: with Megatron-Core's own words.
    """
    try:
        transformer_config(_portable(config), hf_config, where=Path("model"))
    except InputError as error:
        raise ConfigErrors(str(error).splitlines()) from error


def _portable(config: Config) -> Config:
    """The configuration without what this machine lacks, and without what is right only together with that."""
    model = config.model
    forced = platform.transformer_config_overrides()
    own: dict[str, Any] = {name: value for name, value in forced.items() if hasattr(model, name)}
    left_out = set(forced)
    if not platform.have_transformer_engine():
        own |= {"fp8": None, "fp8_recipe": None}
        if model.recompute_modules is not None and model.overrides.get("moe_grouped_gemm", True):
            own["recompute_modules"] = [name for name in model.recompute_modules if name != "moe_act"]
        left_out |= _NEED_TRANSFORMER_ENGINE
    overrides = {name: value for name, value in model.overrides.items() if name not in left_out}
    return replace(config, model=replace(model, overrides=overrides, **own))


def unavailable_here(config: Config) -> list[str]:
    """Settings that need hardware or libraries that this machine does not have, one line each."""
    model, optimizer = config.model, config.optimizer
    lines = []
    for name, value in platform.transformer_config_overrides().items():
        for key, wanted in (
            (f"model.{name}", getattr(model, name, value)),
            (f"model.overrides.{name}", model.overrides.get(name, value)),
        ):
            turned_off = wanted is False and name.endswith("_fusion")
            if wanted not in (None, value) and not turned_off:
                lines.append(f"{key}: {json.dumps(wanted)} needs Transformer Engine and a GPU")
    if model.fp8 is not None and not platform.have_transformer_engine():
        lines.append(f"model.fp8: {json.dumps(model.fp8)} needs Transformer Engine and a GPU")
    if config.teacher.fp8 not in ("model", "none") and not platform.have_transformer_engine():
        lines.append(f"teacher.fp8: {json.dumps(config.teacher.fp8)} needs Transformer Engine and a GPU")
    for name in sorted(_NEED_TRANSFORMER_ENGINE.intersection(model.overrides)):
        if model.overrides[name] and not platform.have_transformer_engine():
            value = json.dumps(model.overrides[name])
            lines.append(f"model.overrides.{name}: {value} needs Transformer Engine and a GPU")
    wanting = _RECOMPUTED_BY_TRANSFORMER_ENGINE.intersection(model.recompute_modules or [])
    if wanting and not platform.have_transformer_engine():
        lines.append(f"model.recompute_modules: {', '.join(sorted(wanting))} needs Transformer Engine and a GPU")
    # With states in host memory Megatron-Core falls back to torch's AdamW.
    on_device = optimizer.use_precision_aware_optimizer and not optimizer.optimizer_cpu_offload
    if on_device and not platform.have_transformer_engine():
        lines.append("optimizer.use_precision_aware_optimizer: true needs Transformer Engine and a GPU")
    lines = [f"{line}, which this machine does not have" for line in lines]
    return [*lines, *_no_dispatcher(config), *_no_fp8(config), *_no_attention(config)]


def _no_dispatcher(config: Config) -> list[str]:
    if config.model.moe_token_dispatcher_type != "flex":
        return []
    backend = config.model.overrides.get("moe_flex_dispatcher_backend", "deepep")
    flag, library = _DISPATCH_LIBRARIES.get(backend, ("", str(backend)))
    if platform.device().type == "cuda":
        from megatron.core.transformer.moe import fused_a2a

        if getattr(fused_a2a, flag, False):
            return []
    return [
        f'model.moe_token_dispatcher_type: "flex" with backend {backend} needs {library} and a GPU, which this machine '
        "does not have; alltoall needs neither"
    ]


def _no_fp8(config: Config) -> list[str]:
    """Why this GPU cannot compute with a recipe, in Transformer Engine's words."""
    recipes: dict[str, str] = {"model.fp8_recipe": config.model.fp8_recipe or "tensorwise"} if config.model.fp8 else {}
    teacher_fp8, teacher_recipe = config.teacher_fp8
    if teacher_fp8 is not None and teacher_recipe not in recipes.values():
        recipes["teacher.fp8_recipe"] = teacher_recipe or "tensorwise"
    if not recipes or not platform.have_transformer_engine():
        return []
    import torch  # noqa: F401  # before Transformer Engine, whose libraries need it
    from transformer_engine import pytorch as te

    lines = []
    for key, recipe in recipes.items():
        available = getattr(te, _RECIPE_CHECKS.get(recipe, ""), None)
        if available is None:
            lines.append(f"{key}: {recipe} is not in this Transformer Engine")
            continue
        supported, reason = available(return_reason=True)
        lines += [] if supported else [f"{key}: {recipe} cannot be used on this GPU: {reason}"]
    return lines


def _no_attention(config: Config) -> list[str]:
    """Transformer Engine's attention over several ranks has no fp32 kernel; the one used without it has."""
    model = config.model
    local = model.overrides.get("transformer_impl") == "local" or not platform.have_transformer_engine()
    if model.bf16 or model.context_parallel_size == 1 or local:
        return []
    return [
        f"model.bf16: false with context_parallel_size {model.context_parallel_size}: Transformer Engine's attention "
        "shares sequences in bf16 only"
    ]
