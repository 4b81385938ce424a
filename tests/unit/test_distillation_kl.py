"""vocab_parallel_kl on one rank: values and gradients against float64 autograd through log_softmax."""

import math

import pytest
import torch
from torch import Tensor

from megatron_zeda.distillation import vocab_parallel_kl


def reference_kl(student: Tensor, teacher: Tensor, *, reverse: bool, temperature: float = 1.0) -> Tensor:
    """Float64 KL per token by the definition."""
    log_s = torch.log_softmax(student.double() / temperature, -1)
    log_t = torch.log_softmax(teacher.double() / temperature, -1)
    log_p, log_q = (log_s, log_t) if reverse else (log_t, log_s)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def make_logits(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(*shape, generator=generator) * 3
    teacher = student + torch.randn(*shape, generator=generator)
    return student.to(dtype), teacher.to(dtype)


def test_closed_form_on_three_tokens() -> None:
    student = torch.tensor([[0.0, 0.0, 0.0]])
    teacher = torch.log(torch.tensor([[0.5, 0.25, 0.25]]))
    forward = 0.5 * math.log(1.5) + 0.5 * math.log(0.75)
    backward = (math.log(2 / 3) + 2 * math.log(4 / 3)) / 3
    assert vocab_parallel_kl(student, teacher, reverse=False).item() == pytest.approx(forward, abs=1e-7)
    assert vocab_parallel_kl(student, teacher, reverse=True).item() == pytest.approx(backward, abs=1e-7)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
@pytest.mark.parametrize("chunk_size", [None, 1, 4, 100])
@pytest.mark.parametrize(("num_valid", "dtype"), [(None, torch.float32), (29, torch.float32), (29, torch.bfloat16)])
def test_values_and_gradients(
    reverse: bool, temperature: float, chunk_size: int | None, num_valid: int | None, dtype: torch.dtype
) -> None:
    student, teacher = make_logits(2, 5, 37, dtype=dtype)
    student[..., num_valid or 37 :] = 50.0  # padding columns would dominate everything if they were read
    weight = torch.randn(2, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    expected_input = student[..., :num_valid].double().requires_grad_()
    expected = reference_kl(expected_input, teacher[..., :num_valid], reverse=reverse, temperature=temperature)
    (expected * weight).sum().backward()

    student.requires_grad_()
    kl = vocab_parallel_kl(
        student, teacher, reverse=reverse, temperature=temperature, chunk_size=chunk_size, num_valid=num_valid
    )
    assert kl.dtype == torch.float32 and kl.shape == (2, 5)
    torch.testing.assert_close(kl.double(), expected.detach(), rtol=1e-5, atol=2e-6)
    (kl * weight).sum().backward()
    assert student.grad is not None and student.grad.dtype == dtype
    tolerance = {"rtol": 1e-4, "atol": 2e-6} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-4}
    torch.testing.assert_close(student.grad[..., :num_valid].double(), expected_input.grad, **tolerance)
    if num_valid is not None:
        assert student.grad[..., num_valid:].abs().max() == 0


def test_chunks_change_nothing() -> None:
    student, teacher = make_logits(7, 37)
    whole = vocab_parallel_kl(student, teacher, reverse=True)
    assert all(torch.equal(whole, vocab_parallel_kl(student, teacher, reverse=True, chunk_size=c)) for c in (1, 2, 5))


@pytest.mark.parametrize("reverse", [False, True])
def test_gradcheck_in_float64(reverse: bool) -> None:
    student, teacher = make_logits(3, 6, dtype=torch.float64)
    student.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda s: vocab_parallel_kl(s, teacher, reverse=reverse, temperature=0.7, chunk_size=2), (student,)
    )


def test_large_logits_and_near_equal_distributions_stay_exact() -> None:
    student, teacher = make_logits(4, 500)
    student, teacher = student * 30 + 1000, teacher * 30 - 1000
    torch.testing.assert_close(
        vocab_parallel_kl(student, teacher, reverse=True).double(),
        reference_kl(student, teacher, reverse=True),
        rtol=1e-5,
        atol=1e-3,
    )
    close = student + 1e-3 * torch.randn_like(student)
    assert vocab_parallel_kl(close, student, reverse=False).abs().max() < 1e-4
    assert vocab_parallel_kl(student, student + 3.0, reverse=False).abs().max() < 1e-4


def test_teacher_is_a_constant_and_no_tokens_is_fine() -> None:
    student, teacher = make_logits(3, 8)
    teacher.requires_grad_()
    vocab_parallel_kl(student.requires_grad_(), teacher, reverse=False).sum().backward()
    assert teacher.grad is None
    empty = torch.empty(0, 8, requires_grad=True)
    kl = vocab_parallel_kl(empty, empty.detach(), reverse=False)
    kl.sum().backward()
    assert kl.shape == (0,)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": 0.0}, "temperature"),
        ({"num_valid": 9}, "num_valid"),
        ({"num_valid": 0}, "num_valid is 0"),
        ({"chunk_size": 0}, "chunk_size"),
    ],
)
def test_refused_arguments(arguments: dict[str, float], message: str) -> None:
    logits = torch.zeros(2, 8)
    with pytest.raises(ValueError, match=message):
        vocab_parallel_kl(logits, logits, reverse=False, **arguments)
    with pytest.raises(ValueError, match="one shape"):
        vocab_parallel_kl(logits, logits[:, :4], reverse=False)
