"""Packs: what shares one, the tensors of one, and the parts that data- and context-parallel ranks get."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megatron_zeda.data import (
    BatchBuilder,
    BatchLayout,
    GlobalBatch,
    MicroBatch,
    PackedBatchBuilder,
    Sample,
    evaluation_batches,
)
from megatron_zeda.data.packing import pack_conversations
from megatron_zeda.distillation import Objective

CPU = torch.device("cpu")
KEYS = ("tokens", "labels", "position_ids", "loss_mask", "padding_mask")


def make_samples(lengths: list[int], seed: int = 0) -> list[Sample]:
    """Samples the model reads ``length`` tokens of; every token is one of its own, the last half is response."""
    generator = np.random.default_rng(seed)
    tokens = generator.permutation(sum(lengths) + len(lengths)) + 1
    samples, start = [], 0
    for index, length in enumerate(lengths):
        ids = tokens[start : start + length + 1].astype(np.int32)
        samples.append(Sample(ids, np.arange(length + 1) > length // 2, where=f"f:{index + 1}"))
        start += length + 1
    return samples


def packed(samples: list[Sample], *, pack_length: int = 32, **layout: int) -> GlobalBatch:
    builder = PackedBatchBuilder(
        samples, pack_length=pack_length, global_batch_size=len(samples), layout=BatchLayout(**layout), device=CPU
    )
    return builder.build(list(range(len(samples))))


# ---- what shares a pack ----------------------------------------------------------------------------------------------


def test_a_distribution_worked_by_hand() -> None:
    # First-fit decreasing: 7+3, 6+4, 5; three packs. Evenly: 7 | 6 | 5+4, then 3 to the 6.
    assert pack_conversations([3, 7, 4, 6, 5], capacity=10, multiple=1) == [[1], [3, 0], [4, 2]]
    # Evenly into two: 6+4 and 5+5.
    assert pack_conversations([6, 5, 5, 4], capacity=10, multiple=1) == [[0, 3], [1, 2]]
    # Evenly would be 4+3+3 and 4+3 in two packs of 9: too much, so that first-fit's 4+4 and 3+3+3 stays.
    assert pack_conversations([4, 4, 3, 3, 3], capacity=9, multiple=1) == [[0, 1], [2, 3, 4]]
    # A multiple of four: one conversation a rank, one rank without.
    assert pack_conversations([3, 2, 1], capacity=10, multiple=4) == [[0], [1], [2], []]


@pytest.mark.parametrize("multiple", [1, 2, 8])
def test_every_conversation_is_in_one_pack(multiple: int) -> None:
    numbers = random.Random(0)
    for _ in range(50):
        lengths = [numbers.randrange(1, 101) for _ in range(numbers.randrange(1, 40))]
        packs = pack_conversations(lengths, capacity=128, multiple=multiple)
        assert sorted(index for pack in packs for index in pack) == list(range(len(lengths)))
        loads = [sum(lengths[index] for index in pack) for pack in packs]
        assert max(loads) <= 128 and len(packs) % multiple == 0
        # First-fit leaves at most one pack half empty, so that their number is bounded (plus rounding).
        assert len(packs) <= 2 * -(-sum(lengths) // 128) + multiple
        assert packs == pack_conversations(list(lengths), capacity=128, multiple=multiple)


def test_a_conversation_that_fits_no_pack_is_a_programming_error() -> None:
    with pytest.raises(ValueError, match="a conversation of 11 tokens does not fit a pack of 10"):
        pack_conversations([3, 11], capacity=10, multiple=1)


# ---- the tensors of a pack -------------------------------------------------------------------------------------------


def test_tensors_of_a_hand_worked_pack() -> None:
    samples = [
        Sample(np.array([1, 2, 3]), np.array([False, True, True]), "f:1"),
        Sample(np.array([5, 6, 7, 8]), np.array([False, False, True, True]), "f:2"),
    ]
    batch = packed(samples)
    [micro] = batch.micro_batches
    assert micro.tokens.tolist() == [[5, 6, 7, 1, 2, 0, 0, 0]]
    assert micro.labels.tolist() == [[6, 7, 8, 2, 3, 0, 0, 0]]
    assert micro.loss_mask.tolist() == [[0, 1, 1, 1, 1, 0, 0, 0]]
    assert micro.padding_mask.int().tolist() == [[0, 0, 0, 0, 0, 1, 1, 1]]
    assert micro.position_ids.tolist() == [[0, 1, 2, 0, 1, 0, 1, 2]]
    assert micro.cu_seqlens is not None and micro.cu_seqlens.tolist() == [0, 3, 5, 8]
    assert (batch.seq_length, batch.loss_tokens, batch.tokens, batch.positions) == (8, 4, 5, 8)
    params = micro.model_inputs()["packed_seq_params"]
    assert params.qkv_format == "thd" and params.max_seqlen_q == params.max_seqlen_kv == 3
    assert type(params.max_seqlen_q) is int and params.cu_seqlens_q.dtype == torch.int32
    assert params.cu_seqlens_q_padded is params.cu_seqlens_q  # how Transformer Engine knows that nothing lies between


def test_the_padding_behind_the_last_sequence_is_short_sequences() -> None:
    """A pack may be all padding; attention over it as one sequence would cost more than all conversations."""
    batch = packed(make_samples([16, 3]), pack_length=16, data_parallel_size=2)
    other = packed(make_samples([16, 3]), pack_length=16, data_parallel_size=2, data_parallel_rank=1)
    assert [batch.micro_batches[0].cu_seqlens.tolist(), other.micro_batches[0].cu_seqlens.tolist()] == [  # type: ignore[union-attr]
        [0, 16],
        [0, 3, 16],
    ]
    empty = packed(make_samples([3, 3]), data_parallel_size=4, data_parallel_rank=3)
    [micro] = empty.micro_batches
    assert micro.cu_seqlens is not None and micro.cu_seqlens.tolist() == [0, 3, 6, 8]
    assert micro.padding_mask.all() and not micro.loss_mask.any()


@pytest.mark.parametrize(("lengths", "size", "groups", "micro_steps"), [([5], 2, 2, 1), ([5, 4, 3], 2, 2, 2)])
def test_micro_steps_that_are_empty_everywhere_are_not_counted(
    lengths: list[int], size: int, groups: int, micro_steps: int
) -> None:
    """Two micro-batches a rank, because pipelines ask for them; of one conversation the second is empty on all."""
    for rank in range(size):
        batch = packed(
            make_samples(lengths), data_parallel_size=size, data_parallel_rank=rank, micro_batch_multiple=groups
        )
        assert (len(batch.micro_batches), batch.micro_steps) == (groups, micro_steps)


def test_a_step_scales_the_balancing_loss_by_the_micro_steps_that_have_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_zeda.training import step

    given: list[float] = []

    def stop() -> None:
        raise InterruptedError

    monkeypatch.setattr(step, "set_loss_tokens", given.append)
    monkeypatch.setattr(step, "get_forward_backward_func", stop)
    batch = packed(make_samples([6]), micro_batch_multiple=2)
    with pytest.raises(InterruptedError):
        step.train_step([], SimpleNamespace(zero_grad=lambda: None), None, batch, objective=Objective(), stop=False)
    assert given == [batch.loss_tokens] == [3.0]


def conversations(batch: GlobalBatch) -> list[tuple[int, ...]]:
    """The real tokens between the boundaries of each pack."""
    found = []
    for micro in batch.micro_batches:
        assert micro.cu_seqlens is not None
        for start, end in zip(micro.cu_seqlens[:-1].tolist(), micro.cu_seqlens[1:].tolist(), strict=True):
            real = ~micro.padding_mask[0, start:end]
            assert real.tolist() == sorted(real.tolist(), reverse=True)  # padding is at the end
            if real.any():
                found.append(tuple(micro.tokens[0, start:end][real].tolist()))
    return found


@pytest.mark.parametrize("size", [1, 2, 4])
def test_data_parallel_ranks_share_the_packs_of_a_global_batch(size: int) -> None:
    samples = make_samples([5, 17, 9, 30, 2, 2, 11, 20, 26])
    ranks = [packed(samples, data_parallel_size=size, data_parallel_rank=rank) for rank in range(size)]
    assert len({(b.seq_length, b.loss_tokens, b.tokens, b.positions, len(b.micro_batches)) for b in ranks}) == 1
    assert sorted(c for batch in ranks for c in conversations(batch)) == sorted(
        tuple(sample.tokens[:-1].tolist()) for sample in samples
    )
    assert ranks[0].tokens == sum(sample.num_inputs for sample in samples)
    assert ranks[0].positions == size * len(ranks[0].micro_batches) * ranks[0].seq_length


def test_interleaved_pipelines_get_micro_batches_in_groups() -> None:
    samples = make_samples([30, 30, 30])
    assert len(packed(samples).micro_batches) == 3
    assert len(packed(samples, micro_batch_multiple=2).micro_batches) == 4


# ---- context parallelism ---------------------------------------------------------------------------------------------


def chunks_of(sequence: torch.Tensor, size: int, rank: int) -> torch.Tensor:
    """Chunks ``rank`` and ``2 size - 1 - rank`` of a sequence, written down from Megatron-Core's description."""
    chunks = sequence.chunk(2 * size)
    return torch.cat([chunks[rank], chunks[2 * size - 1 - rank]])


