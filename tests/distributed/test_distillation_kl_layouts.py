"""vocab_parallel_kl with the vocabulary split over 2 and 4 gloo ranks, uneven and all-padding shards included."""

import pytest
import torch
import torch.distributed as dist
from spawn import run_distributed

from megatron_zeda.distillation import vocab_parallel_kl

pytestmark = pytest.mark.distributed


def check(rank: int, world_size: int, vocabulary: int, shard: int) -> None:
    torch.manual_seed(0)
    student = torch.randn(6, vocabulary) * 3
    teacher = student + torch.randn(6, vocabulary)
    weight = torch.randn(6, dtype=torch.float64)
    start = min(rank * shard, vocabulary)
    num_valid = min(shard, vocabulary - start)

    def padded(full: torch.Tensor) -> torch.Tensor:
        out = torch.full((6, shard), 40.0)  # padding columns that would dominate everything if they were read
        out[:, :num_valid] = full[:, start : start + num_valid]
        return out

    for reverse in (False, True):
        for temperature, chunk_size in ((1.0, None), (0.5, 4)):
            full = student.double().requires_grad_()
            log_s = torch.log_softmax(full / temperature, -1)
            log_t = torch.log_softmax(teacher.double() / temperature, -1)
            p, q = (log_s, log_t) if reverse else (log_t, log_s)
            expected = (p.exp() * (p - q)).sum(-1)
            (expected * weight).sum().backward()

            local = padded(student).requires_grad_()
            kl = vocab_parallel_kl(
                local,
                padded(teacher),
                reverse=reverse,
                temperature=temperature,
                group=dist.group.WORLD,
                chunk_size=chunk_size,
                num_valid=num_valid,
            )
            torch.testing.assert_close(kl.double(), expected.detach(), rtol=1e-5, atol=2e-6)
            (kl * weight).sum().backward()
            assert full.grad is not None and local.grad is not None
            torch.testing.assert_close(
                local.grad[:, :num_valid].double(), full.grad[:, start : start + num_valid], rtol=1e-4, atol=2e-6
            )
            assert not local.grad[:, num_valid:].any()
            others = [torch.empty_like(kl) for _ in range(world_size)]
            dist.all_gather(others, kl.detach())
            assert all(torch.equal(other, kl) for other in others)


def check_all(rank: int, world_size: int, cases: list[tuple[int, int]]) -> None:
    for vocabulary, shard in cases:
        check(rank, world_size, vocabulary, shard)


@pytest.mark.parametrize(
    ("world_size", "cases"),
    [(2, [(32, 16), (27, 16)]), (4, [(32, 8), (29, 8), (16, 8)])],  # the last one: two shards are all padding
    ids=["tp2", "tp4"],
)
def test_split_vocabulary_equals_float64(world_size: int, cases: list[tuple[int, int]]) -> None:
    run_distributed(check_all, world_size, cases)
