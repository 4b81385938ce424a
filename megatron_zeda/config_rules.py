"""The rules a configuration must keep: what this version does not do, and what must fit together.

Every function yields the :class:`Problem` objects of some rules, which :data:`.config_refusals.RULES` lists for the
documentation; nothing stops at the first one. The world size and
the model's ``config.json`` are optional, and the rules that need them wait until they are known.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from math import prod
from typing import Any

from megatron_zeda.config import Config, smallest_world_size
from megatron_zeda.config_megatron import (
    VIRTUAL_PIPELINE,
    length_multiple,
    micro_batch_multiple,
    unknown_overrides,
    zero_expert_refusals,
)
from megatron_zeda.config_refusals import (
    MODEL_DEFAULTS,
    NOT_IN_THIS_VERSION,
    OVERRIDABLE,
    OVERRIDE_OWNERS,
    OVERRIDE_REFUSALS,
)
from megatron_zeda.errors import InputError


@dataclass(frozen=True)
class Problem:
    """One broken rule.

    Attributes:
        rule: its id in :data:`.config_refusals.RULES`.
        keys: the settings involved, the one to look at first.
        message: what is wrong, with the values, a clause without a full stop.
        fix: what to write instead.
    """

    rule: str
    keys: tuple[str, ...]
    message: str
    fix: str = ""

    def __str__(self) -> str:
        return f"{self.keys[0]}: {self.message}" + (f"; {self.fix}" if self.fix else "")


def get(config: Config, key: str) -> Any:
    """Return the value at a dotted key."""
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def find_problems(
    config: Config, *, world_size: int | None = None, hf_config: Mapping[str, Any] | None = None
) -> list[Problem]:
    """Return every broken rule.

    Args:
        config: a configuration whose single values have the right types.
        world_size: number of processes; None leaves out what depends on it.
        hf_config: the model's ``config.json``; None leaves out what depends on it.
    """
    problems = [
        *_refused(config),
        *_required(config),
        *_layout(config, world_size),
        *_batch(config, world_size),
        *_pipeline(config),
        *_context(config),
        *_recompute(config),
        *_precision(config),
        *_optimizer(config),
        *_schedule(config),
        *_overrides(config),
        *_zero_experts(config),
    ]
    if hf_config is not None:
        problems += _shape(config, dict(hf_config))
    elif config.model.overrides or config.model.moe_token_dispatcher_type == "flex":  # else torch is not worth a wait
        problems += [*_model_overrides(config, {}), *_judged_together(config, None, {})]
    return problems


def _refused(config: Config) -> Iterator[Problem]:
    default = Config()
    for row in NOT_IN_THIS_VERSION:
        value = get(config, row.key)
        keys = [f"{row.key}.{f.name}" for f in fields(value)] if is_dataclass(value) else [row.key]
        for key in keys:
            got = get(config, key)
            if got not in (row.accepted or (get(default, key),)):
                yield Problem("not_served", (key,), f"{got!r} is refused: {row.reason}", row.fix)


def _required(config: Config) -> Iterator[Problem]:
    if config.model.checkpoint is None:
        yield Problem(
            "checkpoint",
            ("model.checkpoint",),
            "the Megatron folder to start from is not given",
            "write one with checkpoint_tools/hf_to_megatron.py",
        )
    if not config.dataset.train:
        yield Problem("training_data", ("dataset.train",), "no training data is given", "name one or more jsonl files")
    if config.logger.run_dir is None:
        yield Problem("run_dir", ("logger.run_dir",), "the folder of the run is not given", "name a folder of its own")
    train = config.train
    if (train.train_iters is None) == (train.train_epochs is None):
        found = "neither is" if train.train_iters is None else "both are"
        yield Problem(
            "run_length",
            ("train.train_iters", "train.train_epochs"),
            f"the length of the run is train_iters or train_epochs, and {found} given",
            "give exactly one",
        )
    if config.distillation.cross_entropy == 0 and config.distillation.forward_kl == 0:
        yield Problem(
            "objective", ("distillation.cross_entropy",), "every term of the objective has weight 0", "use 1.0"
        )


def _layout(config: Config, world_size: int | None) -> Iterator[Problem]:
    model = config.model
    tp, parallel = model.tensor_model_parallel_size, model.sequence_parallel
    if parallel != (tp > 1):
        yield Problem(
            "sequence_parallel",
            ("model.sequence_parallel", "model.tensor_model_parallel_size"),
            f"{str(parallel).lower()} with tensor_model_parallel_size {tp}: Megatron-Core trains MoE layers "
            "with sequence parallelism exactly when that size is above 1",
            f"use {str(tp > 1).lower()}",
        )
    multiple = length_multiple(config)
    if model.seq_length % multiple:
        sizes = {
            f"{kind}_parallel_size": getattr(model, f"{kind}_parallel_size") for kind in ("tensor_model", "context")
        }
        reasons = [f"{key} {size}" for key, size in sizes.items() if size > 1]
        reasons += [f"fp8_recipe {model.fp8_recipe}"] if model.fp8 else []
        yield Problem(
            "seq_length_multiple",
            tuple(f"model.{key}" for key in ("seq_length", *sizes, "fp8_recipe")),
            f"{model.seq_length} is not a multiple of {multiple}, to which micro-batches are padded"
            + (f" ({', '.join(reasons)})" if reasons else ""),
            f"use {_neighbours(model.seq_length, multiple)}",
        )
    if world_size is None:
        return
    for kinds in (("tensor_model", "context", "pipeline_model"), ("expert_model", "expert_tensor", "pipeline_model")):
        sizes = {f"{kind}_parallel_size": getattr(model, f"{kind}_parallel_size") for kind in kinds}
        product = prod(sizes.values())
        if world_size % product:
            factors = " x ".join(f"{key} {size}" for key, size in sizes.items() if size > 1)
            factors += f" = {product}" if " x " in factors else ""
            yield Problem(
                "world_size",
                tuple(f"model.{key}" for key in sizes),
                f"{factors} does not divide the world size {world_size}",
                f"change the sizes, or start a multiple of {smallest_world_size(config)} processes",
            )


def _batch(config: Config, world_size: int | None) -> Iterator[Problem]:
    model, train = config.model, config.train
    if config.dataset.packing:
        return  # any number of conversations can be packed
    dense = model.tensor_model_parallel_size * model.pipeline_model_parallel_size * model.context_parallel_size
    data_parallel = 1 if world_size is None or world_size % dense else world_size // dense
    group = micro_batch_multiple(config)
    step = train.micro_batch_size * data_parallel * group
    if train.global_batch_size % step:
        factors = f"micro_batch_size {train.micro_batch_size} x data-parallel size {data_parallel}"
        if group > 1:
            factors += f" x {group}, the micro-batches that virtual pipeline stages work on in turn,"
        yield Problem(
            "global_batch_size",
            ("train.global_batch_size", "train.micro_batch_size"),
            f"{train.global_batch_size} is not a multiple of {factors} = {step}",
            f"use {_neighbours(train.global_batch_size, step)}",
        )


def _pipeline(config: Config) -> Iterator[Problem]:
    model = config.model
    stages, virtual = model.pipeline_model_parallel_size, model.virtual_pipeline_model_parallel_size
    keys = ("model.virtual_pipeline_model_parallel_size", "model.pipeline_model_parallel_size")
    if virtual is not None and stages == 1:
        yield Problem(
            "virtual_stages", keys, f"{virtual} virtual stages need pipeline_model_parallel_size above 1", "use null"
        )
    elif virtual == 1:
        yield Problem("virtual_stages", keys, "one virtual stage a process is the pipeline as it is", "use null")
    exchange = VIRTUAL_PIPELINE | model.overrides if virtual is not None else model.overrides
    overlap, batch = (f"model.overrides.{name}" for name in VIRTUAL_PIPELINE)
    if virtual is None:
        if stages > 1 and exchange.get("overlap_p2p_comm"):
            yield Problem("overlap_p2p", (overlap, *keys), "true needs virtual pipeline stages", "remove it")
        return
    if exchange["batch_p2p_comm"]:
        if stages == 2:
            reason = "virtual pipeline stages of two processes would receive each other's messages in the wrong order"
            yield Problem("batch_p2p", (batch, *keys), reason, "remove it")
        elif exchange["overlap_p2p_comm"]:
            reason = f"true needs {overlap}=false: Megatron-Core cannot overlap batches of messages with computation"
            yield Problem("batch_p2p", (batch, overlap, *keys), reason, "remove it")
    group = model.overrides.get("microbatch_group_size_per_vp_stage")
    if group is not None and not (type(group) is int and group >= stages):
        yield Problem(
            "micro_batch_group",
            ("model.overrides.microbatch_group_size_per_vp_stage", keys[1]),
            f"{group!r}, but virtual stages work on pipeline_model_parallel_size {stages} or more batches in turn",
            "raise it, or remove it",
        )


def _context(config: Config) -> Iterator[Problem]:
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


def _precision(config: Config) -> Iterator[Problem]:
    model = config.model
    keys = ("model.fp8_recipe", "model.fp8")
    if model.fp8 is None:
        if model.fp8_recipe is not None:
            yield Problem(
                "fp8_recipe",
                keys,
                f"{model.fp8_recipe} has no effect without model.fp8",
                "set model.fp8=hybrid, or use null",
            )
        return
    if model.fp8_recipe is None:
        yield Problem(
            "fp8_recipe",
            keys,
            f"not given, and model.fp8 is {model.fp8}",
            "use tensorwise (from Hopper on), blockwise (Hopper) or mxfp8 (Blackwell)",
        )
    if not model.bf16:
        yield Problem(
            "fp8_bf16",
            ("model.fp8", "model.bf16"),
            f"{model.fp8} with bf16 false: the check that the student starts as its teacher holds fp32 models to 1e-5",
            "set model.bf16=true",
        )


def _recompute(config: Config) -> Iterator[Problem]:
    model = config.model
    granularity = model.recompute_granularity
    for name, wanted in (("recompute_method", "full"), ("recompute_num_layers", "full")):
        value = getattr(model, name)
        if value is not None and granularity != wanted:
            yield Problem(
                "recompute_full",
                (f"model.{name}", "model.recompute_granularity"),
                f"{value!r} has no effect unless recompute_granularity is {wanted}",
                "remove it, or set recompute_granularity",
            )
        if value is None and granularity == wanted:
            yield Problem(
                "recompute_full",
                (f"model.{name}", "model.recompute_granularity"),
                f"not given, and recompute_granularity is {wanted}",
                "use uniform" if name == "recompute_method" else "use 1",
            )
    if model.recompute_modules is not None and granularity != "selective":
        yield Problem(
            "recompute_modules",
            ("model.recompute_modules", "model.recompute_granularity"),
            f"{model.recompute_modules} has no effect unless recompute_granularity is selective",
            "remove it, or set recompute_granularity",
        )


def _optimizer(config: Config) -> Iterator[Problem]:
    optimizer = config.optimizer
    if optimizer.min_lr > optimizer.lr:
        yield Problem(
            "min_lr",
            ("optimizer.min_lr", "optimizer.lr"),
            f"{optimizer.min_lr:g} is above lr {optimizer.lr:g}",
            "lower it",
        )
    needs = [
        ("optimizer.use_precision_aware_optimizer", "optimizer.use_distributed_optimizer"),
        ("optimizer.optimizer_cpu_offload", "optimizer.use_precision_aware_optimizer"),
        ("optimizer.overlap_cpu_optimizer_d2h_h2d", "optimizer.optimizer_cpu_offload"),
        ("ddp.overlap_param_gather", "optimizer.use_distributed_optimizer"),
        ("ddp.overlap_param_gather", "ddp.overlap_grad_reduce"),
    ]
    for key, needed in needs:
        if get(config, key) and not get(config, needed):
            yield Problem(
                "optimizer_needs", (key, needed), f"true needs {needed}, which is false", f"set {needed}=true"
            )
    for name in ("exp_avg_dtype", "exp_avg_sq_dtype"):
        if getattr(optimizer, name) == "fp32":
            continue
        keys = (
            f"optimizer.{name}",
            "optimizer.use_precision_aware_optimizer",
            "optimizer.optimizer_cpu_offload",
        )
        if not optimizer.use_precision_aware_optimizer:
            yield Problem(
                "adam_dtypes", keys, "bf16 needs optimizer.use_precision_aware_optimizer", "use fp32, or turn that on"
            )
        elif optimizer.optimizer_cpu_offload:
            yield Problem(
                "adam_dtypes", keys, "bf16 has no effect on offloaded Adam states, which are fp32", "use fp32"
            )
    if optimizer.optimizer_cpu_offload and not config.model.bf16:
        yield Problem(
            "offload_bf16",
            ("optimizer.optimizer_cpu_offload", "model.bf16"),
            "true with bf16 false: Megatron-Core cannot load such Adam states of fp32 parameters again",
            "set model.bf16=true, or turn it off",
        )
    if optimizer.optimizer_cpu_offload and optimizer.optimizer_offload_fraction == 0.0:
        yield Problem(
            "offload_fraction",
            ("optimizer.optimizer_offload_fraction", "optimizer.optimizer_cpu_offload"),
            "0 offloads nothing, and no count of steps is saved then",
            "set optimizer.optimizer_cpu_offload=false",
        )
    if optimizer.optimizer_offload_fraction != 1.0 and not optimizer.optimizer_cpu_offload:
        yield Problem(
            "offload_fraction",
            ("optimizer.optimizer_offload_fraction", "optimizer.optimizer_cpu_offload"),
            f"{optimizer.optimizer_offload_fraction:g} has no effect without optimizer.optimizer_cpu_offload",
            "remove it, or turn that on",
        )


def _schedule(config: Config) -> Iterator[Problem]:
    scheduler, iters = config.scheduler, config.train.train_iters
    decay = scheduler.lr_decay_iters or iters
    warmup = scheduler.lr_warmup_iters
    if decay is not None and warmup is not None and warmup >= decay:
        yield Problem(
            "warmup",
            ("scheduler.lr_warmup_iters", "scheduler.lr_decay_iters", "train.train_iters"),
            f"{warmup} steps of warm-up do not end before step {decay}, where the decay ends",
            "lower it",
        )


def _overrides(config: Config) -> Iterator[Problem]:
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


def _model_overrides(config: Config, shape: Mapping[str, Any]) -> Iterator[Problem]:
    """Overrides of what the checkpoint decides: its teacher would get them too, its export would not."""
    own = {f.name for f in fields(config.model)}
    for name in config.model.overrides:
        decided = name in shape or name in MODEL_DEFAULTS
        if decided and name not in own and name not in OVERRIDE_OWNERS and name not in OVERRIDABLE:
            yield Problem(
                "override_decided",
                (f"model.overrides.{name}",),
                "the checkpoint decides it, and the export would not have it",
                "remove it, or edit the checkpoint's config.json before converting",
            )


def _zero_experts(config: Config) -> Iterator[Problem]:
    zero = config.zero_experts
    if zero.target_skip_rate is not None and zero.weight != type(zero)().weight:
        yield Problem(
            "skip_rate_target",
            ("zero_experts.target_skip_rate", "zero_experts.weight"),
            f"{zero.target_skip_rate:g} sets the weight, and zero_experts.weight is {zero.weight:g}",
            "give one of the two",
        )


def _shape(config: Config, hf_config: dict[str, Any]) -> Iterator[Problem]:
    from megatron_zeda.models import family_for

    model = config.model
    try:
        family = family_for(hf_config, where=str(config.hf_dir))
        num_zero = family.num_zero_experts(hf_config)
        shape = {**family.transformer_config_kwargs(hf_config), **family.gpt_model_kwargs(hf_config)}
    except InputError as error:
        yield Problem("family", ("model.hf",), str(error))
        return
    tp = model.tensor_model_parallel_size
    divisions = [
        ("num_moe_experts", "experts", "expert_model"),
        ("num_attention_heads", "attention heads", "tensor_model"),
        ("vocab_size", "tokens of the vocabulary", "tensor_model"),
        ("moe_ffn_hidden_size", "units of an expert", "expert_tensor"),
    ]
    for name, noun, kind in divisions:
        size = getattr(model, f"{kind}_parallel_size")
        if shape[name] % size:
            message = f"{size} does not divide the model's {shape[name]} {noun}"
            yield Problem("divisors", (f"model.{kind}_parallel_size",), message, "use a divisor of that number")
    virtual = model.virtual_pipeline_model_parallel_size
    stages = model.pipeline_model_parallel_size * (virtual or 1)
    if shape["num_layers"] % stages:
        sizes = f"{model.pipeline_model_parallel_size}" + (f" x {virtual} virtual stages" if virtual else "")
        yield Problem(
            "layers",
            ("model.pipeline_model_parallel_size", "model.virtual_pipeline_model_parallel_size"),
            f"{sizes} does not divide the model's {shape['num_layers']} layers",
            "use a divisor of that number",
        )
    groups = shape["num_query_groups"]
    if groups % tp and tp % groups:
        yield Problem(
            "kv_heads",
            ("model.tensor_model_parallel_size",),
            f"{tp} is neither a multiple nor a divisor of the model's {groups} key-value heads",
            "use one that is",
        )
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
        yield from _fp8_shape(config, shape)
    longest = shape["max_sequence_length"]
    if model.seq_length > longest:
        yield Problem(
            "positions",
            ("model.seq_length",),
            f"{model.seq_length} is above the model's {longest} positions",
            "lower it",
        )
    yield from _zero_expert_shape(config, shape["num_moe_experts"], num_zero)
    yield from _model_overrides(config, shape)
    yield from _judged_together(config, hf_config, shape)


def _fp8_shape(config: Config, shape: Mapping[str, Any]) -> Iterator[Problem]:
    """Widths that FP8 GEMMs do not take, of one rank's part; Transformer Engine would end the first step."""
    model = config.model
    multiple = 32 if model.fp8_recipe == "mxfp8" else 16
    tensor, expert = "tensor_model_parallel_size", "expert_tensor_parallel_size"
    heads, groups, channels = (shape[name] for name in ("num_attention_heads", "num_query_groups", "kv_channels"))
    ranks = model.tensor_model_parallel_size
    widths = [
        ("hidden states", shape["hidden_size"], tensor, 1),
        ("outputs of attention", heads * channels, tensor, ranks),
        ("queries, keys and values", (heads + 2 * max(groups, ranks)) * channels, tensor, ranks),
        ("units of an expert", shape["moe_ffn_hidden_size"], expert, model.expert_tensor_parallel_size),
    ]
    for noun, width, name, parts in widths:
        if width % parts == 0 and width // parts % multiple:
            yield Problem(
                "fp8_widths",
                ("model.fp8", "model.fp8_recipe", f"model.{name}"),
                f"{noun} are {width // parts} wide on a rank, and {model.fp8_recipe} takes multiples of {multiple}",
                f"lower {name}, or do without FP8" if parts > 1 else "do without FP8",
            )


