"""The rules of :mod:`.config_rules` about the model: its shape, and ``model.overrides``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

from megatron_zeda.config import Config
from megatron_zeda.config_megatron import unknown_overrides, zero_expert_refusals
from megatron_zeda.config_pipeline_rules import layer_problems
from megatron_zeda.config_refusals import (
    KERNELS,
    MODEL_DEFAULTS,
    OVERRIDABLE,
    OVERRIDE_OWNERS,
    OVERRIDE_REFUSALS,
    SET_BY_SOME_FAMILY,
    Problem,
)
from megatron_zeda.config_server_rules import server_model_problems
from megatron_zeda.errors import InputError


def override_problems(config: Config) -> Iterator[Problem]:
    """Overrides that are not the user's to set."""
    own = {f.name for f in fields(config.model)}
    for name, value in config.model.overrides.items():
        key = f"model.overrides.{name}"
        if name in own:
            yield Problem("override_own", (key,), "has a setting of its own", f"set model.{name}")
        elif name in OVERRIDE_OWNERS:
            owner = OVERRIDE_OWNERS[name]
            yield Problem(
                "override_owned",
                (key,),
                "is decided by " + (owner or "the trainer"),
                f"set {owner}" if owner else "remove it",
            )
        elif name in OVERRIDE_REFUSALS and value is not None and value is not False:
            yield Problem("override_refused", (key,), OVERRIDE_REFUSALS[name], "remove it")


def model_override_problems(config: Config, shape: Mapping[str, Any]) -> Iterator[Problem]:
    """Overrides of what the checkpoint decides: its teacher would get them too, its export would not."""
    own = {f.name for f in fields(config.model)}
    for name in config.model.overrides:
        decided = name in shape or name in MODEL_DEFAULTS
        if decided and name not in own and name not in OVERRIDE_OWNERS and name not in OVERRIDABLE:
            reason, fix = "the checkpoint decides it, and the export would not have it", "remove it"
            if name in KERNELS:
                reason = KERNELS[name]
            elif name in MODEL_DEFAULTS - SET_BY_SOME_FAMILY:
                reason = "no family of this version has it, and the export would not"
            else:
                fix = "remove it, or edit the checkpoint's config.json before converting"
            yield Problem("override_decided", (f"model.overrides.{name}",), reason, fix)


def context_problems(config: Config) -> Iterator[Problem]:
    """Ways to exchange keys and values that the trainer does not serve."""
    served = ("p2p", "all_gather", "a2a")
    unserved = [kind for kind in _context_exchanges(config) if kind not in served]
    if unserved:
        yield Problem(
            "cp_comm_type",
            ("model.overrides.cp_comm_type", "model.context_parallel_size"),
            f"{unserved[0]!r} is not served: the trainer creates one group for context parallelism",
            f"use {', '.join(served[:-1])} or {served[-1]}",
        )


def _context_exchanges(config: Config) -> list[Any]:
    """How the layers' attentions exchange keys and values, where they do and the configuration says how."""
    kinds = config.model.overrides.get("cp_comm_type")
    if kinds is None or config.model.context_parallel_size == 1:
        return []
    return list(kinds) if isinstance(kinds, list) else [kinds]


def shape_problems(config: Config, hf_config: dict[str, Any]) -> Iterator[Problem]:
    """What depends on the model's ``config.json``."""
    from megatron_zeda.models import STATIC_METHODS, family_for, with_method
    from megatron_zeda.models.parallel_sizes import not_divided, uneven_key_value_heads

    model = config.model
    try:
        family = family_for(hf_config, where=str(config.hf_dir))
        num_zero = family.num_zero_experts(hf_config)
    except InputError as error:
        yield Problem("family", ("model.hf",), str(error))
        return
    zero = config.zero_experts
    if num_zero or zero.method in STATIC_METHODS:
        try:
            hf_config = with_method(hf_config, zero.method, target_skip_rate=zero.target_skip_rate)
        except InputError as error:
            yield Problem("method", ("zero_experts.method", "model.hf"), str(error), "start from another model")
            return
    try:
        shape = {**family.transformer_config_kwargs(hf_config), **family.gpt_model_kwargs(hf_config)}
    except InputError as error:
        yield Problem("family", ("model.hf",), str(error))
        return
    tp = model.tensor_model_parallel_size
    for misfit in not_divided(shape, vars(model)):
        yield Problem("divisors", (f"model.{misfit.name}",), misfit.text, "use a divisor of that number")
    yield from layer_problems(config, shape["num_layers"])
    for misfit in uneven_key_value_heads(shape, tp):
        yield Problem("kv_heads", (f"model.{misfit.name}",), misfit.text, "use one that is")
    groups = shape.get("num_query_groups", shape["num_attention_heads"])  # latent attention has a key for each head
    context = model.context_parallel_size
    heads, groups = shape["num_attention_heads"] // tp, max(1, groups // tp)
    if "a2a" in _context_exchanges(config) and (heads % context or groups % context):
        yield Problem(
            "cp_a2a",
            ("model.overrides.cp_comm_type", "model.context_parallel_size", "model.tensor_model_parallel_size"),
            f"a2a deals heads out to {context} ranks, which do not divide {heads} and {groups} key-value heads",
            "use p2p or all_gather",
        )
    if model.fp8 is not None:
        yield from _fp8_shape(config, shape, "model", model.fp8_recipe)
    elif config.teacher_fp8[0] is not None and config.teacher.checkpoint is not None:
        yield from _fp8_shape(config, shape, "teacher", config.teacher_fp8[1])
    longest = shape["max_sequence_length"]
    if model.seq_length > longest:
        yield Problem(
            "positions",
            ("model.seq_length",),
            f"{model.seq_length} is above the model's {longest} positions",
            "lower it",
        )
    yield from _zero_expert_shape(config, shape["num_moe_experts"], num_zero)
    if num_zero:
        yield from server_model_problems(config, hf_config)
    yield from model_override_problems(config, shape)
    yield from joint_problems(config, hf_config, shape)


