"""Exact Kullback-Leibler divergence between two vocabularies split over tensor-parallel ranks.

Shapes: N tokens (all leading dimensions flattened), V columns of *this rank's* vocabulary shard, C tokens of one chunk.

Only the logits that were handed in and three [N] vectors live between forward and backward; everything of size [C, V]
is rebuilt chunk by chunk in two buffers, so a call never holds an fp32 copy of the whole logits.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# Local maximum of a shard without valid columns: finite, so that differences of it stay finite, and far enough below
# any logit that its rescaling factor underflows to exactly zero.
_NO_COLUMNS = -1e30
# Default size of one fp32 chunk buffer, in elements (64 MiB): large enough to fill a GPU, small beside the logits.
_DEFAULT_CHUNK_ELEMENTS = 1 << 24


class _Chunks:
    """Walks student and teacher logits [N, V] in chunks of C tokens, upcast and tempered in two reused buffers."""

    def __init__(self, student: Tensor, teacher: Tensor, temperature: float, chunk: int, num_valid: int):
        self.pair = (student, teacher)
        self.inverse_temperature = 1.0 / temperature
        self.chunk, self.num_valid, self.num_tokens = chunk, num_valid, student.shape[0]
        dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
        rows = min(chunk, self.num_tokens)
        self.buffers = torch.empty(2, rows, num_valid, dtype=dtype, device=student.device)

    def spans(self) -> list[slice]:
        return [slice(i, min(i + self.chunk, self.num_tokens)) for i in range(0, self.num_tokens, self.chunk)]

    def read(self, which: int, span: slice, buffer: int) -> Tensor:
        """Copy one chunk of the student (0) or the teacher (1) into a buffer: [C, num_valid] logits / temperature."""
        out = self.buffers[buffer, : span.stop - span.start]
        out.copy_(self.pair[which][span, : self.num_valid])
        return out if self.inverse_temperature == 1.0 else out.mul_(self.inverse_temperature)


class _VocabParallelKL(torch.autograd.Function):
    """KL(p || q) with p = student, q = teacher when ``reverse``, else p = teacher, q = student."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        reverse: bool,
        temperature: float,
        group: dist.ProcessGroup | None,
        chunk: int,
        num_valid: int,
    ) -> Tensor:
        student_NV, teacher_NV = student.reshape(-1, student.shape[-1]), teacher.reshape(-1, teacher.shape[-1])
        p, q = (0, 1) if reverse else (1, 0)
        chunks = _Chunks(student_NV, teacher_NV, temperature, chunk, num_valid)
        n, dtype = chunks.num_tokens, chunks.buffers.dtype
        maxima = torch.full((2, n), _NO_COLUMNS, dtype=dtype, device=student.device)
        sums = torch.zeros(3, n, dtype=dtype, device=student.device)  # sum e^p, sum e^q, sum e^p (p - q)
        if num_valid:
            for span in chunks.spans():
                lq = chunks.read(q, span, 0)
                maxima[1, span] = lq.amax(-1)
                lq.sub_(maxima[1, span, None])
                torch.exp(lq, out=chunks.buffers[1, : lq.shape[0]])
                sums[1, span] = chunks.buffers[1, : lq.shape[0]].sum(-1)
                lp = chunks.read(p, span, 1)
                maxima[0, span] = lp.amax(-1)
                lp.sub_(maxima[0, span, None])
                difference = lq.neg_().add_(lp)
                lp.exp_()
                sums[0, span] = lp.sum(-1)
                sums[2, span] = difference.mul_(lp).sum(-1)
        if group is not None and n and dist.get_world_size(group) > 1:
            local = maxima.clone()
            dist.all_reduce(maxima, op=dist.ReduceOp.MAX, group=group)
            local.sub_(maxima)
            # (p - q) was taken relative to the local maxima: move it to the global ones before it is summed.
            sums[2].addcmul_(sums[0], local[0] - local[1])
            rescale = local.exp_()
            sums[0].mul_(rescale[0])
            sums[2].mul_(rescale[0])
            sums[1].mul_(rescale[1])
            dist.all_reduce(sums, group=group)
        kl = sums[2] / sums[0] - sums[0].log() + sums[1].log()
        lse = maxima + sums[:2].log()
        ctx.save_for_backward(student, teacher, lse[p], lse[q], kl)  # lse[p] is the student's in either direction
        ctx.settings = (reverse, temperature, chunk, num_valid)
        return kl.view(student.shape[:-1])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        student, teacher, lse_student, lse_teacher, kl = ctx.saved_tensors
        reverse, temperature, chunk, num_valid = ctx.settings
        student_NV, teacher_NV = student.reshape(-1, student.shape[-1]), teacher.reshape(-1, teacher.shape[-1])
        chunks = _Chunks(student_NV, teacher_NV, temperature, chunk, num_valid)
        grad_NV = torch.empty_like(student_NV)
        grad_NV[:, num_valid:] = 0
        scale = grad_output.reshape(-1).to(kl.dtype) / temperature
        for span in chunks.spans():
            log_s = chunks.read(0, span, 0).sub_(lse_student[span, None])
            log_t = chunks.read(1, span, 1).sub_(lse_teacher[span, None])
            if reverse:  # d KL(s||t) / d logit = p_s (log p_s - log p_t - KL)
                log_t.neg_().add_(log_s).sub_(kl[span, None])
                grad = log_s.exp_().mul_(log_t)
            else:  # d KL(t||s) / d logit = p_s - p_t
                grad = log_s.exp_().sub_(log_t.exp_())
            grad_NV[span, :num_valid] = grad.mul_(scale[span, None])
        return grad_NV.view_as(student), None, None, None, None, None, None


