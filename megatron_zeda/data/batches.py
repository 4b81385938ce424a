"""Which samples a step sees, and the padded tensors a rank gets. A pure function of the seed and the step.

Every rank knows all samples, so the padded length and the number of loss tokens of the whole global batch are known
everywhere without communication.

Shapes: B micro-batch, S padded sequence.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_zeda.data.chat import Sample


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass of one data-parallel rank reads, all ``[B, S]`` on the training device.

    Attributes:
        tokens, labels, position_ids: int64; a label is the next token.
        loss_mask: float32, 1 where the label is a response token.
        padding_mask: bool, **True at padding** (Megatron-Core's sense).
    """

    tokens: Tensor
    labels: Tensor
    position_ids: Tensor
    loss_mask: Tensor
    padding_mask: Tensor


@dataclass(frozen=True)
class GlobalBatch:
    """One step: this rank's micro-batches, and what is true of the whole global batch.

    Attributes:
        micro_batches: this data-parallel rank's share, in order.
        seq_length: the one padded length all ranks and micro-batches of the step share.
        loss_tokens: response tokens predicted in the whole global batch.
        tokens: real tokens (prompt and response) in the whole global batch.
    """

    micro_batches: list[MicroBatch]
    seq_length: int
    loss_tokens: int
    tokens: int


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


class BatchBuilder:
    """Cuts samples into the micro-batches of one data-parallel rank."""

    def __init__(
        self,
        samples: Sequence[Sample],
        *,
        micro_batch_size: int,
        global_batch_size: int,
        data_parallel_rank: int,
        data_parallel_size: int,
        length_multiple: int,
        device: torch.device,
    ) -> None:
        """Args:
        samples: all samples, the same on every rank.
        micro_batch_size, global_batch_size: sequences; a multiple of micro-batch times data-parallel size.
        data_parallel_rank, data_parallel_size: this rank's place.
        length_multiple: padded lengths are multiples of it (what tensor and sequence parallelism need).
        device: where the tensors go.
        """
        self.samples = samples
        self.micro_batch_size, self.global_batch_size = micro_batch_size, global_batch_size
        self.rank, self.size = data_parallel_rank, data_parallel_size
        self.length_multiple, self.device = length_multiple, device
        per_micro_step = micro_batch_size * data_parallel_size
        if global_batch_size % per_micro_step:
            raise ValueError(f"global batch {global_batch_size} is not a multiple of {per_micro_step}")
        self.num_micro_batches = global_batch_size // per_micro_step

    def build(self, chosen: Sequence[int | None]) -> GlobalBatch:
        """The batch of these sample indices (``global_batch_size`` of them); ``None`` is an empty row, all padding.

        Sample ``i`` of the global batch goes to the same micro-step whatever the data-parallel size, as in Megatron-LM.
        """
        picked = [None if i is None else self.samples[i] for i in chosen]
        present = [sample for sample in picked if sample is not None]
        longest = max(sample.num_inputs for sample in present)
        seq_length = -(-longest // self.length_multiple) * self.length_multiple
        stride = self.micro_batch_size * self.size
        starts = [m * stride + self.rank * self.micro_batch_size for m in range(self.num_micro_batches)]
        return GlobalBatch(
            micro_batches=[self._collate(picked[s : s + self.micro_batch_size], seq_length) for s in starts],
            seq_length=seq_length,
            loss_tokens=sum(sample.num_loss_tokens for sample in present),
            tokens=sum(sample.num_inputs for sample in present),
        )

    def _collate(self, rows: Sequence[Sample | None], seq_length: int) -> MicroBatch:
        tokens = np.zeros((len(rows), seq_length), dtype=np.int64)
        labels, loss_mask = np.zeros_like(tokens), np.zeros(tokens.shape, dtype=np.float32)
        padding_mask = np.ones(tokens.shape, dtype=np.bool_)
        for row, sample in enumerate(rows):
            if sample is None:
                continue
            n = sample.num_inputs
            tokens[row, :n], labels[row, :n] = sample.tokens[:-1], sample.tokens[1:]
            loss_mask[row, :n], padding_mask[row, :n] = sample.is_response[1:], False
        position_ids = np.broadcast_to(np.arange(seq_length), tokens.shape).copy()
        arrays = (tokens, labels, position_ids, loss_mask, padding_mask)
        return MicroBatch(*(torch.from_numpy(array).to(self.device) for array in arrays))


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
