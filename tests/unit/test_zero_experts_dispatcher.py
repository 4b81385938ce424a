"""Dispatchers on one rank: what moves is what was chosen, fused or not, and nothing else is computed (law 10)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from layers import E, F, H, K, Z, dense_zero_twin, dynamic_layer, layer_config, rows_into_experts, tokens
from megatron.core.transformer.moe import moe_utils
from moe_kernels import install
from torch.utils.flop_counter import FlopCounterMode

from megatron_zeda.zero_experts.dispatcher import selected_experts

T = 24  # tokens of layers.tokens()


def _random_routing(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A map with 0 to K selections per token, some of weight 0, and large weights where nothing is selected."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(64, E, generator=generator, dtype=torch.float64)
    kept = torch.randint(0, K + 1, (64, 1), generator=generator)
    routing_map = scores.argsort(descending=True).argsort() < kept  # each row: its `kept` largest scores
    probs = torch.rand(64, E, generator=generator, dtype=torch.float64) + 1.0
    probs[routing_map] -= 1.0
    probs[0], routing_map[0] = 5.0, False
    some = routing_map.any(1).nonzero()[0, 0]
    probs[some, routing_map[some]] = 0.0
    return routing_map, probs


@pytest.mark.parametrize("seed", range(3))
def test_index_form_holds_the_selections_and_nothing_else(seed: int) -> None:
    routing_map, probs = _random_routing(seed)
    values, indices = selected_experts(routing_map, probs.requires_grad_(), K)
    assert indices.dtype == torch.int64
    for token in range(64):
        chosen = routing_map[token].nonzero().flatten().tolist()
        assert sorted(i for i in indices[token].tolist() if i >= 0) == chosen
        count = len(chosen)
        assert (indices[token, count:] == -1).all() and (values[token, count:] == 0).all()
        assert torch.equal(values[token, :count], probs[token, indices[token, :count]])
        assert (values[token, :count].diff() <= 0).all()
    assert (values[indices >= 0] == 0).any()  # a selection of weight 0 stays one
    weight = torch.randn(values.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    (values * weight).sum().backward()
    expected = torch.zeros_like(probs)
    for token, slot in (indices >= 0).nonzero().tolist():
        expected[token, indices[token, slot]] = weight[token, slot]
    assert torch.equal(probs.grad, expected)


def test_index_form_keeps_garbage_gradients_of_empty_slots_out() -> None:
    """A kernel may leave the gradient of a slot it never saw unwritten."""
    routing_map, probs = _random_routing(0)
    values, indices = selected_experts(routing_map, probs.requires_grad_(), K)
    values.backward(torch.where(indices >= 0, 1.0, float("nan")))
    assert torch.equal(probs.grad, routing_map.double())


@pytest.fixture
def _permute_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch.setattr)


@pytest.mark.usefixtures("megatron", "_permute_kernels")
@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
@pytest.mark.parametrize("dial", [0.0, -1e3, 1e3], ids=["some skipped", "nothing skipped", "everything skipped"])
def test_permute_fusion_changes_nothing(dispatcher: str, dial: float) -> None:
    runs = []
    for fusion in (False, True):
        torch.manual_seed(5)
        settings = {"moe_token_dispatcher_type": dispatcher, "zero_expert_logit_bias": dial}
        layer = dynamic_layer(layer_config(**settings, moe_permute_fusion=fusion))
        rows = rows_into_experts(layer)
        passes = []
        # Alternating, so that a pass without a row does not spoil the next one.
        for bias in (dial, 0.0, dial, 0.0):
            layer.router.zero_logit_bias = bias
            hidden = tokens()
            output, _ = layer(hidden)
            output.square().sum().backward()
            passes += [output.detach(), hidden.grad]
        assert layer.token_dispatcher.config.moe_permute_fusion == fusion  # not slower for ever after
        runs.append([torch.tensor(rows), *passes, *(parameter.grad for parameter in layer.parameters())])
        assert rows[0] == {0.0: rows[1], -1e3: T * K, 1e3: 0}[dial]
    for unfused, fused in zip(*runs, strict=True):
        torch.testing.assert_close(fused, unfused, atol=1e-6, rtol=1e-6)


def _real_selections(layer: Any, hidden: torch.Tensor) -> torch.Tensor:
    """``[T, E]``, computed apart from the router's code."""
    logits = hidden.detach().reshape(-1, H).double() @ layer.router.weight.detach().double().T
    return torch.zeros_like(logits).scatter(1, logits.topk(K).indices, 1.0)[:, :E].bool()


