"""Which samples a step sees, and the tensors a rank gets, padded or packed. A pure function of the seed and the step.

Every rank knows all samples, so the length and the number of loss tokens of the whole global batch are known everywhere
without communication.

Shapes: B micro-batch (1 when packed), S sequence of the whole context-parallel group, s this rank's part of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_zeda.data.chat import Sample
from megatron_zeda.data.packing import pack_conversations
from megatron_zeda.platform.zigzag import thd_partition_indices

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass of one rank reads, ``[B, s]`` on the training device.

    Attributes:
        tokens, labels, position_ids: int64; a label is the next token.
        loss_mask: float32, 1 where the label is a response token.
        padding_mask: bool, **True at padding** (Megatron-Core's sense).
        cu_seqlens: of a packed micro-batch, int32 where each sequence begins and the last one ends, in positions of the
            whole context-parallel group. Padding at the end of a sequence belongs to it: causal attention keeps it away
            from the tokens before.
        max_seqlen: the longest of those sequences.
        old_logprobs: float32, log-probability of the label as the engine that sampled it gave it, 0 where the loss mask
            is 0; None unless the samples are rollouts of a stage-2 step.
        routing: ``[B, s, L, K]`` int16, the experts of every token in each of the model's L MoE layers as it was routed
            when it was sampled; None unless that is replayed. Padding is routed to experts 0 to K - 1.
    """

    tokens: Tensor
    labels: Tensor
    position_ids: Tensor
    loss_mask: Tensor
    padding_mask: Tensor
    cu_seqlens: Tensor | None = None
    max_seqlen: int = 0
    old_logprobs: Tensor | None = None
    routing: Tensor | None = None

    def model_inputs(self) -> dict[str, Any]:
        """The keyword arguments of ``GPTModel.forward`` that every pass over this micro-batch has in common."""
        return {
            "input_ids": self.tokens,
            "position_ids": self.position_ids,
            "attention_mask": None,  # the core attention is causal by itself
            "padding_mask": self.padding_mask,
            "packed_seq_params": self._packed_seq_params(),
        }

    def _packed_seq_params(self) -> Any:
        if self.cu_seqlens is None:
            return None
        from megatron.core.packed_seq_params import PackedSeqParams

        # One object for padded and unpadded boundaries tells Transformer Engine that there is nothing between two
        # sequences; without padded ones it cannot split them over a context-parallel group.
        return PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=self.cu_seqlens,
            cu_seqlens_kv=self.cu_seqlens,
            cu_seqlens_q_padded=self.cu_seqlens,
            cu_seqlens_kv_padded=self.cu_seqlens,
            max_seqlen_q=self.max_seqlen,
            max_seqlen_kv=self.max_seqlen,
        )


@dataclass(frozen=True)
class GlobalBatch:
    """One step: this rank's micro-batches, and what is true of the whole global batch.

    Attributes:
        micro_batches: this data-parallel rank's share, in order.
        seq_length: the one length S that all ranks and micro-batches of the step share.
        loss_tokens: response tokens predicted in the whole global batch.
        tokens: real tokens (prompt and response) in the whole global batch.
        positions: tokens and padding of the whole global batch, which is what a step computes.
        micro_steps: how many of the step's micro-batches hold a token on some rank; the others, which interleaved
            pipelines ask for, are empty packs everywhere.
    """

    micro_batches: list[MicroBatch]
    seq_length: int
    loss_tokens: int
    tokens: int
    positions: int
    micro_steps: int


class BatchOrder:
    """The order of samples: every epoch is its own permutation, drawn from ``(seed, epoch)``.

    Position ``p`` of the run is sample ``p % n`` of epoch ``p // n``, so a run resumes from the number of samples it
    has consumed, and nothing else needs to be saved.
    """

    def __init__(self, num_samples: int, *, seed: int, shuffle: bool = True) -> None:
        self.num_samples, self.seed, self.shuffle = num_samples, seed, shuffle
        self._epoch = -1
        self._permutation = np.arange(num_samples)

    def __getitem__(self, position: int) -> int:
        epoch, offset = divmod(position, self.num_samples)
        if self.shuffle and epoch != self._epoch:
            self._epoch = epoch
            self._permutation = np.random.default_rng([self.seed, epoch]).permutation(self.num_samples)
        return int(self._permutation[offset])


@dataclass(frozen=True)
class BatchLayout:
    """Where a rank stands, and what its tensors must be multiples of.

    Attributes:
        data_parallel_rank, data_parallel_size: which samples are this rank's.
        context_parallel_rank, context_parallel_size: which part of each sequence.
        length_multiple: S is a multiple of it: what tensor, sequence and context parallelism and FP8 need.
        micro_batch_multiple: the number of micro-batches is a multiple of it: what interleaved pipelines need.
    """

    data_parallel_rank: int = 0
    data_parallel_size: int = 1
    context_parallel_rank: int = 0
    context_parallel_size: int = 1
    length_multiple: int = 8
    micro_batch_multiple: int = 1


