"""Forward passes that end in hidden states, through Megatron-Core's own schedules, and scores computed from them.

Logits never exist for more than one chunk of tokens. Shapes: B micro-batch, S sequence (this context-parallel rank's
part of it), H hidden, N chosen tokens, R this tensor-parallel rank's share of them, V columns of this rank's
vocabulary shard.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region, vocab_parallel_cross_entropy
from torch import Tensor

from megatron_zeda.data import GlobalBatch, MicroBatch
from megatron_zeda.distillation.kl import vocab_parallel_kl

# Elements of one chunk of logits: small beside the model, large enough to keep the device busy.
_CHUNK_ELEMENTS = 1 << 23

OnLastStage = Callable[[int, MicroBatch, Tensor, Tensor], Any]


def whole_hidden(hidden_states: Tensor, output_layer: Any) -> Tensor:
    """All positions of what ``GPTModel`` hands to an output processor, ``[S, B, H]`` -> ``[B, S, H]``.

    With sequence parallelism every rank has a part of them. Every rank then computes with its own part of the
    vocabulary, so that its gradient is a part of the sum, which the backward pass forms.
    """
    if output_layer.sequence_parallel:
        hidden_states = gather_from_sequence_parallel_region(hidden_states, tensor_parallel_output_grad=True)
    return hidden_states.transpose(0, 1)


def ready_weight(output_layer: Any, output_weight: Tensor | None) -> Tensor:
    """The output layer's weight ``[V, H]``, right for tied embeddings, ready to be used outside its module."""
    # What waits for parameters that are still being gathered (ddp.overlap_param_gather) is attached to the module.
    for hook in list(output_layer._forward_pre_hooks.values()):
        hook(output_layer, ())
    weight: Tensor = output_layer.weight if output_weight is None else output_weight
    return weight


def forward_hidden(
    chunks: list[Any],
    batch: GlobalBatch,
    on_last_stage: OnLastStage,
    *,
    counted: Callable[[MicroBatch], Tensor] | None = None,
) -> list[Any]:
    """Run the model over this rank's micro-batches without gradients.

    Args:
        chunks: model chunks of this rank, in eval mode.
        batch: what to run.
        on_last_stage: called with the micro-batch's index, the micro-batch, the final hidden states ``[B, S, H]`` (of
            its tokens) and the output layer's weight ``[V, H]`` (right for tied embeddings); its results are collected.
        counted: which positions ``[B, S]`` the routers count, True to leave out; default: all but the padding.

    Returns:
        One result per micro-batch on the last pipeline stage, in their order, else nothing.
    """
    results: list[Any] = []

    def forward_step(iterator: Iterator[tuple[int, MicroBatch]], model: Any) -> tuple[Tensor, Any]:
        index, micro = next(iterator)

        def keep(*, hidden_states: Tensor, output_layer: Any, output_weight: Tensor | None, **_: Any) -> Tensor:
            hidden_BSH = whole_hidden(hidden_states, output_layer)
            results.append(on_last_stage(index, micro, hidden_BSH, ready_weight(output_layer, output_weight)))
            return hidden_states.new_zeros(1)

        inputs = micro.model_inputs()
        if counted is not None:
            inputs["padding_mask"] = counted(micro)
        output = model(**inputs, output_processor=keep)
        return output, lambda out, non_loss_data=False: None

    with torch.no_grad():
        get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=[iter(list(enumerate(batch.micro_batches))) for _ in chunks],
            model=chunks,
            num_microbatches=len(batch.micro_batches),
            seq_length=batch.seq_length,
            micro_batch_size=batch.micro_batches[0].tokens.shape[0],
            forward_only=True,
            collect_non_loss_data=True,
        )
    return results


