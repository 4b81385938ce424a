"""What a run says about itself before and during the work."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from megatron_zeda import platform
from megatron_zeda.config import Config, teacher_states_bytes
from megatron_zeda.conversion.hf_folder import CARRIED_FILE
from megatron_zeda.conversion.megatron_io import HF_FOLDER
from megatron_zeda.data import training_batches
from megatron_zeda.distillation import FrozenTeacher, Scores, TeacherStates, num_bytes
from megatron_zeda.training.on_policy import PromptSet
from megatron_zeda.training.setup import Data
from megatron_zeda.training.validation import HeldOut, ValidationResult


def lines(config: Config, facts: dict[str, Any], data: Data, chunks: list[Any]) -> list[str]:
    """The derived numbers, one group a line."""
    parameters = sum(parameter.numel() for chunk in chunks for parameter in chunk.parameters())
    model = config.model
    sizes = {
        "TP": model.tensor_model_parallel_size,
        "CP": model.context_parallel_size,
        "PP": model.pipeline_model_parallel_size,
        "EP": model.expert_model_parallel_size,
        "DP": facts["data_parallel_size"],
    }
    layout = " x ".join(f"{name} {size}" for name, size in sizes.items())
    virtual = model.virtual_pipeline_model_parallel_size
    if virtual is not None:
        layout = layout.replace(" x EP", f" ({virtual} virtual stages each) x EP")
    text = [
        f"megatron-core {importlib.metadata.version('megatron-core')}, torch {torch.__version__}, {platform.device()}, "
        f"{platform.backend()}",
        *kernel_lines(chunks[0].config),
        f"model: {facts['family']}, {facts['num_experts']} experts + {facts['num_zero_experts']} zero experts a layer, "
        f"{parameters:,} parameters on this rank, {'bf16' if model.bf16 else 'fp32'}",
        _method_line(config, facts),
        f"layout: {layout} = {facts['world_size']} processes",
        _batch_line(config, data),
    ]
    if facts.get("layers_per_stage"):
        text.append(f"layers on each pipeline stage: {facts['layers_per_stage']}")
    text += _carried_line(Path(str(config.model.checkpoint)) / HF_FOLDER / CARRIED_FILE)
    for name, statistics in data.statistics.items():
        share = statistics.loss_tokens / statistics.tokens
        text.append(
            f"{name}: {statistics.samples:,} samples, {statistics.tokens:,} tokens ({100 * share:.0f} % response), "
            f"longest {statistics.longest:,}; {statistics.cut_to_sequence} cut to the sequence, "
            f"{statistics.stopped_at_limit} stopped at a length limit"
        )
    if data.prompts is not None:
        text.append(_rollout_line(config, data.prompts))
    epochs = facts["train_iters"] * config.train.global_batch_size / data.num_samples
    text.append(
        f"schedule: {facts['train_iters']} steps ({epochs:.2f} epochs), {config.scheduler.lr_decay_style}, "
        f"lr {config.optimizer.lr:g} to {config.optimizer.min_lr:g}"
    )
    return text


def teacher_lines(
    config: Config, teacher: FrozenTeacher | None, held_out: HeldOut | None, fixture: TeacherStates | None
) -> list[str]:
    """Where the teacher is and what it takes on this rank."""
    if teacher is None:
        return ["teacher: none (teacher.checkpoint is null): no parity gate before the first step, no KL"]
    kept = held_out.teacher if held_out and held_out.teacher else [fixture] if fixture is not None else []
    on = f"{'the held-out batches' if held_out else 'a batch'} ({len(kept)})"
    name = config.teacher.checkpoint
    if not config.distils:
        return [
            f"teacher: {name}, its output layer and its hidden states on {on} take {_mib(num_bytes(kept))} on this rank"
        ]
    weights, output = _mib(teacher.num_bytes), _mib(teacher.output_num_bytes)
    places = {
        "device": f"placement device: {weights} of weights on the device of this rank, always (host: {output} between "
        f"passes, and {weights} of pinned host memory)",
        "host": f"placement host: {weights} of weights in pinned host memory of this rank; on the device {weights} "
        f"during its pass and {output} of output layer between passes (device: {weights} always)",
    }
    cache = teacher_states_bytes(config, torch.distributed.get_world_size(), teacher.chunks[0].config.hidden_size)
    fp8, recipe = config.teacher_fp8
    precision = ("bf16" if config.model.bf16 else "fp32") if fp8 is None else f"fp8 {fp8} {recipe}"
    return [
        f"teacher: {name}, computes in {precision}; {places[config.teacher.placement]}",
        f"teacher's hidden states: about {_mib(cache)} a step on a rank of the last stage, if every position counts; "
        f"{_mib(sum(states.num_bytes for states in kept))} on {on}",
    ]


def _mib(size: float) -> str:
    return f"{size / 2**20:,.3f} MiB"


def _method_line(config: Config, facts: dict[str, Any]) -> str:
    """The method and its numbers, and what is trained where that is not everything."""
    zero = config.zero_experts
    if zero.method == "net":
        before = facts["teacher_num_experts_per_tok"]
        text = f"NET: {facts['num_experts_per_tok']} of the teacher's {before} experts a token"
    else:
        name = {"zeda": "zero experts", "adamoe": "zero experts, weights renormalised (AdaMoE)", "copy": "copy experts"}
        text = (
            f"{name[zero.method]}: w {facts['zero_expert_weight']:g}, alpha {zero.balance_coeff:g}, "
            f"target skip rate {100 * facts['target_skip_rate']:.1f} %"
        )
    if zero.balance_tokens != "all" and zero.method != "net":
        text += f", of {zero.balance_tokens} tokens"
    if zero.skip_rate_gain:
        text += f", w moved with gain {zero.skip_rate_gain:g}"
    return text if config.train.trainable == "all" else f"{text}; only the routers are trained"


def kernel_lines(model_config: Any) -> list[str]:
    """Which fused kernels compute, and what the others' absence means."""
    kernels = {
        "Transformer Engine": (
            model_config.transformer_impl == "transformer_engine",
            "Megatron-Core's own layers compute",
        ),
        "grouped GEMM": (model_config.moe_grouped_gemm, "one GEMM for each expert"),
        "permute fusion": (model_config.moe_permute_fusion, "tokens are sorted by several kernels"),
        "router fusion": (model_config.moe_router_fusion, "scores and top-K by several kernels"),
        "fused RoPE": (model_config.apply_rope_fusion, "packs are turned one conversation at a time"),
        "fused weight gradient": (
            model_config.gradient_accumulation_fusion,
            "gradients are added in a pass of their own; apex has the kernel",
        ),
    }
    there = [name for name, (used, _) in kernels.items() if used]
    absent = [f"{name} ({meaning})" for name, (used, meaning) in kernels.items() if not used]
    text = [f"fused kernels: {', '.join(there) or 'none'}"]
    if absent:
        text.append(f"not there or off, which costs time and changes results by rounding only: {', '.join(absent)}")
    if model_config.fp8:
        text.append(
            f"FP8: {model_config.fp8}, {model_config.fp8_recipe}: linear layers compute in it, the router in fp32; "
            "parameters and checkpoints stay in bf16"
        )
    return text