class BatchBuilder:
    """Cuts samples into the micro-batches of one rank: one sample a row, all rows of one length."""

    def __init__(
        self,
        samples: Sequence[Sample],
        *,
        micro_batch_size: int,
        global_batch_size: int,
        layout: BatchLayout,
        device: torch.device,
    ) -> None:
        """Args:
        samples: all samples, the same on every rank.
        micro_batch_size, global_batch_size: samples.
        layout: this rank's place.
        device: where the tensors go.

        Raises:
            ValueError: ``global_batch_size`` is not a multiple of what one micro-step holds.
        """
        self.samples, self.layout, self.device = samples, layout, device
        self.micro_batch_size, self.global_batch_size = micro_batch_size, global_batch_size
        self._check_sizes()

    def _check_sizes(self) -> None:
        step = self.micro_batch_size * self.layout.data_parallel_size * self.layout.micro_batch_multiple
        if self.global_batch_size % step:
            raise ValueError(f"global batch {self.global_batch_size} is not a multiple of {step}")

    def build(self, chosen: Sequence[int | None]) -> GlobalBatch:
        """The batch of these sample indices (``global_batch_size`` of them); ``None`` is an empty row, all padding.

        Sample ``i`` of the global batch goes to the same micro-step whatever the data-parallel size, as in Megatron-LM.
        """
        return self.build_samples([None if i is None else self.samples[i] for i in chosen])

    def build_samples(self, picked: Sequence[Sample | None]) -> GlobalBatch:
        """The batch of these samples (``global_batch_size`` of them, one at least), which need not be the builder's."""
        present = [sample for sample in picked if sample is not None]
        seq_length = _round_up(max(sample.num_inputs for sample in present), self.layout.length_multiple)
        stride = self.micro_batch_size * self.layout.data_parallel_size
        begin = self.layout.data_parallel_rank * self.micro_batch_size
        starts, extras = range(begin, len(picked), stride), _extras(present)
        return GlobalBatch(
            micro_batches=[
                self._rows(picked[start : start + self.micro_batch_size], seq_length, extras) for start in starts
            ],
            seq_length=seq_length,
            loss_tokens=sum(sample.num_loss_tokens for sample in present),
            tokens=sum(sample.num_inputs for sample in present),
            positions=len(picked) * seq_length,
            micro_steps=sum(any(s is not None for s in picked[i : i + stride]) for i in range(0, len(picked), stride)),
        )

    def _rows(self, rows: Sequence[Sample | None], seq_length: int, extras: _Extras) -> MicroBatch:
        streams = [_stream([row], [seq_length], extras) for row in rows]
        whole = {name: np.stack([stream[name] for stream in streams]) for name in streams[0]}
        return MicroBatch(**self._mine(whole, torch.tensor([0, seq_length])))

    def _mine(self, arrays: Mapping[str, Array], boundaries: Tensor) -> dict[str, Any]:
        """This rank's part of arrays ``[B, S, ...]`` whose rows are the sequences between ``boundaries``."""
        size, rank = self.layout.context_parallel_size, self.layout.context_parallel_rank
        indices = thd_partition_indices(boundaries, arrays["tokens"].shape[1], size, rank)
        return {
            name: torch.from_numpy(array).index_select(1, indices).to(self.device) for name, array in arrays.items()
        }


