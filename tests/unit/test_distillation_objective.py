"""linear_objective on one rank: loss, sums and gradients against float64 autograd over whole logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from distillation_oracle import MIXTURES, Case, H, N, V, expected_gradients
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from megatron_zeda.distillation import SUM_NAMES, Objective, combine_sums, linear_objective, vocab_parallel_kl


def run(
    case: Case, objective: Objective, old: Tensor | None = None, **changes: object
) -> tuple[Tensor, dict[str, float], Tensor, Tensor]:
    """A call that wants both gradients: loss, sums by name, hidden states and weight (to read their gradients)."""
    hidden, weight = case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_()
    arguments = {"objective": objective, "teacher": case.teacher, "group": None, "old_logprobs_N": old} | changes
    loss, sums = linear_objective(hidden, weight, case.labels, **arguments)
    return loss, dict(zip(SUM_NAMES, sums.tolist(), strict=True)), hidden, weight


def check(case: Case, objective: Objective, old: Tensor | None = None, *, scale: float = 0.25) -> None:
    wanted, wanted_sums, hidden_grad, weight_grad = expected_gradients(case, objective, old, scale)
    loss, sums, hidden, weight = run(case, objective, old)
    (loss * scale).backward()
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-5, atol=1e-5)
    assert sums == pytest.approx(wanted_sums, rel=1e-5, abs=2e-5)
    torch.testing.assert_close(hidden.grad.double(), hidden_grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weight.grad.double(), weight_grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("objective", MIXTURES.values(), ids=MIXTURES.keys())
def test_equals_float64(objective: Objective) -> None:
    for chunk_size in (None, 4):
        check(Case(), replace(objective, chunk_size=chunk_size))


@pytest.mark.parametrize("name", ["reverse", "topk", "sampled", "sampled and all", "all, tempered"])
def test_rollouts_of_other_weights(name: str) -> None:
    case = Case(seed=3)
    for cap in (None, 1.1):
        check(case, replace(MIXTURES[name], importance_cap=cap, chunk_size=4), case.old)


def test_caps_and_clipping_are_met() -> None:
    """The cases above would prove little if the rollout's probabilities were within the limits."""
    case = Case(seed=3)
    _, sums, _, _ = run(case, replace(MIXTURES["sampled"], importance_cap=1.1), case.old)
    assert 0 < sums["clipped"] < N and 0 < sums["capped"] < N


