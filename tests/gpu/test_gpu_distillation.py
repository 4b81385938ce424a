"""The losses on one GPU: against float64, and their memory and time at the vocabulary of Qwen3."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from distillation_oracle import MIXTURES, Case, expected_gradients
from torch import Tensor

from megatron_zeda import platform
from megatron_zeda.distillation import SUM_NAMES, Objective, linear_objective, vocab_parallel_kl

VOCABULARY, WIDTH, TOKENS = 151_936, 2048, 8192


def relative(actual: Tensor, wanted: Tensor) -> float:
    return float((actual.double().cpu() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_objective_equals_float64(name: str, dtype: torch.dtype, record: Callable[..., None]) -> None:
    """In bf16 the logits are rounded, so what is compared there is coarse."""
    device = platform.device()
    case = Case(dtype, seed=3, hidden=64, columns=128)
    wanted, wanted_sums, hidden_grad, weight_grad = expected_gradients(case, MIXTURES[name], case.old, 0.5)
    hidden, weight = (tensor.to(device).requires_grad_() for tensor in (case.hidden, case.weight))
    loss, sums = linear_objective(
        hidden,
        weight,
        case.labels.to(device),
        objective=replace(MIXTURES[name], chunk_size=4),
        teacher=(case.teacher[0].to(device), case.teacher[1].to(device)),
        group=None,
        old_logprobs_N=case.old.to(device),
    )
    (loss * 0.5).backward()
    assert hidden.grad is not None and weight.grad is not None
    found = {
        "loss": abs(loss.item() / wanted.item() - 1),
        "hidden gradient": relative(hidden.grad, hidden_grad),
        "weight gradient": relative(weight.grad, weight_grad),
    }
    record(**found)
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    assert max(found.values()) < tolerance, found
    if dtype == torch.float32:
        assert dict(zip(SUM_NAMES, sums.tolist(), strict=True)) == pytest.approx(wanted_sums, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("reverse", [False, True])
def test_divergence_of_given_logits_equals_float64(reverse: bool, record: Callable[..., None]) -> None:
    device = platform.device()
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(16, 1000, generator=generator).mul(4).bfloat16() for _ in range(2))
    exact = student.double().requires_grad_()
    log_s, log_t = torch.log_softmax(exact, -1), torch.log_softmax(teacher.double(), -1)
    p, q = (log_s, log_t) if reverse else (log_t, log_s)
    wanted = (p.exp() * (p - q)).sum(-1)
    wanted.sum().backward()
    logits = student.to(device).requires_grad_()
    kl = vocab_parallel_kl(logits, teacher.to(device), reverse=reverse, chunk_size=5)
    kl.sum().backward()
    assert logits.grad is not None and exact.grad is not None
    found = {"values": relative(kl.detach(), wanted.detach()), "gradient": relative(logits.grad, exact.grad)}
    record(**found)
    assert found["values"] < 1e-5 and found["gradient"] < 5e-3


@pytest.mark.hardware
@pytest.mark.parametrize("chunk_size", [128, 512, 2048, None])
def test_memory_and_time_at_full_size(chunk_size: int | None, record: Callable[..., None]) -> None:
    """Three fp32 buffers of one chunk, the weight's gradient in fp32 and a product of its size in bf16."""
    torch.manual_seed(0)
    hidden = torch.randn(TOKENS, WIDTH, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(VOCABULARY, WIDTH, device="cuda", dtype=torch.bfloat16).mul_(0.05).requires_grad_()
    teacher = (hidden.detach() * 0.9, weight.detach().clone())
    labels = torch.randint(VOCABULARY, (TOKENS,), device="cuda")
    objective = Objective(cross_entropy=0.0, reverse_kl=1.0, chunk_size=chunk_size)

    def step() -> None:
        hidden.grad = weight.grad = None
        loss, _ = linear_objective(hidden, weight, labels, objective=objective, teacher=teacher, group=None)
        loss.backward()
        torch.cuda.synchronize()

    step()
    hidden.grad = weight.grad = None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    begin = time.perf_counter()
    step()
    seconds, peak = time.perf_counter() - begin, torch.cuda.max_memory_allocated() - before
    chunk = (chunk_size or WIDTH // 4) * VOCABULARY * 4
    record(seconds=seconds, peak_gib=peak / 2**30, logits_gib=TOKENS * VOCABULARY * 4 / 2**30)
    assert peak <= 3.6 * chunk + weight.numel() * 8 + 2 * hidden.numel() * 4


@pytest.mark.hardware
def test_products_with_results_in_fp32(record: Callable[..., None]) -> None:
    """Not used yet: whether torch's GEMM with fp32 results would spare the rounding of logits to bf16 and a copy."""
    torch.manual_seed(0)
    hidden = torch.randn(512, WIDTH, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(8192, WIDTH, device="cuda", dtype=torch.bfloat16)
    out = torch.empty(512, 8192, device="cuda")
    exact = hidden.double() @ weight.double().t()
    torch.mm(hidden, weight.t(), out_dtype=torch.float32, out=out)
    found = {"fp32": relative(out, exact.cpu()), "bf16": relative(hidden @ weight.t(), exact.cpu())}
    record(**found)
    assert found["fp32"] < 1e-5
