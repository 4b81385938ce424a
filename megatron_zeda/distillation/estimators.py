"""The terms of the objective on one chunk of tokens: values, sums and the gradient of the logits, in three buffers.

Shapes: C tokens of the chunk, V valid columns of this rank's vocabulary shard, k columns of the top-k estimator.

Everything is computed from logits shifted by their maximum over the whole vocabulary, so no exponential overflows.
Sums over the vocabulary are unnormalised, of exponentials of logits divided by the temperature.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from megatron_zeda.distillation.objective import Objective

SUM_NAMES = (
    "tokens",
    "ce",
    "kl_forward",
    "kl_reverse",
    "importance",
    "capped",
    "clipped",
    "logprob_gap",
    "logprob_gap_k3",
    "logprob_gap_max",
)
"""What a vector of sums over tokens holds, in this order (0 where a term has no weight or nothing to compare with):

- tokens;
- cross entropy, forward KL, reverse KL in nats, without importance weights. Of ``sampled`` the last is log p_student -
  log p_teacher of the labels, whose expectation over the student's samples is the reverse KL;
- importance weights; tokens whose weight was capped; tokens whose gradient PPO's clipping took away;
- |log r| with r = p_student / p_rollout of the label; r - 1 - log r, which estimates KL(rollout || student);
- not a sum: the largest |log r|.
"""

# Stands in for the maximum of a shard without valid columns: differences of it stay finite.
_NO_COLUMNS = -1e30
# A larger log ratio comes from a broken rollout, and its exponential would drown everything else.
_LARGEST_LOG_RATIO = 20.0


def combine_sums(vectors: list[Tensor]) -> Tensor:
    """One vector of sums from those of several micro-batches or ranks (at least one)."""
    stacked = torch.stack(vectors)
    return torch.cat([stacked[:, :-1].sum(0), stacked[:, -1:].amax(0)])


@dataclass(frozen=True)
class Chunk:
    """What one chunk is computed from, and where its gradient goes.

    Attributes:
        student: logits ``[C, V]`` in fp32 or fp64; overwritten.
        teacher: its logits, likewise; None when the objective needs none.
        scratch: ``[C, V]``.
        labels: ``[C]`` columns of this shard; outside [0, V) another rank owns the label.
        old_logprobs: ``[C]`` log-probabilities of the labels when they were sampled; None: nothing is corrected.
    """

    student: Tensor
    teacher: Tensor | None
    scratch: Tensor
    labels: Tensor
    old_logprobs: Tensor | None


@dataclass(frozen=True)
class _TopK:
    """Columns ``[C, k]`` of this shard, and which of them are among the k most probable of the whole vocabulary."""

    columns: Tensor
    chosen: Tensor


@dataclass(frozen=True)
class _Coefficients:
    """What multiplies the gradients of a token's terms, ``[C]`` each; None: the term is not in the objective.

    Attributes:
        label: of -log p(label).
        forward: of the forward KL.
        reverse: of the reverse KL (not of its sampled estimator, which is in ``label``).
        log_student, log_teacher: log of the sums at the temperature; log_label: of the student's at temperature 1.
        kl_reverse: its value.
        log_rest: ``topk``: log of the ratio student / teacher of the sums over all other columns.
    """

    label: Tensor
    forward: Tensor | None
    reverse: Tensor | None
    log_student: Tensor
    log_teacher: Tensor
    log_label: Tensor
    kl_reverse: Tensor
    log_rest: Tensor | None


def evaluate(
    chunk: Chunk, objective: Objective, group: dist.ProcessGroup | None, *, gradient: bool
) -> tuple[Tensor, Tensor]:
    """Compute the weighted terms of one chunk, in two collectives (three with ``topk``).

    Args:
        chunk: its logits are overwritten; its scratch buffer holds the gradient of the student's logits afterwards.
        objective: which terms.
        group: the ranks the vocabulary is split over; None means that it is not split.
        gradient: whether to compute the gradient.

    Returns:
        The sum of the weighted terms over the tokens and the vector of :data:`SUM_NAMES`, in fp64, the same on every
        rank of ``group``.
    """
    if group is not None and dist.get_world_size(group) == 1:
        group = None
    _subtract_maxima(chunk, group)
    topk = _choose(chunk, objective, group) if objective.by_topk else None
    sums = _vocabulary_sums(chunk, objective, topk)
    if group is not None:
        packed = torch.stack(list(sums.values()))
        dist.all_reduce(packed, group=group)
        sums = dict(zip(sums, packed, strict=True))
    loss, totals, coefficients = _token_values(chunk, objective, sums)
    if gradient:
        _write_gradient(chunk, objective, topk, coefficients)
    return loss, totals


def _subtract_maxima(chunk: Chunk, group: dist.ProcessGroup | None) -> None:
    both = [chunk.student] if chunk.teacher is None else [chunk.student, chunk.teacher]
    if chunk.student.shape[1]:
        maxima = torch.stack([logits.amax(-1) for logits in both])
    else:
        maxima = chunk.student.new_full((len(both), chunk.student.shape[0]), _NO_COLUMNS)
    if group is not None:
        dist.all_reduce(maxima, op=dist.ReduceOp.MAX, group=group)
    for logits, maximum in zip(both, maxima, strict=True):
        logits.sub_(maximum[:, None])


def _choose(chunk: Chunk, objective: Objective, group: dist.ProcessGroup | None) -> _TopK:
    """The student's k most probable tokens; of equal ones, those of the lower rank."""
    k, available = objective.topk, min(objective.topk, chunk.student.shape[1])
    values, columns = chunk.student.topk(available, dim=-1)
    if group is None:
        return _TopK(columns, torch.ones_like(columns, dtype=torch.bool))
    mine = values.new_full((values.shape[0], k), float("-inf"))
    mine[:, :available] = values
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, mine, group=group)
    # Every rank sorts the same numbers in the same way, so all agree on which of equal ones are in.
    winners = torch.cat(everyone, -1).argsort(dim=-1, descending=True, stable=True)[:, :k]
    chosen = torch.zeros_like(torch.cat(everyone, -1), dtype=torch.bool).scatter_(1, winners, True)
    first = dist.get_rank(group) * k
    return _TopK(columns, chosen[:, first : first + available])


