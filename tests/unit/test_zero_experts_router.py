"""The router: padding, statistics, recompute, frozen bias, and what alpha means."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from layers import E, H, K, Z, dynamic_layer, layer_config, tokens
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

from megatron_zeda.zero_experts import (
    ZeroExpertMoELayer,
    group_balancing_loss,
    masked_zero_experts,
    router_statistics,
    set_loss_tokens,
    zero_expert_routers,
)

pytestmark = pytest.mark.usefixtures("megatron")
SIGMOID: dict[str, Any] = {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True}


@pytest.fixture(autouse=True)
def _fresh_global_state() -> Any:
    MoEAuxLossAutoScaler.main_loss_backward_scale = None
    set_loss_tokens(None)
    yield
    MoEAuxLossAutoScaler.main_loss_backward_scale = None
    set_loss_tokens(None)


def _scores(layer: ZeroExpertMoELayer, hidden: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
    """The score distribution ``[T, G]`` in float64, from the router's weight (or ``weight``) alone."""
    weight = layer.router.weight.detach().double() if weight is None else weight
    logits = hidden.reshape(-1, H).double() @ weight.T
    if layer.router.score_function == "softmax":
        return logits.softmax(-1)
    scores = logits.sigmoid()
    return scores / scores.sum(-1, keepdim=True)


def _selection(layer: ZeroExpertMoELayer, hidden: torch.Tensor) -> torch.Tensor:
    logits = (hidden.reshape(-1, H).double() @ layer.router.weight.double().T).detach()
    scores = logits if layer.router.score_function == "softmax" else logits.sigmoid()
    if layer.router.expert_bias is not None:
        scores = scores + layer.router.expert_bias.double()
    return torch.zeros_like(scores, dtype=torch.bool).scatter(1, scores.topk(K).indices, True)


