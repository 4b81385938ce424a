"""Laws 1, 2 and 10 on one layer: against stock Megatron-Core with all-zero experts, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from layers import E, F, H, K, Z, dense_zero_twin, dynamic_layer, layer_config, rows_into_experts, tokens
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.router import TopKRouter

from megatron_zeda.zero_experts import ZeroExpertMoELayer, masked_zero_experts

SIGMOID: dict[str, Any] = {
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "moe_router_topk_scaling_factor": 1.8,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "pre-softmax": {"moe_router_pre_softmax": True},
    "sigmoid, bias, scaling": SIGMOID,
    "sigmoid without bias": {"moe_router_score_function": "sigmoid"},
    "shared expert": {"moe_shared_expert_intermediate_size": F},
    "moe recompute": {"recompute_granularity": "selective", "recompute_modules": ["moe"]},
}
pytestmark = pytest.mark.usefixtures("megatron")


def _with_bias(layer: ZeroExpertMoELayer) -> ZeroExpertMoELayer:
    if layer.router.expert_bias is not None:
        layer.router.expert_bias.copy_(torch.linspace(-0.2, 0.2, E + Z))
    return layer


@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_law_2_equals_stock_layer_with_all_zero_experts(variant: str, dispatcher: str) -> None:
    changes = {**VARIANTS[variant], "moe_token_dispatcher_type": dispatcher}
    layer = _with_bias(dynamic_layer(layer_config(zero_expert_balance_coeff=0.0, **changes)))
    twin = dense_zero_twin(layer, **changes)
    rows = rows_into_experts(layer)
    ours_in, theirs_in = tokens(), tokens()
    ours, _ = layer(ours_in)
    theirs, _ = twin(theirs_in)
    assert torch.equal(ours, theirs)
    assert 0 < rows[0] < ours_in.shape[0] * ours_in.shape[1] * K  # something was skipped, and not everything
    weight = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1))
    (ours * weight).sum().backward()
    (theirs * weight).sum().backward()
    assert torch.equal(ours_in.grad, theirs_in.grad)
    stock = dict(twin.named_parameters())
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert torch.equal(parameter.grad, stock[name].grad), name


@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
def test_law_10_only_real_selections_become_rows(dispatcher: str) -> None:
    layer = dynamic_layer(layer_config(moe_token_dispatcher_type=dispatcher))
    rows = rows_into_experts(layer)
    hidden = tokens()
    layer(hidden)
    logits = (hidden.detach().reshape(-1, H).double() @ layer.router.weight.detach().double().T).float()
    real = int((logits.topk(K, dim=-1).indices < E).sum())
    assert rows == [real]
    assert real < hidden.shape[0] * hidden.shape[1] * K


@pytest.mark.parametrize(("direction", "expected"), [(-1e3, "nothing skipped"), (1e3, "everything skipped")])
def test_extreme_batches(direction: float, expected: str) -> None:
    layer = dynamic_layer(layer_config(zero_expert_logit_bias=direction))
    rows = rows_into_experts(layer)
    hidden = tokens()
    output, _ = layer(hidden)
    output.sum().backward()
    all_rows = hidden.shape[0] * hidden.shape[1] * K
    if expected == "everything skipped":
        assert rows == [0]  # K = Z here, so all K slots go to zero experts
        assert torch.equal(output, torch.zeros_like(output))
    else:
        assert rows == [all_rows]
    assert torch.isfinite(hidden.grad).all()
    assert torch.isfinite(layer.router.weight.grad).all()


@pytest.mark.parametrize("variant", ["softmax", "pre-softmax", "sigmoid, bias, scaling", "sigmoid without bias"])
def test_law_1_masked_student_is_the_teacher(variant: str) -> None:
    student = _with_bias(dynamic_layer(layer_config(**VARIANTS[variant])))
    teacher = dynamic_layer(layer_config(num_zero_experts=0, **VARIANTS[variant]))
    assert type(teacher) is MoELayer and type(teacher.router) is TopKRouter
    with torch.no_grad():
        theirs = dict(teacher.named_parameters())
        for name, parameter in student.named_parameters():
            theirs[name].copy_(parameter[: theirs[name].shape[0]])
        if teacher.router.expert_bias is not None:
            teacher.router.expert_bias.copy_(student.router.expert_bias[:E])
    student.eval()
    teacher.eval()
    with torch.no_grad():
        expected, _ = teacher(tokens())
        unmasked, _ = student(tokens())
        with masked_zero_experts(student):
            masked, _ = student(tokens())
        again, _ = student(tokens())
    # A wider GEMM may round the logits differently, hence not bit for bit here.
    torch.testing.assert_close(masked, expected, atol=1e-5, rtol=0)
    assert not torch.allclose(unmasked, expected, atol=1e-3)
    assert torch.equal(unmasked, again)


@pytest.mark.parametrize("variant", ["softmax", "sigmoid, bias, scaling"])
def test_law_1_bit_for_bit_against_a_padded_teacher(variant: str) -> None:
    """The teacher's gate padded to E + Z rows with the pad masked: the same GEMM, so the same bits."""
    student = _with_bias(dynamic_layer(layer_config(**VARIANTS[variant])))
    padded = dense_zero_twin(student, **VARIANTS[variant])
    mask = torch.zeros(E + Z)
    mask[E:] = float("-inf")
    if padded.router.expert_bias is None:
        padded.router.gating = lambda x, gating=padded.router.gating: gating(x) + mask
    else:
        padded.router.expert_bias += mask
    with torch.no_grad():
        expected, _ = padded.eval()(tokens())
        with masked_zero_experts(student):
            masked, _ = student.eval()(tokens())
    assert torch.equal(masked, expected)


def test_no_zero_experts_is_exactly_upstream() -> None:
    layer = dynamic_layer(layer_config(num_zero_experts=0))
    assert type(layer) is MoELayer
    assert type(layer.router) is TopKRouter
    assert layer.router.weight.shape == (E, H)


def test_weights_are_not_renormalised_over_real_experts() -> None:
    """Every expert replaced by the identity: what comes out is the sum of the kept weights, below 1 where a slot is
    skipped.
    """
    layer = dynamic_layer(layer_config())
    hidden = tokens()
    with torch.no_grad():
        probs, routing_map = layer.router(hidden)
    kept = (probs * routing_map)[:, :E].sum(-1)
    logits = hidden.detach().reshape(-1, H).double() @ layer.router.weight.detach().double().T
    top = logits.topk(K, dim=-1)
    weights = torch.softmax(top.values, dim=-1).masked_fill(top.indices >= E, 0.0).sum(-1)
    torch.testing.assert_close(kept.double(), weights, atol=1e-6, rtol=0)
    assert (weights < 0.99).any()


def test_a_padding_mask_of_another_length_is_refused() -> None:
    hidden = tokens()
    mask = torch.zeros(hidden.shape[1], 2 * hidden.shape[0], dtype=torch.bool)
    with pytest.raises(ValueError, match=r"padding_mask \(2, 24\) does not fit 12 positions .* cut like the tokens"):
        dynamic_layer(layer_config())(hidden, padding_mask=mask)