def _at_label(values_CV: Tensor, labels_C: Tensor) -> Tensor:
    """Values at the labels that this shard owns, else 0."""
    if not values_CV.shape[1]:
        return values_CV.new_zeros(values_CV.shape[0])
    owned = (labels_C >= 0) & (labels_C < values_CV.shape[1])
    return torch.where(owned, values_CV.gather(1, torch.where(owned, labels_C, 0)[:, None])[:, 0], 0)


def _vocabulary_sums(chunk: Chunk, objective: Objective, topk: _TopK | None) -> dict[str, Tensor]:
    """This shard's share of the sums over the vocabulary, ``[C]`` each.

    In place of the teacher's logits it leaves their difference from the student's.
    """
    student, difference, scratch = chunk.student, chunk.teacher, chunk.scratch
    inverse = 1.0 / objective.temperature
    sums = {"label": _at_label(student, chunk.labels)}
    if difference is not None:
        torch.mul(difference, inverse, out=scratch).exp_()
        sums["teacher"] = scratch.sum(-1)
        if topk is not None:
            sums["teacher_rest"] = _without(scratch, topk)[0]
        difference.sub_(student)
        if objective.forward_kl:
            sums["forward"] = scratch.mul_(difference).sum(-1) * inverse
        if objective.samples:
            sums["label_difference"] = _at_label(difference, chunk.labels)
        torch.mul(student, inverse, out=scratch).exp_()
        sums["student"] = scratch.sum(-1)
        if topk is not None:
            sums["student_rest"], chosen = _without(scratch, topk)
            sums["reverse"] = (chosen * difference.gather(1, topk.columns)).sum(-1) * -inverse
        elif objective.full:
            sums["reverse"] = scratch.mul_(difference).sum(-1) * -inverse
    if difference is None or inverse != 1.0:
        sums["student_1"] = torch.exp(student, out=scratch).sum(-1)
    return sums


def _without(values_CV: Tensor, topk: _TopK) -> tuple[Tensor, Tensor]:
    """Sum without the chosen columns (no difference of sums, which would cancel), and the chosen values ``[C, k]``."""
    chosen = values_CV.gather(1, topk.columns) * topk.chosen
    rest = values_CV.scatter_add_(1, topk.columns, -chosen).sum(-1)
    values_CV.scatter_add_(1, topk.columns, chosen)  # 0 + x: as it was
    return rest, chosen