def _padding(seq_length: int, batch: int) -> torch.Tensor:
    """``[B, S]``, True for padding: the last third of the second sample."""
    mask = torch.zeros(batch, seq_length, dtype=torch.bool)
    mask[1, seq_length * 2 // 3 :] = True
    return mask


@pytest.mark.parametrize("variant", [{}, SIGMOID], ids=["softmax", "sigmoid with bias"])
def test_balance_gradient_and_statistics_leave_padding_out(variant: dict[str, Any]) -> None:
    layer = dynamic_layer(layer_config(zero_expert_balance_coeff=0.7, **variant))
    if layer.router.expert_bias is not None:
        layer.router.expert_bias.copy_(torch.linspace(-0.3, 0.3, E + Z))
    hidden, mask = tokens(), _padding(12, 2)
    output, _ = layer(hidden, padding_mask=mask)
    (output * 0).sum().backward()  # only the balancing loss reaches the router

    weight = layer.router.weight.detach().double().requires_grad_()
    valid = ~mask.T.reshape(-1)
    probs = _scores(layer, hidden.detach(), weight)[valid]
    selected = _selection(layer, hidden.detach())[valid]
    f, p = selected.double().mean(0), probs.mean(0)
    w = 2.0
    expected = (E + w * Z) / K * (f[:E].sum() * p[:E].sum() / E + f[E:].sum() * p[E:].sum() / (w * Z))
    (0.7 * expected).backward()
    expected = expected.detach()
    torch.testing.assert_close(layer.router.weight.grad.double(), weight.grad, atol=1e-7, rtol=1e-4)

    statistics = router_statistics(layer)
    assert statistics.num_selections == (int(valid.sum()) * K,)
    assert statistics.num_zero_selections == (int(selected[:, E:].sum()),)
    assert statistics.balance_loss == pytest.approx(float(expected), rel=1e-5)
    assert math.isnan(router_statistics(layer).skip_rate)  # reading resets


def test_a_micro_step_without_a_token_does_not_dilute_the_balancing_loss() -> None:
    layer = dynamic_layer(layer_config())
    hidden = tokens()
    nothing = torch.ones(hidden.shape[1], hidden.shape[0], dtype=torch.bool)
    layer(hidden)
    [wanted] = router_statistics(layer).balance_loss_per_layer
    layer(hidden)
    layer(hidden, padding_mask=nothing)
    assert router_statistics(layer).balance_loss_per_layer == (wanted,)
    layer(hidden, padding_mask=nothing)
    assert math.isnan(router_statistics(layer).balance_loss)


def test_padding_does_not_change_other_tokens() -> None:
    """Upstream mixes up ``[T, E]`` and ``[T]`` when a selection bias meets padding: it raises, or is wrong at T = E."""
    for seq_length in (12, (E + Z) // 2):
        layer = dynamic_layer(layer_config(**SIGMOID))
        hidden, mask = tokens(seq_length), _padding(seq_length, 2)
        padded, _ = layer(hidden, padding_mask=mask)
        plain, _ = layer(hidden)
        assert torch.equal(padded[~mask.T], plain[~mask.T])


@pytest.mark.parametrize("variant", [{}, {"recompute_granularity": "selective", "recompute_modules": ["moe"]}])
def test_training_counts_once_and_evaluation_counts(variant: dict[str, Any]) -> None:
    layer = dynamic_layer(layer_config(**variant))
    hidden = tokens()
    for _ in range(3):
        layer(hidden)[0].sum().backward()
    trained = router_statistics(layer)
    num_tokens = hidden.shape[0] * hidden.shape[1]
    assert trained.num_selections == (3 * num_tokens * K,)
    assert trained.skip_rate == float(_selection(layer, hidden.detach())[:, E:].double().mean() * Z / K)

    layer.eval()
    with torch.no_grad():
        layer(hidden)
    evaluated = router_statistics(layer)
    assert evaluated.num_selections == (num_tokens * K,)
    assert evaluated.skip_rate == trained.skip_rate
    assert math.isnan(evaluated.balance_loss)


def test_recompute_gives_the_same_gradients() -> None:
    recompute = {"recompute_granularity": "selective", "recompute_modules": ["moe"]}
    layers = [dynamic_layer(layer_config(**changes)) for changes in ({}, recompute)]
    layers[1].load_state_dict(layers[0].state_dict())
    for layer in layers:
        layer(tokens())[0].square().sum().backward()
    for (name, one), (_, other) in zip(layers[0].named_parameters(), layers[1].named_parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, msg=name, atol=1e-6, rtol=1e-5)


def test_selection_bias_is_frozen_through_ten_steps() -> None:
    """``finalize_model_grads`` updates the bias of any router that does not say it is frozen."""
    from megatron.core.distributed.finalize_model_grads import _update_router_expert_bias

    layer = dynamic_layer(layer_config(**SIGMOID))
    layer.router.expert_bias.copy_(torch.randn(E + Z, generator=torch.Generator().manual_seed(5)))
    before = layer.router.expert_bias.clone()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for step in range(10):
        optimizer.zero_grad()
        layer(tokens(seed=step))[0].square().mean().backward()
        layer.router.local_tokens_per_expert += torch.arange(E + Z)  # an uneven load to answer to
        _update_router_expert_bias([layer], layer.config)
        optimizer.step()
    assert torch.equal(layer.router.expert_bias, before)
    layer.router.frozen_expert_bias = False  # the same loop moves a bias that is not frozen
    layer.router.local_tokens_per_expert += torch.arange(E + Z)
    _update_router_expert_bias([layer], layer.config)
    assert not torch.equal(layer.router.expert_bias, before)


def _balance_gradient(prompt: int, response: int, per_token: bool) -> torch.Tensor:
    """Router gradient of the balancing loss alone, as ``finalize_model_grads`` leaves it."""
    torch.manual_seed(0)
    layer = dynamic_layer(layer_config(calculate_per_token_loss=per_token, zero_expert_balance_coeff=0.5))
    pattern = tokens(4, 1).detach()
    hidden = pattern.repeat((prompt + response) // 4, 1, 1).requires_grad_()
    set_loss_tokens(response * hidden.shape[1])
    output, _ = layer(hidden)
    (output * 0).sum().backward()
    return layer.router.weight.grad / (response * hidden.shape[1] if per_token else 1)


def test_alpha_means_the_same_whatever_the_prompt_length() -> None:
    """The same distribution of tokens, prompts three times as long as responses: the effective alpha stays."""
    expected = _balance_gradient(0, 16, per_token=False)
    assert expected.abs().max() > 1e-4
    for prompt, response in [(0, 16), (48, 16), (16, 48)]:
        torch.testing.assert_close(_balance_gradient(prompt, response, per_token=True), expected, atol=1e-6, rtol=1e-3)


def test_per_token_loss_must_know_its_tokens() -> None:
    layer = dynamic_layer(layer_config(calculate_per_token_loss=True))
    with pytest.raises(RuntimeError, match="set_loss_tokens"):
        layer(tokens())
    dynamic_layer(layer_config(calculate_per_token_loss=True, zero_expert_balance_coeff=0.0))(tokens())


def test_the_routing_that_was_taken_is_what_counts() -> None:
    """Replayed routing: the counts of the loss follow the recorded choice, not the scores."""
    from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction

    RouterReplay.global_router_replay_instances.clear()
    layer = dynamic_layer(layer_config(moe_enable_routing_replay=True))
    hidden = tokens()
    recorded = torch.arange(E, E + K).repeat(hidden.shape[0] * hidden.shape[1], 1)
    layer.router.router_replay.set_target_indices(recorded)
    layer.router.router_replay.set_router_replay_action(RouterReplayAction.REPLAY_FORWARD)
    layer(hidden)
    statistics = router_statistics(layer)
    RouterReplay.global_router_replay_instances.clear()
    assert statistics.skip_rate == 1.0
    taken = torch.zeros(recorded.shape[0], E + Z, dtype=torch.bool).scatter(1, recorded, True)
    expected = group_balancing_loss(
        _scores(layer, hidden.detach()).float(), taken, num_real_experts=E, topk=K, zero_expert_weight=2.0, coeff=1.0
    )
    assert statistics.balance_loss == pytest.approx(expected.item(), rel=1e-5)


def test_passes_of_the_masked_student_are_the_teachers() -> None:
    layer = dynamic_layer(layer_config())
    layer(tokens())
    with masked_zero_experts(layer), torch.no_grad():
        layer.eval()(tokens(seed=9))
        layer.train()
    layer(tokens())
    assert router_statistics(layer).num_selections == (2 * 24 * K,)


def test_training_goes_on_after_an_evaluation_in_inference_mode() -> None:
    layer = dynamic_layer(layer_config())
    with torch.inference_mode():
        layer.eval()(tokens(requires_grad=False))
    layer.train()(tokens())[0].sum().backward()
    assert router_statistics(layer).num_selections == (2 * 24 * K,)


def test_dial_moves_the_rate_and_nothing_else_at_zero() -> None:
    rates = []
    for bias in (-1.0, 0.0, 1.0):
        torch.manual_seed(0)
        layer = dynamic_layer(layer_config(zero_expert_logit_bias=bias)).eval()
        with torch.no_grad():
            layer(tokens(64))
        rates.append(router_statistics(layer).skip_rate)
    assert rates[0] < rates[1] < rates[2]


def test_routers_are_found_in_lists_of_chunks() -> None:
    layers = [dynamic_layer(layer_config()) for _ in range(2)]
    assert zero_expert_routers(layers) == [layers[0].router, layers[1].router]