@pytest.mark.parametrize("size", [2, 4])
def test_context_parallel_ranks_hold_two_chunks_of_every_sequence(size: int) -> None:
    samples = make_samples([5, 17, 9, 30, 2])
    aligned = {"length_multiple": 8 * size, "context_parallel_size": size}
    for rank in range(size):
        mine = packed(samples, context_parallel_rank=rank, **aligned).micro_batches
        for micro in mine:
            assert micro.cu_seqlens is not None and micro.tokens.shape[1] * size == micro.cu_seqlens[-1]
            assert all((micro.cu_seqlens[1:] - micro.cu_seqlens[:-1]) % (2 * size) == 0)
    parts = [packed(samples, context_parallel_rank=rank, **aligned).micro_batches for rank in range(size)]
    for number in range(len(parts[0])):
        every = [part[number] for part in parts]
        whole = reassemble(every, size)
        for rank, micro in enumerate(every):
            for key in KEYS:
                spans = [chunks_of(sequence, size, rank) for sequence in whole[key]]
                assert getattr(micro, key)[0].equal(torch.cat(spans)), key
    # Nothing is lost: all ranks together hold the conversations.
    held = sorted(int(t) for part in parts for micro in part for t in micro.tokens[~micro.padding_mask])
    assert held == sorted(int(t) for sample in samples for t in sample.tokens[:-1])


