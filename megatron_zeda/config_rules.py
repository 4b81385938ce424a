"""The rules a configuration must keep: what this version does not do, and what must fit together.

Every function yields the problems of some rules, which :data:`.config_refusals.RULES` lists for the documentation;
nothing stops at the first one. The world size and the model's ``config.json`` are optional, and the rules that need
them wait until they are known.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from math import prod
from typing import Any

from megatron_zeda.config import Config, smallest_world_size
from megatron_zeda.config_distillation_rules import distillation_problems
from megatron_zeda.config_megatron import length_multiple, micro_batch_multiple
from megatron_zeda.config_model_rules import (
    context_problems,
    joint_problems,
    model_override_problems,
    override_problems,
    shape_problems,
)
from megatron_zeda.config_pipeline_rules import pipeline_problems
from megatron_zeda.config_refusals import NOT_IN_THIS_VERSION, STATIC_METHODS, Problem
from megatron_zeda.config_rollout_rules import rollout_problems
from megatron_zeda.config_server_rules import server_problems


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
        *pipeline_problems(config),
        *context_problems(config),
        *_recompute(config),
        *_precision(config),
        *_optimizer(config),
        *_schedule(config),
        *override_problems(config),
        *_zero_experts(config),
        *distillation_problems(config),
        *rollout_problems(config),
        *server_problems(config),
    ]
    if hf_config is not None:
        problems += shape_problems(config, dict(hf_config))
    elif config.model.overrides or config.model.moe_token_dispatcher_type == "flex":  # else torch is not worth a wait
        problems += [*model_override_problems(config, {}), *joint_problems(config, None, {})]
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
    if config.train.stage == 1 and not config.dataset.train:
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
    if config.cross_entropy == 0 and config.distillation.forward_kl == 0 and config.reverse_kl == 0:
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


def _zero_experts(config: Config) -> Iterator[Problem]:
    zero = config.zero_experts
    if zero.target_skip_rate is not None and zero.weight != type(zero)().weight:
        yield Problem(
            "skip_rate_target",
            ("zero_experts.target_skip_rate", "zero_experts.weight"),
            f"{zero.target_skip_rate:g} sets the weight, and zero_experts.weight is {zero.weight:g}",
            "give one of the two",
        )
    if zero.skip_rate_gain > 0 and zero.balance_coeff == 0:
        yield Problem(
            "skip_rate_gain",
            ("zero_experts.skip_rate_gain", "zero_experts.balance_coeff"),
            f"{zero.skip_rate_gain:g} moves the w of a loss whose coefficient is 0",
            "raise balance_coeff, or use 0",
        )
    if zero.method in STATIC_METHODS:
        default = type(zero)()
        for name in ("num_zero_experts", "weight", "balance_coeff", "logit_bias", "skip_rate_gain"):
            if getattr(zero, name) != getattr(default, name):
                yield Problem(
                    "method_without_zero_experts",
                    (f"zero_experts.{name}", "zero_experts.method"),
                    f"{getattr(zero, name)} has no effect with method {zero.method}, which has no zero experts",
                    "remove it",
                )
    if zero.method == "net" and zero.balance_tokens != type(zero)().balance_tokens:
        yield Problem(
            "method_without_zero_experts",
            ("zero_experts.balance_tokens", "zero_experts.method"),
            f"{zero.balance_tokens} has no effect with method net, which skips nothing",
            "remove it",
        )
    if zero.method == "dynamic_skipping":
        if zero.target_skip_rate is None:
            yield Problem(
                "skipping_target",
                ("zero_experts.target_skip_rate", "zero_experts.method"),
                "not given, and dynamic_skipping looks for the beta that skips so much",
                "give a share below 1 - 1/K",
            )
        if config.train.stage != 1 or config.train.trainable != "all":
            yield Problem(
                "skipping_training",
                ("zero_experts.method", "train.stage", "train.trainable"),
                "dynamic_skipping trains nothing",
                "use stage 1 and trainable all",
            )


def _neighbours(value: int, step: int) -> str:
    """The multiples of ``step`` next to ``value``, for a message."""
    below = value - value % step
    return f"{below} or {below + step}" if below else str(step)