def _expected_flops(rows: int, shared: bool) -> int:
    """Forward and backward (twice the forward): experts per row, router per token, shared expert per token."""
    expert = 2 * H * 2 * F + 2 * F * H
    return 3 * (rows * expert + T * 2 * H * (E + Z) + shared * T * expert)


SHARED: dict[str, Any] = {"moe_shared_expert_intermediate_size": F}
FLOPS: dict[str, dict[str, Any]] = {
    "alltoall": {},
    "allgather": {"moe_token_dispatcher_type": "allgather"},
    "shared expert": SHARED,
    "shared expert, overlapped": {**SHARED, "moe_shared_expert_overlap": True},
    "permute fusion": {"moe_permute_fusion": True},
}


@pytest.mark.usefixtures("megatron", "_permute_kernels")
@pytest.mark.parametrize("name", FLOPS)
def test_law_10_operations_forward_and_backward_are_those_of_real_selections(name: str) -> None:
    layer = dynamic_layer(layer_config(zero_expert_balance_coeff=0.0, **FLOPS[name]))
    hidden = tokens()
    real = int(_real_selections(layer, hidden).sum())
    with FlopCounterMode(display=False) as counter:
        output, _ = layer(hidden)
        output.square().sum().backward()
    assert 0 < real < T * K
    assert counter.get_total_flops() == _expected_flops(real, shared="shared" in name)


OVERLAPS: dict[str, dict[str, Any]] = {
    "plain": {},
    "gate": {"moe_shared_expert_gate": True},
    "moe recompute": {"recompute_granularity": "selective", "recompute_modules": ["moe"]},
    "sigmoid": {"moe_router_score_function": "sigmoid", "moe_router_topk_scaling_factor": 1.8},
}


@pytest.mark.usefixtures("megatron")
@pytest.mark.parametrize("variant", OVERLAPS)
def test_law_2_with_shared_expert_overlap(variant: str) -> None:
    changes = {**SHARED, "moe_shared_expert_overlap": True, **OVERLAPS[variant]}
    layer = dynamic_layer(layer_config(zero_expert_balance_coeff=0.0, **changes))
    assert layer.token_dispatcher.shared_experts is layer.shared_experts
    twin = dense_zero_twin(layer, **{**changes, "moe_shared_expert_overlap": False})
    inputs, outputs = (tokens(), tokens()), []
    for model, hidden in zip((layer, twin), inputs, strict=True):
        outputs.append(model(hidden)[0])
        outputs[-1].square().sum().backward()
    # The router and the shared expert add their gradients in another order when they overlap.
    torch.testing.assert_close(outputs[0], outputs[1], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, atol=1e-5, rtol=1e-5)
    stock = dict(twin.named_parameters())
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(parameter.grad, stock[name].grad, atol=1e-5, rtol=1e-5)


def test_why_padding_the_routing_map_is_refused() -> None:
    """Tokens reach experts they did not choose, and an expert that most tokens chose stays unaligned."""
    routing_map = torch.zeros(20, 2, dtype=torch.bool)
    routing_map[:18, 0] = routing_map[0, 1] = True
    padded = moe_utils.pad_routing_map(routing_map.clone(), 16)
    assert padded[:, 1].sum() == 16 and not routing_map[1:, 1].any()
    assert padded[:, 0].sum() == 20