def test_float64_is_exact() -> None:
    case, objective = Case(torch.float64), MIXTURES["all, tempered"]
    wanted, _, hidden_grad, weight_grad = expected_gradients(case, objective, None, 1.0)
    loss, _, hidden, weight = run(case, objective)
    loss.backward()
    torch.testing.assert_close(loss, wanted, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(hidden.grad, hidden_grad, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(weight.grad, weight_grad, rtol=1e-11, atol=1e-13)


def test_the_sampled_gradient_is_the_exact_one_in_expectation() -> None:
    """All labels of one state, each weighted with its probability by the ratio, add up to the exact gradient."""
    case = Case(torch.float64)
    state, reference = case.hidden[:1], (case.teacher[0][:1], case.teacher[1])
    exact = state.clone().requires_grad_()
    reverse = replace(MIXTURES["reverse"], reverse_kl=1.0)
    any_label = torch.zeros(1, dtype=torch.long)
    loss, _ = linear_objective(exact, case.weight, any_label, objective=reverse, teacher=reference, group=None)
    loss.backward()

    sampled = Objective(
        cross_entropy=0.0, reverse_kl=1.0, estimator="sampled", clip_ratio_low=0.9999999, clip_ratio_high=9.0
    )
    copies = state.expand(V, -1).clone().requires_grad_()
    expected_loss, _ = linear_objective(
        copies,
        case.weight,
        torch.arange(V),
        objective=sampled,
        teacher=(reference[0].expand(V, -1), reference[1]),
        group=None,
        old_logprobs_N=torch.zeros(V, dtype=torch.float64),  # p_student / 1
    )
    expected_loss.backward()
    torch.testing.assert_close(expected_loss, loss, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(copies.grad.sum(0, keepdim=True), exact.grad, rtol=1e-4, atol=1e-6)


def test_topk_is_a_lower_bound_that_grows_to_the_exact_kl() -> None:
    case = Case()
    exact = run(case, MIXTURES["reverse"])[1]["kl_reverse"]
    found = [run(case, replace(MIXTURES["topk"], topk=k))[1]["kl_reverse"] for k in (1, 5, 20, V)]
    assert found == sorted(found) and found[0] < 0.9 * exact and found[-1] == pytest.approx(exact, rel=1e-5)


def test_padding_columns_are_not_read_and_get_no_gradient() -> None:
    case, padded = Case(), Case()
    padded.weight, padded.teacher = (
        torch.cat([case.weight, torch.full((3, H), 1e4)]),
        (case.teacher[0], torch.cat([case.teacher[1], torch.full((3, H), float("nan"))])),
    )
    loss, sums, hidden, weight = run(case, MIXTURES["topk and all, tempered"])
    loss.backward()
    padded_loss, padded_sums, padded_hidden, padded_weight = run(
        padded, MIXTURES["topk and all, tempered"], num_valid=V
    )
    padded_loss.backward()
    assert sums == padded_sums and padded_weight.grad[V:].abs().max() == 0
    torch.testing.assert_close(padded_hidden.grad, hidden.grad)
    torch.testing.assert_close(padded_weight.grad[:V], weight.grad)


def test_bf16_gradients_do_not_depend_on_the_chunks() -> None:
    """They add up in fp32 and are rounded once. Their distance from float64 is that of logits rounded to bf16."""
    case = Case(torch.bfloat16, hidden=64, columns=128)
    wanted, _, _, exact = expected_gradients(case, MIXTURES["all"], None, 1.0)
    repeats = 20
    case.hidden, case.labels = case.hidden.repeat(repeats, 1), case.labels.repeat(repeats)
    case.teacher = (case.teacher[0].repeat(repeats, 1), case.teacher[1])
    found = []
    for chunk_size in (None, 1):
        loss, _, hidden, weight = run(case, replace(MIXTURES["all"], chunk_size=chunk_size))
        loss.backward()
        assert hidden.grad.dtype == weight.grad.dtype == torch.bfloat16
        torch.testing.assert_close(loss.double(), wanted * repeats, rtol=1e-2, atol=0)
        found.append(weight.grad.double() / repeats)
    assert (found[0] - exact).norm() < 0.05 * exact.norm()
    assert (found[1] - found[0]).norm() < 4e-3 * exact.norm()  # added up in bf16 it would be 0.02


def test_equal_models_have_no_divergence_and_no_gradient() -> None:
    case = Case()
    case.teacher = (case.hidden, case.weight)
    for name in ("forward", "reverse", "topk", "sampled"):
        loss, _, hidden, _ = run(case, MIXTURES[name])
        loss.backward()
        assert abs(loss.item()) < 1e-5 and hidden.grad.abs().max() < 1e-6


def test_extreme_logits_stay_finite() -> None:
    case = Case()
    case.hidden, case.teacher = case.hidden * 100, (case.teacher[0] * -100, case.teacher[1])
    for objective in MIXTURES.values():
        loss, sums, hidden, weight = run(case, replace(objective, importance_cap=2.0), case.old - 200.0)
        loss.backward()
        assert all(torch.isfinite(tensor).all() for tensor in (loss, hidden.grad, weight.grad))
        assert all(abs(value) < float("inf") for value in sums.values())


@pytest.mark.parametrize("cross_entropy", [0.0, 0.5])
@pytest.mark.parametrize("temperature", [0.1, 10.0])
def test_wide_logits_at_other_temperatures(temperature: float, cross_entropy: float) -> None:
    """Probabilities that are 0 in fp32 at temperature 1 are not at 10."""
    case = Case()
    case.hidden, case.teacher = case.hidden * 25, (case.teacher[0] * 25, case.teacher[1])
    objective = Objective(cross_entropy=cross_entropy, forward_kl=0.7, reverse_kl=1.3, temperature=temperature)
    _, _, wanted_hidden, wanted_weight = expected_gradients(case, objective, None, 1.0)
    loss, _, hidden, weight = run(case, objective)
    loss.backward()
    for found, wanted in ((hidden.grad, wanted_hidden), (weight.grad, wanted_weight)):
        assert (found.double() - wanted).norm() < (2e-5 if temperature > 1 else 2e-4) * wanted.norm()


def test_a_cap_without_a_rollout_changes_nothing() -> None:
    for name in ("all", "sampled and all"):
        case, objective = Case(), MIXTURES[name]
        loss, sums, _, _ = run(case, objective)
        capped, capped_sums, _, _ = run(case, replace(objective, importance_cap=0.5))
        assert name != "all" or (capped == loss and capped_sums == sums)
        assert capped_sums["importance"] == N and capped_sums["capped"] == 0


def test_agrees_with_the_divergence_of_given_logits() -> None:
    case = Case()
    logits, teacher = case.hidden @ case.weight.t(), case.teacher[0] @ case.teacher[1].t()
    sums = run(case, MIXTURES["all, tempered"])[1]
    for reverse, name in ((False, "kl_forward"), (True, "kl_reverse")):
        assert vocab_parallel_kl(logits, teacher, reverse=reverse, temperature=2.0).sum().item() == pytest.approx(
            sums[name], rel=1e-5
        )


def test_no_tokens_and_no_gradient() -> None:
    case = Case()
    case.hidden, case.labels = case.hidden[:0], case.labels[:0]
    case.teacher = (case.teacher[0][:0], case.teacher[1])
    loss, sums, hidden, weight = run(case, MIXTURES["all"])
    loss.backward()
    assert loss.item() == 0 and not any(sums.values())
    assert hidden.grad.shape == (0, H) and weight.grad.abs().max() == 0

    with torch.no_grad():
        assert not run(Case(), MIXTURES["all"])[0].requires_grad
    frozen, full = Case(), run(Case(), MIXTURES["all"])
    full[0].backward()
    hidden = frozen.hidden.requires_grad_()
    loss, _ = linear_objective(
        hidden, frozen.weight, frozen.labels, objective=MIXTURES["all"], teacher=frozen.teacher, group=None
    )
    loss.backward()
    assert frozen.weight.grad is None and torch.equal(hidden.grad, full[2].grad)
    with pytest.raises(RuntimeError, match=r"second time|earlier backward"):
        loss.backward()


def test_sums_of_micro_batches() -> None:
    first, second = torch.arange(10.0), torch.arange(1.0, 11.0).flip(0)
    assert combine_sums([first, second]).tolist() == [10.0] * 9 + [9.0]
    assert SUM_NAMES[-1] == "logprob_gap_max" and len(SUM_NAMES) == 10


def peak_bytes(call: Callable[[], object]) -> int:
    """Most bytes allocated during a call and not freed yet, as torch's allocator tells its profiler."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


@pytest.mark.parametrize("name", ["forward", "reverse", "all, tempered", "topk and all, tempered", "sampled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_workspace_is_1_3_chunk_sets_and_the_gradient(name: str, dtype: torch.dtype) -> None:
    """A chunk set is one chunk of the student's and one of the teacher's logits in fp32; here H is far below C."""
    chunk, columns, tokens, width = 64, 2048, 192, 2
    generator = torch.Generator().manual_seed(0)
    hidden, teacher = (torch.randn(tokens, width, generator=generator).to(dtype) for _ in range(2))
    weight, teacher_weight = (torch.randn(columns, width, generator=generator).to(dtype) for _ in range(2))
    labels = torch.randint(columns, (tokens,), generator=generator)
    objective = replace(MIXTURES[name], chunk_size=chunk)
    hidden.requires_grad_()
    weight.requires_grad_()

    def step() -> None:
        loss, _ = linear_objective(
            hidden, weight, labels, objective=objective, teacher=(teacher, teacher_weight), group=None
        )
        loss.backward()

    one = chunk * columns * 4
    assert peak_bytes(step) <= (1.3 * 2 + 1) * one + 6 * weight.numel() * 4


@pytest.mark.parametrize("reverse", [False, True])
def test_workspace_of_given_logits(reverse: bool) -> None:
    chunk, columns, tokens = 64, 2048, 256
    student, teacher = (torch.randn(tokens, columns) for _ in range(2))
    student.requires_grad_()

    def step() -> None:
        vocab_parallel_kl(student, teacher, reverse=reverse, chunk_size=chunk).sum().backward()

    one = chunk * columns * 4
    assert peak_bytes(step) <= 1.3 * 2 * one + student.numel() * 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cross_entropy": -1.0}, "weights"),
        ({"reverse_kl": float("nan")}, "weights"),
        ({"estimator": "k3"}, "estimator"),
        ({"topk": 0}, "topk"),
        ({"temperature": 0.0}, "temperature"),
        ({"reverse_kl": 1.0, "estimator": "sampled", "temperature": 2.0}, "temperature 1"),
        ({"clip_ratio_low": 1.0}, "clip_ratio_low"),
        ({"clip_ratio_high": -0.1}, "clip_ratio_high"),
        ({"importance_cap": 0.0}, "importance_cap"),
        ({"chunk_size": 0}, "chunk_size"),
    ],
)
def test_refused_objectives(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Objective(**settings)


def test_refused_arguments() -> None:
    case, reverse = Case(), MIXTURES["reverse"]
    for changes, message in (
        ({"teacher": None}, "no teacher"),
        ({"teacher": (case.teacher[0][:3], case.teacher[1])}, "11 tokens"),
        ({"teacher": (case.teacher[0], case.teacher[1][:3])}, "37 vocabulary"),
        ({"num_valid": 38}, "num_valid"),
        ({"num_valid": 0}, "num_valid"),
        ({"old_logprobs_N": case.old[:2]}, "log-probabilities"),
    ):
        with pytest.raises(ValueError, match=message):
            run(case, reverse, **changes)
    case.labels = case.labels[:3]
    with pytest.raises(ValueError, match="do not fit"):
        run(case, reverse)
