"""From our settings to Megatron-Core's ``TransformerConfig``, and what the layout of a run asks of its batches."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import fields
from math import lcm
from pathlib import Path
from typing import Any

from megatron_zeda.config import Config, zero_expert_weight

# Tokens per rank that FP8 takes a multiple of: GEMMs 16, blocks of scales more (otherwise Transformer Engine gathers a
# sequence in bf16).
_FP8_ALIGNMENT = {"tensorwise": 16, "delayed": 16, "mxfp8": 32, "blockwise": 128}

# Megatron-Core's defaults exchange both messages between two stages in one batch. With two of them, the one to the next
# and the one to the previous stage go to the same process, which receives them in the other order: wrong, silently.
VIRTUAL_PIPELINE = {"overlap_p2p_comm": True, "batch_p2p_comm": False}

# The settings that deal layers out to pipeline stages unequally.
PIPELINE_SPLIT = (
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
    "num_layers_in_first_pipeline_stage",
    "num_layers_in_last_pipeline_stage",
    "pipeline_model_parallel_layout",
)


def transformer_settings(config: Config, hf_config: dict[str, Any] | None) -> dict[str, Any]:
    """The fields of ``TransformerConfig`` that a run sets, for its student or its teacher.

    Args:
        config: the configuration of the run.
        hf_config: ``config.json`` of the model that is built; None leaves out what depends on it.
    """
    import torch

    from megatron_zeda import platform

    model = config.model
    fused = platform.have_transformer_engine()
    dtype = torch.bfloat16 if model.bf16 else torch.float32
    values: dict[str, Any] = {
        "tensor_model_parallel_size": model.tensor_model_parallel_size,
        "pipeline_model_parallel_size": model.pipeline_model_parallel_size,
        "virtual_pipeline_model_parallel_size": model.virtual_pipeline_model_parallel_size,
        "context_parallel_size": model.context_parallel_size,
        "expert_model_parallel_size": model.expert_model_parallel_size,
        "expert_tensor_parallel_size": model.expert_tensor_parallel_size,
        "sequence_parallel": model.sequence_parallel,
        "moe_token_dispatcher_type": model.moe_token_dispatcher_type,
        "moe_permute_fusion": fused if model.moe_permute_fusion is None else model.moe_permute_fusion,
        "moe_grouped_gemm": fused,
        "moe_router_dtype": model.moe_router_dtype,
        "bf16": model.bf16,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "calculate_per_token_loss": True,
        "perform_initialization": False,  # every weight comes from a checkpoint
    }
    for name in ("granularity", "method", "num_layers", "modules"):
        value = getattr(model, f"recompute_{name}")
        if value is not None:
            values[f"recompute_{name}"] = value
    if model.virtual_pipeline_model_parallel_size is not None:
        values |= VIRTUAL_PIPELINE
    values |= pipeline_split(config)
    if model.fp8 is not None:
        values |= {"fp8": model.fp8, "fp8_recipe": model.fp8_recipe}
    if config.rollout.routing_replay:
        values["moe_enable_routing_replay"] = True
    if hf_config is not None:
        values |= _zero_expert_settings(config, hf_config)
    return values | model.overrides


def _zero_expert_settings(config: Config, hf_config: dict[str, Any]) -> dict[str, Any]:
    from megatron_zeda.models import family_for

    family = family_for(hf_config)
    num_zero = family.num_zero_experts(hf_config)
    if not num_zero:
        return {}
    values: dict[str, Any] = {
        "zero_expert_weight": zero_expert_weight(config, family.num_experts(hf_config), num_zero),
        "zero_expert_balance_coeff": config.zero_experts.balance_coeff,
    }
    if config.zero_experts.logit_bias is not None:
        values["zero_expert_logit_bias"] = config.zero_experts.logit_bias
    return values


def transformer_config(config: Config, hf_config: dict[str, Any], *, where: Path) -> Any:
    """Megatron-Core's configuration of the student or the teacher at the layout of the run.

    Args:
        config: the configuration of the run.
        hf_config: ``config.json`` of the model that is built.
        where: the path to name in errors.

    Raises:
        InputError: for what Megatron-Core or zero experts refuse.
    """
    from megatron_zeda.models import build_transformer_config

    return build_transformer_config(hf_config, where=where, **transformer_settings(config, hf_config))


def teacher_transformer_config(config: Config, hf_config: dict[str, Any], *, where: Path) -> Any:
    """As :func:`transformer_config` for the frozen teacher, which runs forward only and computes in its own precision.

    It is built for FP8 where the student is, too: the check before the first step compares the two in one precision.
    """
    from megatron_zeda.models import build_transformer_config

    settings = transformer_settings(config, hf_config)
    fp8, recipe = config.teacher_fp8
    if fp8 is not None:
        settings |= {"fp8": fp8, "fp8_recipe": recipe}
    if "fp8" in settings and config.teacher.placement == "host":
        settings["disable_parameter_transpose_cache"] = True  # FP8 copies of weights would stay on the device
    # The records of routing are numbered through the process: those of the teacher would shift the student's.
    settings["moe_enable_routing_replay"] = False
    return build_transformer_config(hf_config, where=where, **settings)


def setting_of(field: str) -> str:
    """The dotted key under which a configuration sets a field of ``TransformerConfig``."""
    return f"model.{field}" if field in {f.name for f in fields(Config().model)} else f"model.overrides.{field}"


def length_multiple(config: Config) -> int:
    """What the length of a micro-batch is a multiple of.

    Sequence and context parallelism split it; 8 keeps matrix kernels on their fast path. FP8 GEMMs need more of every
    rank's part.
    """
    model = config.model
    tensor, context = model.tensor_model_parallel_size, model.context_parallel_size
    recipes: list[str] = [model.fp8_recipe or "tensorwise"] if model.fp8 is not None else []
    teacher_fp8, teacher_recipe = config.teacher_fp8
    if teacher_fp8 is not None and config.teacher.checkpoint is not None:
        recipes.append(teacher_recipe or "tensorwise")
    if recipes:
        return max(_FP8_ALIGNMENT[recipe] for recipe in recipes) * tensor * context
    return lcm(8, tensor) * context


def micro_batch_multiple(config: Config) -> int:
    """What the number of micro-batches is a multiple of: Megatron-Core's interleaved schedule works in groups.

    It also takes a last group that is smaller, but not smaller than the pipeline; this project asks for whole groups.
    """
    model = config.model
    if model.virtual_pipeline_model_parallel_size is None:
        return 1
    group = model.overrides.get("microbatch_group_size_per_vp_stage")
    return group if isinstance(group, int) and group > 0 else model.pipeline_model_parallel_size


def pipeline_split(config: Config) -> dict[str, Any]:
    """The settings of :data:`PIPELINE_SPLIT` that are in use."""
    values = {name: getattr(config.model, name) for name in PIPELINE_SPLIT}
    return {name: value for name, value in values.items() if value is not None and value is not False}


def layers_per_stage(config: Config, num_layers: int) -> list[list[int]]:
    """How many layers every virtual stage of every pipeline stage has.

    Args:
        config: a configuration whose pipeline can be dealt these layers.
        num_layers: layers of the model.
    """
    model = config.model
    stages, parts = model.pipeline_model_parallel_size, model.virtual_pipeline_model_parallel_size or 1
    if model.pipeline_model_parallel_layout is not None:
        layout = pipeline_layout(model.pipeline_model_parallel_layout, stages)
        return [[[layer.name for layer in part].count("decoder") for part in stage] for stage in layout.layout]
    first, last = model.num_layers_in_first_pipeline_stage, model.num_layers_in_last_pipeline_stage
    if first is not None or last is not None:
        rest = num_layers - (first or 0) - (last or 0)
        middle = stages - (first is not None) - (last is not None)
        each = [rest // middle if middle else 0] * stages
        each[0] = each[0] if first is None else first
        each[-1] = each[-1] if last is None else last
        return [[count // parts] * parts for count in each]
    embedding, loss = model.account_for_embedding_in_pipeline_split, model.account_for_loss_in_pipeline_split
    equal = [[(num_layers + embedding + loss) // (stages * parts)] * parts for _ in range(stages)]
    equal[0][0] -= embedding
    equal[-1][-1] -= loss
    return equal


def pipeline_layout(text: str, stages: int) -> Any:
    """Megatron-Core's ``PipelineParallelLayerLayout``.

    Raises:
        ValueError: in its words, what is wrong with the text.
    """
    from megatron_zeda import platform

    platform.install()
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

    try:
        return PipelineParallelLayerLayout(text, stages)
    except AssertionError as error:
        raise ValueError(str(error)) from error


def unknown_overrides(config: Config, hf_config: dict[str, Any] | None) -> dict[str, str]:
    """The names in ``model.overrides`` that are no field of ``TransformerConfig``, and what to say about each.

    Args:
        config: the configuration of the run.
        hf_config: the model's ``config.json``; None: no family has such a field.
    """
    from megatron_zeda.models import unknown_fields

    return unknown_fields(hf_config, config.model.overrides)


def zero_expert_refusals(
    config: Config, hf_config: dict[str, Any] | None, *, without: Collection[str] = ()
) -> list[tuple[str, str]]:
    """Every reason why zero experts cannot be trained with these settings, ``(dotted key, message)`` each.

    Judged are the settings as they are given: what this machine lacks does not hide them, and neither does the first
    combination that Megatron-Core itself refuses.

    Args:
        config: the configuration of the run.
        hf_config: the model's ``config.json``; None takes some model with zero experts, so that what depends on the
            model is not judged.
        without: overrides that are left out, because something else is wrong with them.
    """
    from megatron_zeda.models import draft_transformer_config
    from megatron_zeda.zero_experts import unsupported_settings

    settings = transformer_settings(config, hf_config)
    sound = {name: value for name, value in settings.items() if name not in without}
    refusals = []
    for line in unsupported_settings(draft_transformer_config(hf_config, **sound)):
        setting, _, message = line.partition(": ")
        field = setting.split("=")[0].split()[0]
        refusals.append((setting_of(field), message if field == setting else f"{setting}: {message}"))
    return refusals
