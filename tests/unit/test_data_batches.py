"""Order, sharding and padding of batches."""

from itertools import islice

import numpy as np
import pytest
import torch

from megatron_zeda.data import (
    BatchBuilder,
    BatchLayout,
    BatchOrder,
    GlobalBatch,
    Sample,
    evaluation_batches,
    training_batches,
)


def make_samples(lengths: list[int]) -> list[Sample]:
    """Sample i is ``length`` tokens of value i, the last half of them response."""
    return [
        Sample(np.full(n, i, dtype=np.int32), np.arange(n) >= n // 2, where=f"f:{i + 1}") for i, n in enumerate(lengths)
    ]


def make_builder(
    samples: list[Sample], *, rank: int = 0, size: int = 1, micro: int = 2, total: int = 4
) -> BatchBuilder:
    return BatchBuilder(
        samples,
        micro_batch_size=micro,
        global_batch_size=total,
        layout=BatchLayout(data_parallel_rank=rank, data_parallel_size=size),
        device=torch.device("cpu"),
    )


def identities(batch: GlobalBatch) -> list[list[int]]:
    """Which sample each row holds, per micro-batch (the samples are made of their own index)."""
    return [micro.tokens[:, 0].tolist() for micro in batch.micro_batches]


def test_tensors_of_a_hand_worked_batch() -> None:
    samples = [
        Sample(np.array([5, 6, 7, 8]), np.array([False, False, True, True]), "f:1"),
        Sample(np.array([1, 2, 3]), np.array([False, True, True]), "f:2"),
    ]
    batch = make_builder(samples, total=2).build([0, 1])
    [micro] = batch.micro_batches
    assert micro.tokens.tolist() == [[5, 6, 7, 0, 0, 0, 0, 0], [1, 2, 0, 0, 0, 0, 0, 0]]
    assert micro.labels.tolist() == [[6, 7, 8, 0, 0, 0, 0, 0], [2, 3, 0, 0, 0, 0, 0, 0]]
    assert micro.loss_mask.tolist() == [[0, 1, 1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0, 0, 0]]
    assert micro.padding_mask.int().tolist() == [[0, 0, 0, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1, 1, 1]]
    assert micro.position_ids.tolist() == [list(range(8))] * 2
    assert (batch.seq_length, batch.loss_tokens, batch.tokens) == (8, 4, 5)


def test_padded_length_is_shared_by_all_ranks() -> None:
    samples = make_samples([5, 5, 5, 18])
    batches = [make_builder(samples, rank=rank, size=2).build([0, 1, 2, 3]) for rank in range(2)]
    assert [batch.seq_length for batch in batches] == [24, 24]
    assert [batch.loss_tokens for batch in batches] == [3 + 3 + 3 + 9] * 2
    assert [identities(batch) for batch in batches] == [[[0, 1]], [[2, 3]]]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_data_parallel_ranks_cut_the_same_global_batch(size: int) -> None:
    samples = make_samples([6] * 20)
    ranks = [
        training_batches(make_builder(samples, rank=r, size=size, micro=1, total=8), seed=3, consumed_samples=0)
        for r in range(size)
    ]
    order = BatchOrder(20, seed=3)
    for step in range(4):
        shares = [identities(next(rank)) for rank in ranks]
        seen = [rows for micro in range(8 // size) for share in shares for rows in share[micro]]
        assert seen == [order[8 * step + i] for i in range(8)]


def test_every_epoch_is_another_permutation_of_all_samples() -> None:
    order = BatchOrder(10, seed=1)
    epochs = [[order[10 * epoch + i] for i in range(10)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert [order[i] for i in range(10)] == epochs[0]  # going back gives the same order
    assert [BatchOrder(10, seed=2)[i] for i in range(10)] != epochs[0]


@pytest.mark.parametrize("steps", [1, 3, 7])
def test_resuming_goes_on_where_it_was(steps: int) -> None:
    builder = make_builder(make_samples([6] * 10))
    whole = [identities(batch) for batch in islice(training_batches(builder, seed=5, consumed_samples=0), 12)]
    rest = [identities(b) for b in islice(training_batches(builder, seed=5, consumed_samples=4 * steps), 12 - steps)]
    assert rest == whole[steps:]


def test_evaluation_sees_every_sample_once_in_order() -> None:
    samples = make_samples([6] * 6)
    batches = list(evaluation_batches(make_builder(samples)))
    assert [identities(batch) for batch in batches] == [[[0, 1], [2, 3]], [[4, 5], [0, 0]]]
    assert batches[1].micro_batches[1].padding_mask.all() and not batches[1].micro_batches[1].loss_mask.any()
    assert sum(batch.loss_tokens for batch in batches) == sum(sample.num_loss_tokens for sample in samples)
    assert len(list(evaluation_batches(make_builder(samples), num_samples=4))) == 1


def test_an_impossible_batch_is_a_programming_error() -> None:
    with pytest.raises(ValueError, match="global batch 4 is not a multiple of 6"):
        make_builder(make_samples([6]), micro=3, size=2)
