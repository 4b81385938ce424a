"""One training step: forward and backward over the micro-batches, the finite check, the optimizer.

Shapes: B micro-batch (1 when packed), S this rank's part of the sequence, H hidden, N response tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_zeda import platform
from megatron_zeda.data import GlobalBatch, MicroBatch
from megatron_zeda.distillation import (
    SUM_NAMES,
    Objective,
    TeacherStates,
    combine_sums,
    linear_objective,
    ready_weight,
    whole_hidden,
)
from megatron_zeda.zero_experts import set_loss_tokens
from megatron_zeda.zero_experts.replay import forget_routing, replayed_routing

BalanceTokens = Literal["all", "response"]


@dataclass(frozen=True)
class StepResult:
    """What one step did, the same on every rank.

    Attributes:
        loss: the distillation objective (all but the balancing loss) per response token, before the update.
        ce, kl_forward, kl_reverse: its terms in nats per response token, without their weights; None for a term that
            has none.
        sums: sums over the response tokens of the global batch by :data:`.SUM_NAMES`; those that belong to a term
            without weight are 0.
        grad_norm: global gradient norm before clipping.
        updated: False when loss or gradient were not finite: the weights are then untouched.
        stop: some rank wants to stop.
    """

    loss: float
    ce: float | None
    kl_forward: float | None
    kl_reverse: float | None
    sums: dict[str, float]
    grad_norm: float
    updated: bool
    stop: bool


def no_step(*, stop: bool) -> StepResult:
    """What a step without a batch has done; a collective call.

    Args:
        stop: whether this rank wants to stop.
    """
    stops = torch.tensor(float(stop), device=platform.device())
    torch.distributed.all_reduce(stops)
    nothing = float("nan")
    return StepResult(nothing, None, None, None, dict.fromkeys(SUM_NAMES, 0.0), nothing, False, bool(stops > 0))


def train_step(
    chunks: list[Any],
    optimizer: Any,
    scheduler: Any,
    batch: GlobalBatch,
    *,
    objective: Objective,
    teacher_states: TeacherStates | None = None,
    stop: bool,
    balance_tokens: BalanceTokens = "all",
) -> StepResult:
    """Run one step on every rank.

    Args:
        chunks: this rank's model chunks, wrapped in Megatron's DDP.
        optimizer: Megatron's.
        scheduler: Megatron's; advances only when the weights were updated.
        batch: this rank's share of the global batch.
        objective: what is minimised beside the balancing loss.
        teacher_states: of this very batch, where the objective needs a teacher.
        stop: whether this rank wants to stop.
        balance_tokens: which tokens the routers balance and count.

    Raises:
        ValueError: the objective needs a teacher, and its states are not given.
    """
    if objective.needs_teacher and teacher_states is None:
        raise ValueError("the objective compares with a teacher, and its states on the batch are not given")
    set_loss_tokens(batch.loss_tokens / batch.micro_steps)  # the balancing loss is the mean over them
    for chunk in chunks:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    losses: list[Tensor] = get_forward_backward_func()(
        forward_step_func=partial(
            _forward_step, objective=objective, teacher_states=teacher_states, balance_tokens=balance_tokens
        ),
        data_iterator=[iter(list(enumerate(batch.micro_batches))) for _ in chunks],
        model=chunks,
        num_microbatches=len(batch.micro_batches),
        seq_length=batch.seq_length,
        micro_batch_size=batch.micro_batches[0].tokens.shape[0],
        forward_only=False,
    )
    forget_routing(chunks)
    loss_sum, sums, wants_stop = _over_ranks(losses, stop, batch)
    tokens = max(batch.loss_tokens, 1)

    # The optimizer clips and updates in one call, so a gradient that is not finite has to be found before it. Price:
    # a second copy to the main gradients, whose norm is taken twice.
    broken = optimizer.prepare_grads()
    grad_norm = float(optimizer.get_grad_norm())
    updated = not broken and math.isfinite(loss_sum) and math.isfinite(grad_norm)
    if updated:
        optimizer.step()
        scheduler.step(increment=1)
    weights = {
        # Without a teacher Megatron's own cross entropy is computed, whatever its weight.
        "ce": objective.cross_entropy or not objective.needs_teacher,
        "kl_forward": objective.forward_kl,
        "kl_reverse": objective.reverse_kl,
    }
    ce, kl_forward, kl_reverse = (sums[name] / tokens if weight else None for name, weight in weights.items())
    return StepResult(loss_sum / tokens, ce, kl_forward, kl_reverse, sums, grad_norm, updated, wants_stop)


def _forward_step(
    iterator: Iterator[tuple[int, MicroBatch]],
    model: Any,
    *,
    objective: Objective,
    teacher_states: TeacherStates | None,
    balance_tokens: BalanceTokens,
) -> tuple[Tensor, Any]:
    """What Megatron's schedules call for one micro-batch of one model chunk."""
    index, micro = next(iterator)
    inputs = training_inputs(micro, balance_tokens)
    if not objective.needs_teacher:
        with replayed_routing(model, micro.routing):
            losses_BS = model(**inputs, labels=micro.labels)
        return losses_BS, partial(_masked_loss, micro.loss_mask, objective.cross_entropy)
    logged: list[Tensor] = []

    def compare(*, hidden_states: Tensor, output_layer: Any, output_weight: Tensor | None, **_: Any) -> Tensor:
        """On the last stage, in place of the output layer: the objective's sum over the micro-batch."""
        assert teacher_states is not None  # train_step has seen to it
        chosen_BS = micro.loss_mask > 0
        loss, sums = linear_objective(
            whole_hidden(hidden_states, output_layer)[chosen_BS],
            ready_weight(output_layer, output_weight),
            micro.labels[chosen_BS],
            objective=objective,
            teacher=teacher_states.micro_batch(index),
            group=parallel_state.get_tensor_model_parallel_group(),
            old_logprobs_N=None if micro.old_logprobs is None else micro.old_logprobs[chosen_BS],
        )
        logged.append(torch.cat([loss.detach().double()[None], sums]))
        return loss

    with replayed_routing(model, micro.routing):
        output = model(**inputs, output_processor=compare)
    return output, lambda loss: (loss, micro.loss_mask.sum().to(torch.int), logged[0])