def vocab_parallel_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    reverse: bool,
    temperature: float = 1.0,
    group: dist.ProcessGroup | None = None,
    chunk_size: int | None = None,
    num_valid: int | None = None,
) -> Tensor:
    """KL between teacher and student per token, in nats, exact over a vocabulary split along the last dimension.

    Forward (``reverse=False``) is KL(teacher || student), reverse is KL(student || teacher). Every rank of ``group``
    gets the same complete values; the gradient is that of this rank's student shard (the backward of the reduction is
    the identity, as in Megatron-Core's ``vocab_parallel_cross_entropy``: the incoming gradient must be the same on all
    ranks). The teacher is a constant. At most two collectives, both in the forward pass.

    Args:
        student_logits: ``[..., V/TP]``, bf16, fp16, fp32 or fp64; finite. Sums run in fp32 (fp64 for fp64 input).
        teacher_logits: same shape; its dtype may differ.
        reverse: which direction.
        temperature: both logits are divided by it. There is no T^2 factor.
        group: the ranks the vocabulary is split over; ``None`` means that it is not split.
        chunk_size: tokens handled at a time; the default keeps one buffer at about 16 M elements.
        num_valid: valid columns of *this rank's* shard, from the left; the rest is vocabulary padding.
            0 is allowed as long as some rank of the group has a valid column.

    Returns:
        ``[...]`` KL per token in fp32 (fp64 for fp64 input).

    Raises:
        ValueError: shapes differ, or an argument is out of range.
    """
    if student_logits.shape != teacher_logits.shape:
        shapes = f"{tuple(student_logits.shape)} and {tuple(teacher_logits.shape)}"
        raise ValueError(f"student and teacher logits must have one shape, got {shapes}")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    columns = student_logits.shape[-1]
    valid = columns if num_valid is None else num_valid
    if not 0 <= valid <= columns:
        raise ValueError(f"num_valid must be within 0 and {columns}, the columns of this shard, got {valid}")
    if valid == 0 and group is None:
        raise ValueError("num_valid is 0 and the vocabulary is not split: no valid column anywhere")
    chunk = max(1, _DEFAULT_CHUNK_ELEMENTS // max(columns, 1)) if chunk_size is None else chunk_size
    if chunk < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk}")
    kl: Tensor = _VocabParallelKL.apply(
        student_logits, teacher_logits.detach(), reverse, float(temperature), group, chunk, valid
    )
    return kl
