"""The objective of distillation, from hidden states: full logits never exist.

Shapes: N response tokens, H hidden, V columns of this rank's vocabulary shard, C tokens of one chunk.

Per chunk the logits of student and teacher are made, the terms are evaluated, and the gradients of the hidden states
and of the output layer's weight are made at once, inside the forward pass. So no logits are kept for the backward pass
and none are computed twice; the backward pass multiplies by the incoming scalar.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_zeda.distillation.estimators import SUM_NAMES, Chunk, evaluate

# Fewest elements of one fp32 chunk of logits (64 MiB).
_CHUNK_ELEMENTS = 1 << 24
# Every chunk reads and writes the weight's fp32 gradient, V H elements, to which its 2 C V H multiplications are to be
# many; and its three buffers of C V elements are to be small beside it. C = H / 4 is a compromise.
_WIDTHS_PER_CHUNK = 4


@dataclass(frozen=True)
class Objective:
    """The terms that :func:`linear_objective` sums over response tokens, and their weights.

    Attributes:
        cross_entropy: weight of -log p_student(label).
        forward_kl: weight of KL(teacher || student) over the whole vocabulary.
        reverse_kl: weight of KL(student || teacher).
        estimator: of the reverse KL. ``full``: exact. ``topk``: exact for distributions over the student's ``topk``
            most probable tokens and all others as one, so a lower bound. ``sampled``: PPO's clipped policy gradient of
            the labels, which the student sampled, with advantage log p_teacher - log p_student.
        topk: see ``estimator``.
        temperature: divides both models' logits in the KL terms (no T^2 factor); 1 with ``sampled``.
        clip_ratio_low: ``sampled``: the ratio p_student / p_rollout is clipped to [1 - low, 1 + high].
        clip_ratio_high: see ``clip_ratio_low``.
        importance_cap: with old log-probabilities all terms of a token are multiplied by min(p_student / p_rollout,
            cap), a constant to the gradient; not the one of ``sampled``, which has the ratio in it: there the cap is
            its upper bound where PPO has none. None: 1, and no bound.
        chunk_size: tokens whose logits exist at a time. None: a quarter of the hidden size, or what fits in 64 MiB of
            fp32 if that is more.

    Raises:
        ValueError: a value is out of range.
    """

    cross_entropy: float = 1.0
    forward_kl: float = 0.0
    reverse_kl: float = 0.0
    estimator: str = "full"
    topk: int = 64
    temperature: float = 1.0
    clip_ratio_low: float = 0.2
    clip_ratio_high: float = 0.28
    importance_cap: float | None = None
    chunk_size: int | None = None

    def __post_init__(self) -> None:
        weights = (self.cross_entropy, self.forward_kl, self.reverse_kl)
        cap = 1.0 if self.importance_cap is None else self.importance_cap
        broken = {
            f"weights must be finite and 0 or more, got {weights}": not all(0 <= w < float("inf") for w in weights),
            f"unknown estimator {self.estimator!r}": self.estimator not in ("full", "topk", "sampled"),
            f"topk must be at least 1, got {self.topk}": self.topk < 1,
            f"temperature must be positive, got {self.temperature}": not self.temperature > 0,
            "the sampled estimator is for temperature 1": self.samples and self.temperature != 1,
            f"clip_ratio_low must be in [0, 1), got {self.clip_ratio_low}": not 0 <= self.clip_ratio_low < 1,
            f"clip_ratio_high must be 0 or more, got {self.clip_ratio_high}": not self.clip_ratio_high >= 0,
            f"importance_cap must be positive, got {cap}": not cap > 0,
            f"chunk_size must be at least 1, got {self.chunk_size}": self.chunk_size is not None
            and self.chunk_size < 1,
        }
        for message, is_broken in broken.items():
            if is_broken:
                raise ValueError(message)

    @property
    def needs_teacher(self) -> bool:
        """Whether a KL is in the objective."""
        return self.forward_kl > 0 or self.reverse_kl > 0

    @property
    def full(self) -> bool:
        """Whether the exact reverse KL is in the objective."""
        return self.reverse_kl > 0 and self.estimator == "full"

    @property
    def by_topk(self) -> bool:
        """Whether the reverse KL over the most probable tokens is in the objective."""
        return self.reverse_kl > 0 and self.estimator == "topk"

    @property
    def samples(self) -> bool:
        """Whether the reverse KL is in the objective by the policy gradient of sampled tokens."""
        return self.reverse_kl > 0 and self.estimator == "sampled"


def linear_objective(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    labels_N: Tensor,
    *,
    objective: Objective,
    teacher: tuple[Tensor, Tensor] | None,
    group: dist.ProcessGroup | None,
    num_valid: int | None = None,
    old_logprobs_N: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Sum of the weighted terms over N tokens, from the last hidden states and the output layer's weight.

    All ranks of ``group`` must pass the same tokens and get the same results, but the gradient of ``hidden_NH`` is this
    shard's share: their sum over the ranks is the gradient (with sequence parallelism the backward pass of
    ``gather_from_sequence_parallel_region`` adds them up; without, use ``copy_to_tensor_model_parallel_region``). The
    incoming gradient must be the same on all ranks. Gradients are summed over chunks in fp32 and rounded once.
    Sums over the vocabulary run in fp32 (fp64 for fp64 input) on logits in the dtype of the weight.

    Args:
        hidden_NH: the student's, ``[N, H]``; N may be 0.
        weight_VH: its output layer's shard ``[V, H]``; no gradient is made if it does not require one.
        labels_N: token ids of the whole vocabulary, rank r owning those from r V on.
        objective: the terms.
        teacher: hidden states ``[N, H']`` and weight ``[V, H']`` of the teacher, constants; may be None if no KL has a
            weight.
        group: the ranks the vocabulary is split over; None means that it is not split.
        num_valid: valid columns of this rank's shard, from the left; the rest is vocabulary padding, which is left out
            (its weight gets gradient 0). 0 is allowed if another rank has a valid column.
        old_logprobs_N: log-probabilities of the labels when they were sampled (temperature 1, whole vocabulary).

    Returns:
        The loss (scalar, differentiable once) and the detached fp64 vector of :data:`.estimators.SUM_NAMES`.

    Raises:
        ValueError: shapes do not fit, or the teacher that the objective needs is missing.
    """
    columns = weight_VH.shape[0]
    valid = columns if num_valid is None else num_valid
    _check(hidden_NH, weight_VH, labels_N, objective, teacher, old_logprobs_N)
    if not 0 <= valid <= columns or (valid == 0 and group is None):
        raise ValueError(f"num_valid must be within {int(group is None)} and {columns}, got {valid}")
    first_label = columns * (0 if group is None else dist.get_rank(group))
    inputs = _Inputs(
        labels=labels_N - first_label,
        teacher=teacher if objective.needs_teacher else None,
        old_logprobs=old_logprobs_N,
        objective=objective,
        group=group,
        num_valid=valid,
        needs_gradient=torch.is_grad_enabled(),
    )
    loss, sums = _LinearObjective.apply(hidden_NH, weight_VH, inputs)
    return loss, sums


