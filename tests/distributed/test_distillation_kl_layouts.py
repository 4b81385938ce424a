"""Both losses with the vocabulary split over 2 and 4 gloo ranks, uneven and all-padding shards included."""

import pytest
import torch
import torch.distributed as dist
from distillation_oracle import MIXTURES, Case, expected_gradients
from spawn import run_distributed
from torch import Tensor

from megatron_zeda.distillation import SUM_NAMES, linear_objective, vocab_parallel_kl

pytestmark = pytest.mark.distributed


class Shard:
    """This rank's columns of a vocabulary, filled up with padding that would dominate everything if it were read."""

    def __init__(self, group: dist.ProcessGroup, vocabulary: int, size: int) -> None:
        self.group, self.size = group, size
        self.start = min(dist.get_rank(group) * size, vocabulary)
        self.num_valid = min(size, vocabulary - self.start)

    def of(self, full: Tensor, dim: int) -> Tensor:
        mine = full.narrow(dim, self.start, self.num_valid)
        shape = list(full.shape)
        shape[dim] = self.size - self.num_valid
        return torch.cat([mine, full.new_full(shape, 40.0)], dim)

    def assert_same_everywhere(self, value: Tensor) -> None:
        others = [torch.empty_like(value) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(others, value.detach(), group=self.group)
        assert all(torch.equal(other, value) for other in others)


def check_given_logits(shard: Shard, vocabulary: int) -> None:
    torch.manual_seed(0)
    student = torch.randn(6, vocabulary) * 3
    teacher = student + torch.randn(6, vocabulary)
    weight = torch.randn(6, dtype=torch.float64)
    for reverse in (False, True):
        for temperature, chunk_size in ((1.0, None), (0.5, 4)):
            full = student.double().requires_grad_()
            log_s = torch.log_softmax(full / temperature, -1)
            log_t = torch.log_softmax(teacher.double() / temperature, -1)
            p, q = (log_s, log_t) if reverse else (log_t, log_s)
            wanted = (p.exp() * (p - q)).sum(-1)
            (wanted * weight).sum().backward()

            local = shard.of(student, 1).requires_grad_()
            kl = vocab_parallel_kl(
                local,
                shard.of(teacher, 1),
                reverse=reverse,
                temperature=temperature,
                group=shard.group,
                chunk_size=chunk_size,
                num_valid=shard.num_valid,
            )
            torch.testing.assert_close(kl.double(), wanted.detach(), rtol=1e-5, atol=2e-6)
            (kl * weight).sum().backward()
            assert full.grad is not None and local.grad is not None
            valid = slice(shard.start, shard.start + shard.num_valid)
            torch.testing.assert_close(
                local.grad[:, : shard.num_valid].double(), full.grad[:, valid], rtol=1e-4, atol=2e-6
            )
            assert not local.grad[:, shard.num_valid :].any()
            shard.assert_same_everywhere(kl)


def check_from_hidden_states(shard: Shard, vocabulary: int) -> None:
    case = Case(seed=5, columns=vocabulary)
    for weight in (case.weight, case.teacher[1]):
        weight[3] = weight[
            vocabulary - 1
        ]  # two ranks compete for a place among the top k; whoever gets it, KL is equal
    for name, objective in MIXTURES.items():
        old = case.old if "sampled" in name or name == "all" else None
        wanted, wanted_sums, hidden_grad, weight_grad = expected_gradients(case, objective, old, 0.5)
        hidden = case.hidden.clone().requires_grad_()
        weight = shard.of(case.weight, 0).requires_grad_()
        loss, sums = linear_objective(
            hidden,
            weight,
            case.labels,
            objective=objective,
            teacher=(case.teacher[0], shard.of(case.teacher[1], 0)),
            group=shard.group,
            num_valid=shard.num_valid,
            old_logprobs_N=old,
        )
        (loss * 0.5).backward()
        assert hidden.grad is not None and weight.grad is not None
        dist.all_reduce(hidden.grad, group=shard.group)  # as the backward pass of the sequence-parallel gather does
        assert dict(zip(SUM_NAMES, sums.tolist(), strict=True)) == pytest.approx(wanted_sums, rel=1e-5, abs=2e-5), name
        torch.testing.assert_close(loss.double(), wanted, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(hidden.grad.double(), hidden_grad, rtol=1e-4, atol=1e-5)
        if objective.estimator != "topk":  # there the oracle may have chosen the other one
            valid = slice(shard.start, shard.start + shard.num_valid)
            torch.testing.assert_close(
                weight.grad[: shard.num_valid].double(), weight_grad[valid], rtol=1e-4, atol=1e-5
            )
        assert not weight.grad[shard.num_valid :].any()
        shard.assert_same_everywhere(sums)


def check_all(rank: int, world_size: int) -> None:
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    for group, cases in (
        (pairs[rank // 2], [(38, 19), (27, 16)]),
        (dist.group.WORLD, [(32, 8), (29, 8), (16, 8)]),  # of the last, two shards are all padding
    ):
        for vocabulary, size in cases:
            shard = Shard(group, vocabulary, size)
            check_given_logits(shard, vocabulary)
            check_from_hidden_states(shard, vocabulary)


def test_split_vocabulary_equals_float64() -> None:
    run_distributed(check_all, 4)
