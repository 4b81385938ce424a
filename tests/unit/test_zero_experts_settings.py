"""Megatron-Core settings that change routing, losses or layers: capacity, z-loss, latent experts, MTP, layer lists."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from layers import E, H, K, Z, dense_zero_twin, dynamic_layer, layer_config, rows_into_experts, tokens
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_mtp_block_spec
from megatron.core.transformer.moe import moe_layer
from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker, get_moe_metrics_tracker
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction

from megatron_zeda.zero_experts import (
    ZeroExpertMoELayer,
    get_zero_expert_block_spec,
    get_zero_expert_layer_spec,
    masked_zero_experts,
    router_statistics,
    set_loss_tokens,
    zero_expert_routers,
)

pytestmark = pytest.mark.usefixtures("megatron")
T = 24  # tokens of layers.tokens()


def _equal_with_gradients(layer: Any, twin: Any) -> None:
    inputs, outputs = (tokens(), tokens()), []
    for model, hidden in zip((layer, twin), inputs, strict=True):
        outputs.append(model(hidden)[0])
        outputs[-1].square().sum().backward()
    assert torch.equal(*outputs)
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, atol=1e-6, rtol=1e-6)
    stock = dict(twin.named_parameters())
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(parameter.grad, stock[name].grad, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("policy", ["probs", "position"])
@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
def test_law_2_with_capacity(dispatcher: str, policy: str) -> None:
    """The stock layer divides its capacity among E + Z experts: give it as much more, and it drops the same tokens."""
    changes = {"moe_token_dispatcher_type": dispatcher, "moe_token_drop_policy": policy}
    factor = 0.75
    layer = dynamic_layer(layer_config(zero_expert_balance_coeff=0.0, moe_expert_capacity_factor=factor, **changes))
    twin = dense_zero_twin(layer, moe_expert_capacity_factor=factor * (E + Z) / E, **changes)
    rows = rows_into_experts(layer)
    _equal_with_gradients(layer, twin)
    logits = tokens().detach().reshape(-1, H) @ layer.router.weight.detach().T
    chosen = torch.zeros_like(logits).scatter(1, logits.topk(K).indices, 1.0)[:, :E].sum(0)
    capacity = math.ceil(T * K / E * factor)
    assert rows == [int(chosen.clamp(max=capacity).sum())]
    assert rows[0] < chosen.sum()  # something was dropped
    statistics = router_statistics(layer)
    assert statistics.num_zero_selections == (T * K - int(chosen.sum()),)  # and is not counted as skipped


def test_law_1_with_capacity() -> None:
    """The teacher drops what the masked student drops: both have the capacity of E experts."""
    student = dynamic_layer(layer_config(moe_expert_capacity_factor=0.5))
    teacher = dynamic_layer(layer_config(moe_expert_capacity_factor=0.5, num_zero_experts=0))
    with torch.no_grad():
        theirs = dict(teacher.named_parameters())
        for name, parameter in student.named_parameters():
            theirs[name].copy_(parameter[: theirs[name].shape[0]])
        with masked_zero_experts(student):
            masked, _ = student(tokens())
        expected, _ = teacher(tokens())
    torch.testing.assert_close(masked, expected, atol=1e-5, rtol=0)


def _padding() -> torch.Tensor:
    mask = torch.zeros(2, 12, dtype=torch.bool)
    mask[0, 7:] = mask[1, 11:] = True
    return mask


@pytest.mark.parametrize("padded", [False, True])
def test_z_loss_is_megatrons(padded: bool) -> None:
    layer = dynamic_layer(layer_config(zero_expert_balance_coeff=0.0, moe_z_loss_coeff=0.3))
    twin = dense_zero_twin(layer, moe_z_loss_coeff=0.3)
    mask = _padding() if padded else None
    grads, logged = [], []
    for model in (layer, twin):
        destroy_moe_metrics_tracker()
        output, _ = model(tokens(), padding_mask=mask)
        output.sum().backward()
        grads.append(model.router.weight.grad)
        logged.append(get_moe_metrics_tracker().metrics["z_loss"].values.clone())
    destroy_moe_metrics_tracker()
    torch.testing.assert_close(*grads, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(*logged, atol=1e-6, rtol=1e-6)


def test_z_loss_counts_loss_tokens_not_router_tokens() -> None:
    """Per-token loss divides every gradient by the loss tokens, 5 here; the z-loss is a mean over 18 tokens."""
    settings = {"zero_expert_balance_coeff": 0.0, "moe_z_loss_coeff": 0.3, "calculate_per_token_loss": True}
    layer = dynamic_layer(layer_config(**settings))
    hidden, mask = tokens(), _padding()
    set_loss_tokens(5.0)
    try:
        output, _ = layer(hidden, padding_mask=mask)
    finally:
        set_loss_tokens(None)
    (output * 0.0).sum().backward()
    weight = layer.router.weight.detach().double().requires_grad_()
    kept = hidden.detach().double().reshape(-1, H)[~mask.T.reshape(-1)]
    (5.0 * 0.3 * torch.logsumexp(kept @ weight.T, dim=-1).square().mean()).backward()
    assert len(kept) == 18
    torch.testing.assert_close(layer.router.weight.grad.double(), weight.grad, atol=1e-6, rtol=1e-5)


class _Projection(torch.nn.Linear):
    """Transformer Engine's linear layer as the latent projections call it."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool, **_: Any) -> None:
        super().__init__(inputs, outputs, bias=bias)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        return super().forward(x), None