def _check(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    objective: Objective,
    teacher: tuple[Tensor, Tensor] | None,
    old_logprobs: Tensor | None,
) -> None:
    n, v = hidden.shape[0], weight.shape[0]
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1] or labels.shape != (n,):
        shapes = f"{tuple(hidden.shape)}, {tuple(weight.shape)}, {tuple(labels.shape)}"
        raise ValueError(f"hidden [N, H], weight [V, H] and labels [N] do not fit: {shapes}")
    if objective.needs_teacher and teacher is None:
        raise ValueError("the objective has a KL, but there is no teacher")
    if teacher is not None and (teacher[0].shape[0] != n or teacher[1].shape != (v, teacher[0].shape[1])):
        shapes = f"{tuple(teacher[0].shape)} and {tuple(teacher[1].shape)}"
        raise ValueError(f"the teacher must have {n} tokens and {v} vocabulary rows, got {shapes}")
    if old_logprobs is not None and old_logprobs.shape != (n,):
        raise ValueError(f"old log-probabilities must be [{n}], got {tuple(old_logprobs.shape)}")


@dataclass(frozen=True)
class _Inputs:
    """The constants of a call; ``labels`` count from this shard's first column."""

    labels: Tensor
    teacher: tuple[Tensor, Tensor] | None
    old_logprobs: Tensor | None
    objective: Objective
    group: dist.ProcessGroup | None
    num_valid: int
    needs_gradient: bool