def _token_values(chunk: Chunk, objective: Objective, sums: dict[str, Tensor]) -> tuple[Tensor, Tensor, _Coefficients]:
    """Loss, totals in the order of :data:`SUM_NAMES`, and what the gradient needs, from the complete sums."""
    zero = torch.zeros_like(sums["label"])
    log_label = sums["student_1" if "student_1" in sums else "student"].log()
    log_student, log_teacher = sums.get("student", zero + 1).log(), sums.get("teacher", zero + 1).log()
    ce = log_label - sums["label"]

    gap = zero if chunk.old_logprobs is None else -ce - chunk.old_logprobs
    ratio = gap.clamp(max=_LARGEST_LOG_RATIO).exp()
    asked = None if chunk.old_logprobs is None else objective.importance_cap
    cap = float("inf") if asked is None else asked
    bounded = ratio.clamp(max=cap)
    weight = torch.ones_like(zero) if asked is None else bounded

    forward, reverse, clipped, log_rest = zero, zero, zero, None
    label = weight * objective.cross_entropy
    loss = ce * label
    if objective.forward_kl:
        forward = sums["forward"] / sums["teacher"] - log_teacher + log_student
        loss = loss + forward * weight * objective.forward_kl
    if objective.samples:
        reverse = log_teacher - log_student - sums["label_difference"]
        advantage = -reverse
        low, high = 1 - objective.clip_ratio_low, 1 + objective.clip_ratio_high
        outside = torch.where(advantage > 0, ratio > high, ratio < low)
        clipped = outside.to(zero.dtype)
        loss = loss - torch.where(outside, ratio.clamp(low, high), bounded) * advantage * objective.reverse_kl
        label = label + torch.where(outside, 0, bounded) * advantage * objective.reverse_kl
    elif objective.reverse_kl:
        expected = sums["reverse"]
        if objective.by_topk:
            tiny = torch.finfo(zero.dtype).tiny
            log_rest = sums["student_rest"].clamp(min=tiny).log() - sums["teacher_rest"].clamp(min=tiny).log()
            expected = expected + sums["student_rest"] * log_rest
        reverse = expected / sums["student"] - log_student + log_teacher
        loss = loss + reverse * weight * objective.reverse_kl

    per_token = (
        torch.ones_like(zero),
        ce,
        forward,
        reverse,
        weight,
        (ratio > cap).to(zero.dtype),
        clipped,
        gap.abs(),
        ratio - 1 - gap.clamp(max=_LARGEST_LOG_RATIO),
    )
    totals = torch.cat([torch.stack(per_token).double().sum(1), gap.abs().double().amax(0, keepdim=True)])
    scale = weight / objective.temperature
    coefficients = _Coefficients(
        label=label,
        forward=scale * objective.forward_kl if objective.forward_kl else None,
        reverse=scale * objective.reverse_kl if objective.reverse_kl and not objective.samples else None,
        log_student=log_student,
        log_teacher=log_teacher,
        log_label=log_label,
        kl_reverse=reverse,
        log_rest=log_rest,
    )
    return loss.double().sum(), totals, coefficients


def _write_gradient(chunk: Chunk, objective: Objective, topk: _TopK | None, of: _Coefficients) -> None:
    """Fill the scratch buffer with the gradient of the student's logits; p and q are student and teacher."""
    student, difference, gradient = chunk.student, chunk.teacher, chunk.scratch
    inverse = 1.0 / objective.temperature
    log_student, log_teacher = of.log_student[:, None], of.log_teacher[:, None]
    if of.forward is not None:  # forward KL: p - q; here - q
        assert difference is not None
        torch.add(student, difference, out=gradient).mul_(inverse).sub_(log_teacher).exp_().mul_(-of.forward[:, None])
    else:
        gradient.zero_()
    if difference is not None:  # what multiplies p at the temperature: the reverse KL's log(p / q) - KL, and forward's
        if of.reverse is None:
            difference.zero_()
        else:
            shift = log_teacher - log_student - of.kl_reverse[:, None]
            if topk is None:
                difference.mul_(-inverse).add_(shift)
            else:
                assert of.log_rest is not None
                inside = difference.gather(1, topk.columns).mul_(-inverse).add_(shift)
                outside = of.log_rest[:, None] + shift
                difference.copy_(outside.expand_as(difference))
                difference.scatter_(1, topk.columns, torch.where(topk.chosen, inside, outside))
            difference.mul_(of.reverse[:, None])
        if of.forward is not None:
            difference.add_(of.forward[:, None])
        if inverse == 1.0:
            difference.add_(of.label[:, None])
    if difference is None or inverse == 1.0:
        student.sub_(of.log_label[:, None]).exp_()
        gradient.addcmul_(student, of.label[:, None] if difference is None else difference)
    else:
        _add_tempered(gradient, student, difference, of, objective)
    _add_at_label(gradient, chunk.labels, -of.label)


def _add_tempered(
    gradient: Tensor, student: Tensor, difference: Tensor, of: _Coefficients, objective: Objective
) -> None:
    """Add p at the temperature times ``difference``, and p at 1 times the label's coefficient; both are overwritten.

    One buffer for two exponentials: the flatter one first, because powers of what underflowed would be lost. Both stay
    at most 1 until they are divided by their sums.
    """
    temperature, inverse = objective.temperature, 1.0 / objective.temperature
    difference.mul_(of.log_student.neg().exp_()[:, None])
    label = (of.label * of.log_label.neg().exp())[:, None]
    if temperature > 1.0 or not objective.cross_entropy:
        gradient.addcmul_(student.mul_(inverse).exp_(), difference)
        if objective.cross_entropy:
            gradient.addcmul_(student.pow_(temperature), label)
    else:
        gradient.addcmul_(student.exp_(), label)
        gradient.addcmul_(student.pow_(inverse), difference)


def _add_at_label(values_CV: Tensor, labels_C: Tensor, addend_C: Tensor) -> None:
    if values_CV.shape[1]:
        owned = (labels_C >= 0) & (labels_C < values_CV.shape[1])
        values_CV.scatter_add_(1, torch.where(owned, labels_C, 0)[:, None], torch.where(owned, addend_C, 0)[:, None])