def test_law_2_with_latent_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Down before the experts, up after them; Megatron-Core asks Transformer Engine for these two matrices."""
    monkeypatch.setattr(moe_layer, "HAVE_TE", True)
    monkeypatch.setattr(moe_layer, "TELinear", _Projection)
    layer = dynamic_layer(layer_config(zero_expert_balance_coeff=0.0, moe_latent_size=8))
    rows = rows_into_experts(layer)
    _equal_with_gradients(layer, dense_zero_twin(layer, moe_latent_size=8))
    assert 0 < rows[0] < T * K and layer.experts.local_experts[0].linear_fc1.weight.shape[1] == 8


def test_recorded_routing_is_replayed_with_its_skips() -> None:
    RouterReplay.clear_global_router_replay_instances()
    layer = dynamic_layer(layer_config(moe_enable_routing_replay=True))
    rows = rows_into_experts(layer)
    try:
        RouterReplay.set_global_router_replay_action(RouterReplayAction.RECORD)
        layer(tokens(seed=0))
        RouterReplay.set_replay_data(RouterReplay.get_recorded_data())
        RouterReplay.set_global_router_replay_action(RouterReplayAction.REPLAY_FORWARD)
        layer(tokens(seed=1))
        RouterReplay.clear_global_router_replay_action()
        layer(tokens(seed=1))
    finally:
        RouterReplay.clear_global_router_replay_instances()
    assert rows[0] == rows[1] != rows[2]


def _model(config: Any, spec: Any, **kwargs: Any) -> GPTModel:
    return GPTModel(config, spec, vocab_size=64, max_sequence_length=16, position_embedding_type="rope", **kwargs)


def _batch() -> SimpleNamespace:
    ids = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(1))
    mask = torch.zeros(2, 16, dtype=torch.bool)
    mask[0, 12:] = True
    return SimpleNamespace(ids=ids, positions=torch.arange(16).expand(2, 16), padding_mask=mask)


def test_multi_token_prediction_stays_static() -> None:
    """It is built from the same layer spec; a checkpoint has E rows and E biases for it."""
    sigmoid = {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True}
    config = layer_config(num_layers=2, mtp_num_layers=1, **sigmoid)
    spec = get_zero_expert_layer_spec(config)
    model = _model(config, spec, mtp_block_spec=get_gpt_mtp_block_spec(config, spec, use_transformer_engine=False))
    static = model.mtp.layers[0].mtp_model_layer.mlp
    assert isinstance(static, ZeroExpertMoELayer) and isinstance(static.router, TopKRouter)
    assert static.router.weight.shape[0] == len(static.router.expert_bias) == E and static.router.frozen_expert_bias
    assert [router.weight.shape[0] for router in zero_expert_routers(model)] == [E + Z, E + Z]
    rows = rows_into_experts(static)
    batch = _batch()
    losses = model(
        batch.ids,
        batch.positions,
        None,
        labels=batch.ids,
        loss_mask=(~batch.padding_mask).float(),
        padding_mask=batch.padding_mask,
    )
    losses.mean().backward()
    assert rows == [2 * 16 * K]  # every selection is real
    assert all(parameter.grad is not None for parameter in model.parameters())
    statistics = router_statistics(model)
    assert statistics.layer_numbers == (1, 2) and statistics.num_selections == (28 * K, 28 * K)


def test_a_list_of_moe_layers_is_the_same_model() -> None:
    batch, outputs = _batch(), []
    for frequency in (1, [1, 1]):
        torch.manual_seed(0)
        config = layer_config(num_layers=2, moe_layer_freq=frequency)
        model = _model(config, get_zero_expert_block_spec(config)).eval()
        outputs.append(model(batch.ids, batch.positions, None))
    assert torch.equal(*outputs)