class _LinearObjective(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, inputs: _Inputs) -> tuple[Tensor, Tensor]:
        wanted = [inputs.needs_gradient and needed for needed in ctx.needs_input_grad[:2]]
        loss, sums, ctx.gradients = _run(hidden, weight, inputs, wanted[0], wanted[1])
        ctx.dtypes = hidden.dtype, weight.dtype
        ctx.mark_non_differentiable(sums)
        return loss, sums

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        if ctx.gradients is None:
            raise RuntimeError("linear_objective's gradients were handed out by an earlier backward pass")
        gradients, ctx.gradients = ctx.gradients, None
        # In place: the weight's gradient is as large as the weight.
        hidden, weight = (
            None if gradient is None else gradient.mul_(grad_loss).to(dtype)
            for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
        )
        return hidden, weight, None


def _run(
    hidden: Tensor, weight: Tensor, inputs: _Inputs, hidden_grad: bool, weight_grad: bool
) -> tuple[Tensor, Tensor, tuple[Tensor | None, Tensor | None]]:
    """Loss, sums and the gradients that are wanted (the hidden states' in their dtype, the weight's in fp32)."""
    n, valid, objective = hidden.shape[0], inputs.num_valid, inputs.objective
    compute = torch.float64 if weight.dtype == torch.float64 else torch.float32
    rows = objective.chunk_size or max(1, _CHUNK_ELEMENTS // weight.shape[0], weight.shape[1] // _WIDTHS_PER_CHUNK)
    buffers = torch.empty(3 if inputs.teacher else 2, min(rows, n), valid, dtype=compute, device=weight.device)
    loss = torch.zeros((), dtype=torch.float64, device=weight.device)
    sums = torch.zeros(len(SUM_NAMES), dtype=torch.float64, device=weight.device)
    d_hidden = torch.empty_like(hidden, dtype=weight.dtype) if hidden_grad else None
    # One chunk's gradient needs no sum of more precision.
    d_weight = torch.zeros_like(weight, dtype=compute if n > rows else weight.dtype) if weight_grad else None
    for start in range(0, n, rows):
        span = slice(start, min(start + rows, n))
        buffer = buffers[:, : span.stop - span.start]
        chunk = Chunk(
            student=_logits(hidden[span], weight[:valid], buffer[0]),
            teacher=None
            if inputs.teacher is None
            else _logits(inputs.teacher[0][span], inputs.teacher[1][:valid], buffer[2]),
            scratch=buffer[1],
            labels=inputs.labels[span],
            old_logprobs=None if inputs.old_logprobs is None else inputs.old_logprobs[span].to(compute),
        )
        chunk_loss, chunk_sums = evaluate(chunk, objective, inputs.group, gradient=hidden_grad or weight_grad)
        loss += chunk_loss
        sums[:-1] += chunk_sums[:-1]
        torch.maximum(sums[-1], chunk_sums[-1], out=sums[-1])
        gradient = _rounded(chunk, weight.dtype)
        if d_hidden is not None:
            torch.mm(gradient, weight[:valid], out=d_hidden[span])
        if d_weight is not None:
            _accumulate(d_weight[:valid], gradient, hidden[span])
    return loss.to(compute), sums, (d_hidden, d_weight)


def _logits(hidden: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    """Rounded to the weight's dtype, as the output layer's are."""
    if weight.dtype == out.dtype:
        return torch.mm(hidden.to(weight.dtype), weight.t(), out=out)
    return out.copy_(hidden.to(weight.dtype) @ weight.t())


def _rounded(chunk: Chunk, dtype: torch.dtype) -> Tensor:
    """The gradient in the dtype of the weight, in the memory of the student's logits, which are used up."""
    if dtype == chunk.scratch.dtype:
        return chunk.scratch
    return chunk.student.view(dtype)[:, : chunk.scratch.shape[1]].copy_(chunk.scratch)


def _accumulate(total: Tensor, gradient: Tensor, hidden: Tensor) -> None:
    """Add ``gradient^T hidden`` to ``total``, which may have more precision than the product."""
    hidden = hidden.to(gradient.dtype)
    if total.dtype == gradient.dtype:
        total.addmm_(gradient.t(), hidden)
    else:
        total.add_(gradient.t() @ hidden)
