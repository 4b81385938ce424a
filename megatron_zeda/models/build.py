"""From a Hugging Face configuration to Megatron-Core objects."""

from __future__ import annotations

import dataclasses
import difflib
import sys
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from megatron_zeda import platform
from megatron_zeda.errors import InputError
from megatron_zeda.models.hf_config import where_of
from megatron_zeda.models.parallel_sizes import not_divided, uneven_key_value_heads
from megatron_zeda.models.registry import family_for


def build_transformer_config(hf_config: dict[str, Any], *, where: str | Path | None = None, **overrides: Any) -> Any:
    """Build the family's ``ZeroExpertTransformerConfig``.

    What the checkpoint says is overridden by what the machine forces, and that by ``overrides``.

    Args:
        hf_config: the content of ``config.json``.
        where: the path to name in errors.
        overrides: any ``TransformerConfig`` field.

    Raises:
        InputError: for a configuration that is not supported, an unknown field, or a combination Megatron-Core refuses.
    """
    where = where_of(hf_config) if where is None else where
    unknown = unknown_fields(hf_config, overrides)
    if unknown:
        raise InputError("; ".join(unknown.values()), where=where)
    config_class, values = _class_and_values(hf_config, overrides)
    problems = parallel_problems(hf_config, **{name: values[name] for name in _PARALLEL_SIZES if name in values})
    if problems:
        raise InputError("; ".join(problems), where=where)
    try:
        return config_class(**values)
    except (ValueError, AssertionError) as error:
        raise InputError(f"Megatron-Core refuses this configuration: {error}", where=where) from error


def unknown_fields(hf_config: dict[str, Any] | None, names: Iterable[str]) -> dict[str, str]:
    """Which of these names are no field of the family's (None: of any) configuration, and what to say about each."""
    platform.install()
    config_class, _ = _class_and_values(hf_config, {})
    known = [field.name for field in dataclasses.fields(config_class) if field.init]
    messages = {}
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean `{close[0]}`?" if close else ""
            messages[name] = f"`{name}` is not a field of {config_class.__name__}{hint}"
    return messages


def draft_transformer_config(hf_config: dict[str, Any] | None, **overrides: Any) -> SimpleNamespace:
    """All fields of the configuration that :func:`build_transformer_config` would build, judged by nobody yet.

    For rules that shall be reported together: Megatron-Core's own stop at the first. What it derives from other fields
    is not there.

    Args:
        hf_config: the content of ``config.json``; None drafts some model with zero experts, whose shape is in nobody's
            way.
        overrides: any ``TransformerConfig`` field.
    """
    platform.install()
    config_class, values = _class_and_values(hf_config, overrides)
    defaults = {
        field.name: field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        for field in dataclasses.fields(config_class)
    }
    return SimpleNamespace(**defaults | values)


def _class_and_values(hf_config: dict[str, Any] | None, overrides: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The family's configuration class, and what it is called with."""
    if hf_config is None:
        from megatron_zeda.zero_experts import ZeroExpertMLATransformerConfig

        config_class: Any = ZeroExpertMLATransformerConfig  # the one with all fields
        shape: dict[str, Any] = {"num_moe_experts": sys.maxsize, "num_zero_experts": 1}
    else:
        family = family_for(hf_config)
        config_class, shape = family.transformer_config_class(), family.transformer_config_kwargs(hf_config)
    return config_class, {**shape, **platform.transformer_config_overrides(), **overrides}


_PARALLEL_SIZES = (
    "tensor_model_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
)


def parallel_problems(
    hf_config: dict[str, Any],
    *,
    tensor_model_parallel_size: int = 1,
    expert_model_parallel_size: int = 1,
    expert_tensor_parallel_size: int | None = None,
) -> list[str]:
    """One line for every parallel size that is not one, and for every size of the model that one does not fit."""
    sizes = {
        "tensor_model_parallel_size": tensor_model_parallel_size,
        "expert_model_parallel_size": expert_model_parallel_size,
    }
    if expert_tensor_parallel_size is not None:
        sizes["expert_tensor_parallel_size"] = expert_tensor_parallel_size
    wrong = [
        f"{name} {size!r} is not a positive integer"
        for name, size in sizes.items()
        if type(size) is not int or size < 1
    ]
    if wrong:
        return wrong
    sizes.setdefault("expert_tensor_parallel_size", tensor_model_parallel_size)
    family = family_for(hf_config)
    shape = {**family.transformer_config_kwargs(hf_config), **family.gpt_model_kwargs(hf_config)}
    misfits = [*not_divided(shape, sizes), *uneven_key_value_heads(shape, tensor_model_parallel_size)]
    return [f"{misfit.name} {misfit.text}" for misfit in misfits]


def build_gpt_model(
    hf_config: dict[str, Any],
    transformer_config: Any,
    *,
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
    pg_collection: Any = None,
) -> Any:
    """Build Megatron-Core's ``GPTModel`` with our layer spec (the stock layers when Z is 0).

    The vocabulary is not padded; a tensor-parallel size that does not divide it is refused by
    :func:`build_transformer_config`.
    """
    platform.install()
    from megatron.core.models.gpt import GPTModel

    from megatron_zeda.zero_experts import get_zero_expert_block_spec, get_zero_expert_layer_spec

    if transformer_config.moe_layer_freq == 1:
        spec = get_zero_expert_layer_spec(transformer_config)
    else:
        stage = None if pg_collection is None else pg_collection.pp.rank()
        spec = get_zero_expert_block_spec(transformer_config, vp_stage=vp_stage, pp_rank=stage)
    return GPTModel(
        config=transformer_config,
        transformer_layer_spec=spec,
        pre_process=pre_process,
        post_process=post_process,
        vp_stage=vp_stage,
        pg_collection=pg_collection,
        **family_for(hf_config).gpt_model_kwargs(hf_config),
    )
