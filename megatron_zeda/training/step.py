"""One training step: forward and backward over the micro-batches, the finite check, the optimizer.

Shapes: B micro-batch (1 when packed), S this rank's part of the sequence.
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

from megatron_zeda.data import GlobalBatch, MicroBatch
from megatron_zeda.zero_experts import set_loss_tokens


BalanceTokens = Literal["all", "response"]


@dataclass(frozen=True)
class StepResult:
    """What one step did, the same on every rank.

    Attributes:
        ce: cross entropy in nats per response token, before the update.
        grad_norm: global gradient norm before clipping.
        updated: False when loss or gradient were not finite: the weights are then untouched.
        stop: some rank wants to stop.
    """

    ce: float
    grad_norm: float
    updated: bool
    stop: bool


def train_step(
    chunks: list[Any],
    optimizer: Any,
    scheduler: Any,
    batch: GlobalBatch,
    *,
    ce_weight: float,
    stop: bool,
    balance_tokens: BalanceTokens = "all",
) -> StepResult:
    """Run one step on every rank.

    Args:
        chunks: this rank's model chunks, wrapped in Megatron's DDP.
        optimizer: Megatron's.
        scheduler: Megatron's; advances only when the weights were updated.
        batch: this rank's share of the global batch.
        ce_weight: weight of the cross entropy in the objective.
        stop: whether this rank wants to stop.
        balance_tokens: which tokens the routers balance and count.
    """
    set_loss_tokens(batch.loss_tokens / batch.micro_steps)  # the balancing loss is the mean over them
    for chunk in chunks:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    losses: list[Tensor] = get_forward_backward_func()(
        forward_step_func=partial(_forward_step, ce_weight=ce_weight, balance_tokens=balance_tokens),
        data_iterator=[iter(batch.micro_batches) for _ in chunks],
        model=chunks,
        num_microbatches=len(batch.micro_batches),
        seq_length=batch.seq_length,
        micro_batch_size=batch.micro_batches[0].tokens.shape[0],
        forward_only=False,
    )
    ce_sum, wants_stop = _sum_over_ranks(losses, stop, batch.micro_batches[0].tokens.device)
    ce = ce_sum / max(batch.loss_tokens, 1)

    # The optimizer clips and updates in one call, so a gradient that is not finite has to be found before it. Price:
    # a second copy to the main gradients, whose norm is taken twice.
    broken = optimizer.prepare_grads()
    grad_norm = float(optimizer.get_grad_norm())
    updated = not broken and math.isfinite(ce) and math.isfinite(grad_norm)
    if updated:
        optimizer.step()
        scheduler.step(increment=1)
    return StepResult(ce=ce, grad_norm=grad_norm, updated=updated, stop=wants_stop)


def _forward_step(
    iterator: Iterator[MicroBatch], model: Any, *, ce_weight: float, balance_tokens: BalanceTokens
) -> tuple[Tensor, Any]:
    """What Megatron's schedules call for one micro-batch of one model chunk."""
    micro = next(iterator)
    losses_BS = model(**training_inputs(micro, balance_tokens), labels=micro.labels)
    return losses_BS, partial(_masked_loss, micro.loss_mask, ce_weight)


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
    return ce_sum * ce_weight, loss_mask_BS.sum().to(torch.int), ce_sum.detach()


def _sum_over_ranks(losses: list[Tensor], stop: bool, device: torch.device) -> tuple[float, bool]:
    """Cross entropy summed over the global batch, and whether any rank wants to stop, in one collective.

    Only the last pipeline stage has losses. Its tensor-parallel ranks all have the same ones, its context-parallel
    ranks those of their parts of the sequences.
    """
    total = torch.zeros(2, dtype=torch.float64, device=device)
    if losses and parallel_state.get_tensor_model_parallel_rank() == 0:
        total[0] = torch.stack(losses).double().sum()
    total[1] = float(stop)
    torch.distributed.all_reduce(total)
    ce_sum, stops = total.tolist()
    return ce_sum, stops > 0