def reassemble(parts: list[MicroBatch], size: int) -> dict[str, list[torch.Tensor]]:
    """The sequences of a pack, from position ids and boundaries alone: positions rise from 0 in each."""
    cu_seqlens = parts[0].cu_seqlens
    assert cu_seqlens is not None
    whole: dict[str, list[torch.Tensor]] = {key: [] for key in KEYS}
    for start, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        local = slice(start // size, end // size)
        order = torch.cat([part.position_ids[0, local] for part in parts]).argsort()
        for key in KEYS:
            whole[key].append(torch.cat([getattr(part, key)[0, local] for part in parts])[order])
        assert whole["position_ids"][-1].tolist() == list(range(end - start))
    return whole


def test_padded_rows_are_split_in_the_same_way() -> None:
    samples = make_samples([13, 7])
    builders = [
        BatchBuilder(
            samples,
            micro_batch_size=2,
            global_batch_size=2,
            layout=BatchLayout(**layout, length_multiple=16),
            device=CPU,
        )
        for layout in ({}, *({"context_parallel_size": 2, "context_parallel_rank": rank} for rank in range(2)))
    ]
    whole, first, second = (builder.build([0, 1]) for builder in builders)
    assert whole.seq_length == first.seq_length == second.seq_length == 16
    for rank, part in enumerate((first, second)):
        for key in KEYS:
            rows = getattr(whole.micro_batches[0], key)
            expected = torch.stack([chunks_of(row, 2, rank) for row in rows])
            assert getattr(part.micro_batches[0], key).equal(expected), key
        assert part.micro_batches[0].model_inputs()["packed_seq_params"] is None


def test_evaluation_packs_every_sample_once() -> None:
    samples = make_samples([5, 17, 9, 30, 2])
    builder = PackedBatchBuilder(samples, pack_length=32, global_batch_size=2, layout=BatchLayout(), device=CPU)
    batches = list(evaluation_batches(builder))
    assert [len(conversations(batch)) for batch in batches] == [2, 2, 1]
    assert sum(batch.tokens for batch in batches) == 63