def training_inputs(micro: MicroBatch, balance_tokens: BalanceTokens) -> dict[str, Any]:
    """``GPTModel.forward``'s arguments for the student's training pass.

    Only the routers read the padding mask, and only to know what they balance and count: with ``response`` the
    positions that predict a response token, as validation counts them.
    """
    inputs = micro.model_inputs()
    if balance_tokens == "response":
        inputs["padding_mask"] = micro.loss_mask == 0
    return inputs


def _masked_loss(loss_mask_BS: Tensor, ce_weight: float, losses_BS: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sum over response tokens, their number (Megatron divides the gradients by it), and what is logged."""
    ce_sum = (losses_BS.float() * loss_mask_BS).sum()
    loss, tokens = ce_sum * ce_weight, loss_mask_BS.sum()
    logged = torch.zeros(1 + len(SUM_NAMES), dtype=torch.float64, device=loss.device)
    logged[0], logged[1], logged[2] = loss.detach(), tokens, ce_sum.detach()
    return loss, tokens.to(torch.int), logged


def _over_ranks(losses: list[Tensor], stop: bool, batch: GlobalBatch) -> tuple[float, dict[str, float], bool]:
    """The loss and the sums over the global batch, and whether any rank wants to stop, in one collective.

    Only the last pipeline stage has losses. Its tensor-parallel ranks all have the same ones, its context-parallel
    ranks those of their parts of the sequences.
    """
    micro = batch.micro_batches[0]
    total = torch.zeros(2 + len(SUM_NAMES), dtype=torch.float64, device=micro.tokens.device)
    if losses and parallel_state.get_tensor_model_parallel_rank() == 0:
        total[:-1] = combine_sums(losses)
    largest = total[-2].clone()
    total[-1] = float(stop)
    torch.distributed.all_reduce(total)
    if micro.old_logprobs is not None:  # the last of the sums is a maximum
        torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX)
    total[-2] = largest
    loss_sum, *sums, stops = total.tolist()
    return loss_sum, dict(zip(SUM_NAMES, sums, strict=True)), stops > 0