def _fp8_shape(config: Config, shape: Mapping[str, Any], section: str, recipe: str | None) -> Iterator[Problem]:
    """Widths that FP8 GEMMs do not take, of one rank's part; Transformer Engine would end the first step."""
    model = config.model
    multiple = 32 if recipe == "mxfp8" else 16
    for noun, width, name in [("hidden states", shape["hidden_size"], None), *_linear_widths(config, shape)]:
        parts = 1 if name is None else getattr(model, name)
        if width % parts == 0 and width // parts % multiple:
            yield Problem(
                "fp8_widths",
                (f"{section}.fp8", f"{section}.fp8_recipe", *([f"model.{name}"] if name else [])),
                f"{noun} are {width // parts} wide on a rank, and {recipe} takes multiples of {multiple}",
                f"lower {name}, or do without FP8" if parts > 1 else "do without FP8",
            )


def _linear_widths(config: Config, shape: Mapping[str, Any]) -> Iterator[tuple[str, int, str | None]]:
    """What the linear layers of a layer take or give besides hidden states.

    Yields:
        Its name, its width over all ranks, and the parallel size that splits it (None: every rank has all of it).
    """
    from megatron_zeda.models.parallel_sizes import has_dense_layers

    tensor, expert = "tensor_model_parallel_size", "expert_tensor_parallel_size"
    heads = shape["num_attention_heads"]
    if shape.get("kv_lora_rank") is None:
        # Every rank has at least one group.
        groups, channels = max(shape["num_query_groups"], config.model.tensor_model_parallel_size), shape["kv_channels"]
        yield "outputs of attention", heads * channels, tensor
        yield "queries, keys and values", (heads + 2 * groups) * channels, tensor
    else:
        nope, rope, value = (shape[name] for name in ("qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim"))
        if shape.get("q_lora_rank") is not None:
            yield "latent queries", shape["q_lora_rank"], None
        yield "queries", heads * (nope + rope), tensor
        yield "latent keys and values", shape["kv_lora_rank"], None
        yield "latent keys and values with the rotary part", shape["kv_lora_rank"] + rope, None
        yield "keys and values", heads * (nope + value), tensor
        yield "outputs of attention", heads * value, tensor
    yield "units of an expert", shape["moe_ffn_hidden_size"], expert
    if shape.get("moe_shared_expert_intermediate_size"):
        yield "units of the shared experts", shape["moe_shared_expert_intermediate_size"], tensor
    if has_dense_layers(shape):
        yield "units of a dense layer", shape["ffn_hidden_size"], tensor


def joint_problems(config: Config, hf_config: dict[str, Any] | None, shape: Mapping[str, Any]) -> Iterator[Problem]:
    """Overrides that nobody knows, and all that zero experts refuse; without ``hf_config`` what no model could take."""
    reported = {problem.keys[0] for problem in [*override_problems(config), *model_override_problems(config, shape)]}
    unknown = {f"model.overrides.{name}": text for name, text in unknown_overrides(config, hf_config).items()}
    for key, text in unknown.items():
        if key not in reported:
            yield Problem("override_unknown", (key,), text)
    if hf_config is None or shape["num_zero_experts"] or "dynamic_skipping_beta" in shape:
        wrong = {key.removeprefix("model.overrides.") for key in reported | unknown.keys()}
        for key, text in zero_expert_refusals(config, hf_config, without=wrong):
            yield Problem("zero_experts_refused", (key,), text)


def _zero_expert_shape(config: Config, num_experts: int, num_zero: int) -> Iterator[Problem]:
    from megatron_zeda.models import STATIC_METHODS

    asked = config.zero_experts.num_zero_experts
    if num_zero == 0 and config.zero_experts.method not in STATIC_METHODS:
        yield Problem(
            "dynamic_model",
            ("model.hf",),
            f"{config.hf_dir} is a static model without zero experts",
            "run checkpoint_tools/inject_zero_experts.py and convert its output",
        )
    elif num_zero and asked is not None and asked != num_zero:
        yield Problem(
            "num_zero_experts",
            ("zero_experts.num_zero_experts",),
            f"{asked}, but the model has {num_zero} for its {num_experts} real experts",
            f"use {num_zero} or null, or inject {asked} into the original model",
        )
