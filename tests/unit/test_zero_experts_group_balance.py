"""Equation 5 against hand-worked numbers and float64."""

from __future__ import annotations

import pytest
import torch

from megatron_zeda.zero_experts import group_balancing_loss, target_skip_rate, weight_for_skip_rate


def _random_routing(num_tokens: int, num_real: int, num_zero: int, topk: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(num_tokens, num_real + num_zero, generator=generator)
    routing_map = torch.zeros_like(logits, dtype=torch.bool).scatter(1, logits.topk(topk).indices, True)
    return logits.softmax(-1), routing_map


def _by_hand(probs: torch.Tensor, routing_map: torch.Tensor, n: int, k: int, w: float, alpha: float) -> torch.Tensor:
    """The formula, group by group, in float64."""
    probs = probs.double()
    z = probs.shape[1] - n
    f = routing_map.double().mean(0)
    p = probs.mean(0)
    return alpha * (n + z * w) / k * (f[:n].sum() * p[:n].sum() / n + f[n:].sum() * p[n:].sum() / (z * w))


def test_worked_value() -> None:
    # N=4, Z=2, K=2, w=2, alpha=1, f_E=1.5, f_Z=0.5, P_E=0.8, P_Z=0.2: (4+4)/2 * (1.5*0.8/4 + 0.5*0.2/4) = 1.3
    probs = torch.tensor([[0.2, 0.2, 0.2, 0.2, 0.1, 0.1]] * 2)
    routing_map = torch.tensor([[1, 1, 0, 0, 0, 0], [1, 0, 0, 0, 1, 0]], dtype=torch.bool)
    loss = group_balancing_loss(probs, routing_map, num_real_experts=4, topk=2, zero_expert_weight=2.0, coeff=1.0)
    assert loss.item() == pytest.approx(1.3, abs=1e-6)


def test_value_and_gradient_against_float64() -> None:
    probs, routing_map = _random_routing(50, 8, 4, 3)
    ours = probs.clone().requires_grad_()
    exact = probs.double().requires_grad_()
    loss = group_balancing_loss(ours, routing_map, num_real_experts=8, topk=3, zero_expert_weight=1.5, coeff=0.1)
    expected = _by_hand(exact, routing_map, 8, 3, 1.5, 0.1)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss.double(), expected, atol=1e-7, rtol=1e-6)
    torch.testing.assert_close(ours.grad.double(), exact.grad, atol=1e-8, rtol=1e-5)


def test_is_one_on_target_and_pushes_towards_it() -> None:
    """At the target rate of both f and P the loss is 1 whatever the sizes; above it, gradient descent lowers P_Z."""
    for n, z, k, w in [(128, 64, 8, 2.0), (64, 32, 4, 2.0), (16, 8, 4, 3.0)]:
        rate = target_skip_rate(n, z, w)
        probs = torch.cat([torch.full((1, n), (1 - rate) / n), torch.full((1, z), rate / z)], dim=1)
        counts = probs[0] * k * 1000
        settings = {"num_real_experts": n, "topk": k, "zero_expert_weight": w, "coeff": 1.0, "num_tokens": 1000}
        on_target = group_balancing_loss(
            probs.expand(1000, -1), torch.zeros(1000, n + z, dtype=torch.bool), token_counts=counts, **settings
        )
        assert on_target.item() == pytest.approx(1.0, rel=1e-5)

        skewed = probs.clone().requires_grad_()
        too_many = torch.zeros(1, n + z, dtype=torch.bool)
        too_many[0, n : n + min(k, z)] = True
        group_balancing_loss(skewed, too_many, **{**settings, "num_tokens": 1}).backward()
        assert skewed.grad[0, n:].mean() > skewed.grad[0, :n].mean()


def test_parts_of_a_group_add_up_to_the_whole() -> None:
    probs, routing_map = _random_routing(60, 8, 4, 3)
    settings = {"num_real_experts": 8, "topk": 3, "zero_expert_weight": 2.0, "coeff": 0.1}
    whole = group_balancing_loss(probs, routing_map, **settings)
    counts = routing_map.sum(0)
    parts = sum(
        group_balancing_loss(probs[part], routing_map[part], token_counts=counts, num_tokens=60, **settings)
        for part in (slice(0, 7), slice(7, 40), slice(40, 60))
    )
    torch.testing.assert_close(parts, whole)
    wrong = sum(
        group_balancing_loss(probs[part], routing_map[part], **settings) for part in (slice(0, 7), slice(7, 60))
    )
    assert abs(wrong / 2 - whole) > 1e-6  # a product of two local means is another number


def test_zeroed_rows_are_padding() -> None:
    probs, routing_map = _random_routing(20, 8, 4, 3)
    settings = {"num_real_experts": 8, "topk": 3, "zero_expert_weight": 2.0, "coeff": 0.1}
    expected = group_balancing_loss(probs[:13], routing_map[:13], **settings)
    probs[13:], routing_map[13:] = 0.0, False
    torch.testing.assert_close(group_balancing_loss(probs, routing_map, num_tokens=13, **settings), expected)


def test_counts_carry_no_gradient_and_nothing_is_not_nan() -> None:
    settings = {"num_real_experts": 8, "topk": 3, "zero_expert_weight": 2.0, "coeff": 0.1}
    empty = torch.zeros(0, 12, requires_grad=True)
    loss = group_balancing_loss(empty, torch.zeros(0, 12, dtype=torch.bool), **settings)
    assert loss.item() == 0.0 and loss.requires_grad


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_real_experts": 12}, "no zero expert"),
        ({"zero_expert_weight": 0.0}, "zero_expert_weight"),
    ],
)
def test_bad_input(change: dict[str, float], message: str) -> None:
    probs, routing_map = _random_routing(5, 8, 4, 3)
    settings = {"num_real_experts": 8, "topk": 3, "zero_expert_weight": 2.0, "coeff": 0.1, **change}
    with pytest.raises(ValueError, match=message):
        group_balancing_loss(probs, routing_map, **settings)
    with pytest.raises(ValueError, match="must both be"):
        group_balancing_loss(probs, routing_map[:3], **{**settings, "num_real_experts": 8})


def test_skip_rate_and_weight_are_inverse() -> None:
    assert target_skip_rate(128, 64, 2.0) == 0.5
    assert weight_for_skip_rate(128, 64, 0.5) == 2.0
    assert target_skip_rate(16, 8, weight_for_skip_rate(16, 8, 0.37)) == pytest.approx(0.37)
    with pytest.raises(ValueError, match="strictly between"):
        weight_for_skip_rate(16, 8, 1.0)