@dataclass
class TeacherStates:
    """What is kept of a teacher's pass over one global batch: enough to rebuild its logits on the response tokens.

    Every tensor-parallel rank keeps a share of the rows, so that the cache costs the group one copy.

    Attributes:
        shares: per micro-batch ``[R, H]``, on the last pipeline stage; R is N / TP, rounded up.
        num_rows: per micro-batch N.
        weight: the output layer's shard ``[V, H]``, which the states of all batches share.
    """

    shares: list[Tensor] = field(default_factory=list)
    num_rows: list[int] = field(default_factory=list)
    weight: Tensor | None = None

    def keep(self, hidden_NH: Tensor) -> None:
        """Add the next micro-batch; all tensor-parallel ranks give the same rows."""
        rank, size = (
            parallel_state.get_tensor_model_parallel_rank(),
            parallel_state.get_tensor_model_parallel_world_size(),
        )
        count = hidden_NH.shape[0]
        each = -(-count // size)
        share_RH = hidden_NH.new_zeros(each, hidden_NH.shape[1])
        mine = hidden_NH[rank * each : (rank + 1) * each]
        share_RH[: mine.shape[0]] = mine
        self.shares.append(share_RH)
        self.num_rows.append(count)

    def micro_batch(self, index: int) -> tuple[Tensor, Tensor] | None:
        """Hidden states ``[N, H]`` and output weight ``[V, H]`` of a micro-batch; None where the pipeline has none.

        A collective call of the tensor-parallel group.
        """
        if self.weight is None:
            return None
        share_RH = self.shares[index]
        size = parallel_state.get_tensor_model_parallel_world_size()
        if size == 1:
            return share_RH, self.weight
        whole = share_RH.new_empty(size * share_RH.shape[0], share_RH.shape[1])
        group = parallel_state.get_tensor_model_parallel_group()
        torch.distributed.all_gather_into_tensor(whole, share_RH, group=group)
        return whole[: self.num_rows[index]], self.weight

    @property
    def num_bytes(self) -> int:
        """Memory of the hidden states on this rank."""
        return sum(share.numel() * share.element_size() for share in self.shares)


def num_bytes(states: Iterable[TeacherStates]) -> int:
    """Memory held on this rank by the states of several batches, what they share counted once."""
    held = list(states)
    weights = {id(one.weight): one.weight for one in held if one.weight is not None}
    shared = sum(weight.numel() * weight.element_size() for weight in weights.values())
    return shared + sum(one.num_bytes for one in held)


@dataclass(frozen=True)
class Scores:
    """Sums over response tokens of a global batch, the same on every rank.

    Attributes:
        tokens: response tokens.
        ce_sum: cross entropy in nats.
        kl_sum: forward KL(teacher || student) in nats; NaN without a teacher.
        teacher_ce_sum: the teacher's cross entropy in nats; NaN without a teacher.
        max_difference: largest absolute difference between the two models' logits; NaN without a teacher.
        far_tokens: tokens with a difference above the tolerance that was asked for.
    """

    tokens: int
    ce_sum: float
    kl_sum: float
    teacher_ce_sum: float
    max_difference: float
    far_tokens: int

    @property
    def ce(self) -> float:
        """Nats per response token."""
        return self.ce_sum / self.tokens if self.tokens else float("nan")

    @property
    def kl(self) -> float:
        """Nats per response token."""
        return self.kl_sum / self.tokens if self.tokens else float("nan")

    @property
    def teacher_ce(self) -> float:
        """Nats per response token."""
        return self.teacher_ce_sum / self.tokens if self.tokens else float("nan")


def response_states(hidden_BSH: Tensor, micro: MicroBatch) -> tuple[Tensor, Tensor]:
    """Hidden states ``[N, H]`` that predict a response token, and those tokens ``[N]``."""
    chosen = micro.loss_mask > 0
    return hidden_BSH[chosen], micro.labels[chosen]


def score(
    chunks: list[Any],
    batch: GlobalBatch,
    teacher: TeacherStates | None = None,
    *,
    relative_tolerance: float = 0.0,
    counted: Callable[[MicroBatch], Tensor] | None = None,
) -> Scores:
    """Cross entropy of a model on the response tokens of a batch, and its distance from the teacher.

    A collective call. The model must be in eval mode.

    Args:
        chunks: the student's model chunks.
        batch: what to score.
        teacher: the teacher's states for the very same batch.
        relative_tolerance: logits further apart than this, times the larger of 1 and the teacher's largest logit of the
            token, count as far.
        counted: see :func:`forward_hidden`.
    """
    group = parallel_state.get_tensor_model_parallel_group()

    def on_last_stage(index: int, micro: MicroBatch, hidden_BSH: Tensor, weight_VH: Tensor) -> Tensor:
        hidden_NH, labels_N = response_states(hidden_BSH, micro)
        reference = None if teacher is None else teacher.micro_batch(index)
        return _score_tokens(hidden_NH, weight_VH, labels_N, reference, group, relative_tolerance)

    device = batch.micro_batches[0].tokens.device
    rows = forward_hidden(chunks, batch, on_last_stage, counted=counted)
    local = torch.stack(rows) if rows else torch.zeros(1, 6, dtype=torch.float64, device=device)
    sums = local[:, :5].sum(0) if parallel_state.get_tensor_model_parallel_rank() == 0 else local.new_zeros(5)
    largest = local[:, 5].max()
    torch.distributed.all_reduce(sums)
    torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX)
    tokens, ce_sum, kl_sum, far, teacher_ce_sum = sums.tolist()
    missing = teacher is None
    return Scores(
        tokens=int(tokens),
        ce_sum=ce_sum,
        kl_sum=float("nan") if missing else kl_sum,
        teacher_ce_sum=float("nan") if missing else teacher_ce_sum,
        max_difference=float("nan") if missing else float(largest),
        far_tokens=int(far),
    )


def _score_tokens(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    labels_N: Tensor,
    reference: tuple[Tensor, Tensor] | None,
    group: Any,
    relative_tolerance: float,
) -> Tensor:
    """``[tokens, sums of cross entropy and KL, far tokens, teacher's cross entropy, largest difference]`` in fp64."""
    totals = torch.zeros(6, dtype=torch.float64, device=hidden_NH.device)
    totals[0] = hidden_NH.shape[0]
    chunk = max(1, _CHUNK_ELEMENTS // weight_VH.shape[0])
    for start in range(0, hidden_NH.shape[0], chunk):
        span = slice(start, start + chunk)
        logits_NV = hidden_NH[span] @ weight_VH.t()
        if reference is not None:
            hidden, weight = reference
            teacher_NV = hidden[span] @ weight.t()
            totals[2] += vocab_parallel_kl(logits_NV, teacher_NV, reverse=False, group=group).sum()
            extremes = torch.stack([(logits_NV - teacher_NV).abs().amax(-1), teacher_NV.abs().amax(-1)]).float()
            torch.distributed.all_reduce(extremes, op=torch.distributed.ReduceOp.MAX, group=group)
            difference_N, scale_N = extremes
            totals[3] += (difference_N > relative_tolerance * scale_N.clamp(min=1.0)).sum()
            totals[5] = torch.maximum(totals[5], difference_N.max().double())
            # Last, because Megatron's cross entropy overwrites the logits.
            totals[4] += vocab_parallel_cross_entropy(teacher_NV[None], labels_N[None, span]).sum()
        totals[1] += vocab_parallel_cross_entropy(logits_NV[None], labels_N[None, span]).sum()
    return totals