def _carried_line(path: Path) -> list[str]:
    """What the checkpoint has beside the model, for instance a layer that only drafts tokens."""
    if not path.is_file():
        return []
    with safe_open(path, framework="pt") as tensors:
        count = len(list(tensors.keys()))
    return [f"{count} carried tensors beside the model: not trained; saved and exported as they are"]


def _batch_line(config: Config, data: Data) -> str:
    """What a step computes, from the first one of the run."""
    if data.prompts is not None:
        return f"batch: {config.train.global_batch_size} responses a step"
    first = next(training_batches(data.train, seed=config.dataset.seed, consumed_samples=0))
    kind = "packs" if config.dataset.packing else "rows"
    padding = 1.0 - first.tokens / first.positions
    return (
        f"batch: {config.train.global_batch_size} conversations a step, in the first one {len(first.micro_batches)} "
        f"micro-batches a rank, {first.positions // first.seq_length} {kind} of {first.seq_length:,} tokens in all, "
        f"{100 * padding:.0f} % of it padding"
    )


def _rollout_line(config: Config, prompts: PromptSet) -> str:
    """Who answers which prompts."""
    rollout, lengths = config.rollout, [len(ids) for ids in prompts.ids]
    return (
        f"rollouts: {len(lengths):,} prompts of {sum(lengths) / len(lengths):,.0f} tokens (longest {max(lengths):,}), "
        f"{rollout.samples_per_prompt} responses to each, at most {rollout.max_new_tokens:,} tokens long, engine "
        f"{rollout.engine}, temperature {rollout.temperature:g}, top-p {rollout.top_p:g}"
    )


def sane_line(scores: Scores) -> str:
    """What was measured of a teacher whose student has been trained before."""
    return (
        f"the student has been trained before, so it is not compared with its teacher: on {scores.tokens} response "
        f"tokens the KL between them is {scores.kl:.4f}, the cross entropy of the teacher {scores.teacher_ce:.4f}"
    )


def gate_line(scores: Scores) -> str:
    """What the parity gate measured."""
    return (
        f"parity gate passed: zero experts masked, {scores.tokens} response tokens, mean KL {scores.kl:.2g}, "
        f"largest logit difference {scores.max_difference:.2g}, cross entropy of the teacher {scores.teacher_ce:.4f}"
    )


def validation_line(step: int, result: ValidationResult) -> str:
    """One evaluation on the held-out responses."""
    distance = "" if result.kl_forward is None else f", KL to the teacher {result.kl_forward:.4f}"
    skipped = f", skip rate {100 * result.skip_rate:.1f} %" if result.skip_rate_per_layer else ""
    return f"step {step}: held out: ce {result.ce:.4f}{distance}{skipped} ({result.tokens} response tokens)"


def _yes(value: bool) -> str:
    return "yes" if value else "no"