def _judged_together(config: Config, hf_config: dict[str, Any] | None, shape: Mapping[str, Any]) -> Iterator[Problem]:
    """Overrides that nobody knows, and all that zero experts refuse; without ``hf_config`` what no model could take."""
    reported = {problem.keys[0] for problem in [*_overrides(config), *_model_overrides(config, shape)]}
    unknown = {f"model.overrides.{name}": text for name, text in unknown_overrides(config, hf_config).items()}
    for key, text in unknown.items():
        if key not in reported:
            yield Problem("override_unknown", (key,), text)
    if hf_config is None or shape["num_zero_experts"]:
        wrong = {key.removeprefix("model.overrides.") for key in reported | unknown.keys()}
        for key, text in zero_expert_refusals(config, hf_config, without=wrong):
            yield Problem("zero_experts_refused", (key,), text)


def _zero_expert_shape(config: Config, num_experts: int, num_zero: int) -> Iterator[Problem]:
    asked = config.zero_experts.num_zero_experts
    if num_zero == 0:
        yield Problem(
            "dynamic_model",
            ("model.hf",),
            f"{config.hf_dir} is a static model without zero experts",
            "run checkpoint_tools/inject_zero_experts.py and convert its output",
        )
    elif asked is not None and asked != num_zero:
        yield Problem(
            "num_zero_experts",
            ("zero_experts.num_zero_experts",),
            f"{asked}, but the model has {num_zero} for its {num_experts} real experts",
            f"use {num_zero} or null, or inject {asked} into the original model",
        )


def _neighbours(value: int, step: int) -> str:
    """The multiples of ``step`` next to ``value``, for a message."""
    below = value - value % step
    return f"{below} or {below + step}" if below else str(step)