class PackedBatchBuilder(BatchBuilder):
    """Packs the samples of a step, however many there are, into rows of at most ``pack_length`` tokens.

    A micro-batch is one pack. Every sequence in it is padded to what context parallelism needs. The padding behind the
    last one is cut into sequences no longer than the longest, so that attention over it costs little.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        *,
        pack_length: int,
        global_batch_size: int,
        layout: BatchLayout,
        device: torch.device,
    ) -> None:
        """Args:
        samples: all samples, the same on every rank; none longer than a pack.
        pack_length: the most tokens in one pack, padding of its sequences included.
        global_batch_size: samples.
        layout: this rank's place.
        device: where the tensors go.
        """
        super().__init__(samples, micro_batch_size=1, global_batch_size=global_batch_size, layout=layout, device=device)
        self.pack_length = pack_length

    def _check_sizes(self) -> None:
        """Nothing: any number of samples can be packed."""

    def build_samples(self, picked: Sequence[Sample | None]) -> GlobalBatch:
        """The batch of these samples, however many; ``None`` is no sample."""
        layout, size = self.layout, self.layout.data_parallel_size
        present = [sample for sample in picked if sample is not None]
        multiple = 2 * layout.context_parallel_size if layout.context_parallel_size > 1 else 1
        lengths = [_round_up(sample.num_inputs, multiple) for sample in present]
        packs = pack_conversations(lengths, capacity=self.pack_length, multiple=size * layout.micro_batch_multiple)
        longest_pack = max(sum(lengths[i] for i in pack) for pack in packs)
        seq_length = _round_up(longest_pack, layout.length_multiple)
        mine, extras = packs[layout.data_parallel_rank :: size], _extras(present)
        return GlobalBatch(
            micro_batches=[
                self._pack([present[i] for i in pack], [lengths[i] for i in pack], seq_length, max(lengths), extras)
                for pack in mine
            ],
            seq_length=seq_length,
            loss_tokens=sum(sample.num_loss_tokens for sample in present),
            tokens=sum(sample.num_inputs for sample in present),
            positions=len(packs) * seq_length,
            micro_steps=sum(any(packs[i : i + size]) for i in range(0, len(packs), size)),
        )

    def _pack(
        self, samples: list[Sample], lengths: list[int], seq_length: int, longest: int, extras: _Extras
    ) -> MicroBatch:
        rest = seq_length - sum(lengths)
        tail = [min(longest, rest - start) for start in range(0, rest, longest)]
        every = [*lengths, *tail]
        stream = _stream([*samples, *[None] * len(tail)], every, extras)
        boundaries = torch.tensor([0, *accumulate(every)], dtype=torch.int32)
        return MicroBatch(
            **self._mine({name: array[None] for name, array in stream.items()}, boundaries),
            cu_seqlens=boundaries.to(self.device),
            max_seqlen=max(every),
        )


@dataclass(frozen=True)
class _Extras:
    """What the micro-batches of a step hold beside its tokens, which empty ones must hold too.

    Attributes:
        logprobs: whether the samples have log-probabilities.
        routing: ``[L, K]`` of their routing; None where they have none.
    """

    logprobs: bool
    routing: tuple[int, int] | None


def _extras(samples: Sequence[Sample]) -> _Extras:
    first = samples[0]
    shape = None if first.routing is None else (first.routing.shape[1], first.routing.shape[2])
    return _Extras(logprobs=first.logprobs is not None, routing=shape)


def _stream(rows: Sequence[Sample | None], lengths: Sequence[int], extras: _Extras) -> dict[str, Array]:
    """Samples one behind the other, each with padding up to its length: the tensors of a micro-batch, ``[S, ...]``."""
    total = sum(lengths)
    stream: dict[str, Array] = {
        "tokens": np.zeros(total, dtype=np.int64),
        "labels": np.zeros(total, dtype=np.int64),
        "position_ids": np.concatenate([np.arange(length) for length in lengths]),
        "loss_mask": np.zeros(total, dtype=np.float32),
        "padding_mask": np.ones(total, dtype=np.bool_),
    }
    if extras.logprobs:
        stream["old_logprobs"] = np.zeros(total, dtype=np.float32)
    if extras.routing is not None:
        num_layers, topk = extras.routing
        stream["routing"] = np.tile(np.arange(topk, dtype=np.int16), (total, num_layers, 1))
    start = 0
    for sample, length in zip(rows, lengths, strict=True):
        if sample is not None:
            span = slice(start, start + sample.num_inputs)
            stream["tokens"][span], stream["labels"][span] = sample.tokens[:-1], sample.tokens[1:]
            stream["loss_mask"][span], stream["padding_mask"][span] = sample.is_response[1:], False
            if sample.logprobs is not None and extras.logprobs:
                stream["old_logprobs"][span] = sample.logprobs[1:]
            if sample.routing is not None and extras.routing is not None:
                stream["routing"][span] = sample.routing
        start += length
    return stream


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def training_batches(builder: BatchBuilder, *, seed: int, consumed_samples: int) -> Iterator[GlobalBatch]:
    """Global batches without end, from the first sample that was not consumed yet."""
    order = BatchOrder(len(builder.samples), seed=seed)
    position = consumed_samples
    while True:
        yield builder.build([order[position + i] for i in range(builder.global_batch_size)])
        position += builder.global_batch_size


def evaluation_batches(builder: BatchBuilder, *, num_samples: int | None = None) -> Iterator[GlobalBatch]:
    """The first ``num_samples`` samples (default all) once, in file order; the last batch is filled with empty rows."""
    count = len(builder.samples) if num_samples is None else min(num_samples, len(builder.samples))
    for start in range(0, count, builder.global_batch_size):
        stop = start + builder.global_batch_size
        yield builder.build([i if i < count else None for i in range(start, stop)])
