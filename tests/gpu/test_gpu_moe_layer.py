"""One MoE layer with Transformer Engine: precisions, token counts, padding, fused kernels, memory.

The routing is prescribed (tests/forced_routing.py) and the expected values are computed in float64, token by token.
Errors are norms of differences over norms of what is expected.
"""

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from forced_routing import (
    Case,
    alignment,
    case,
    errors,
    expected,
    expert_parameters,
    expert_rows,
    rows_into_gemms,
    run,
)
from layers import E, K, dense_zero_twin, dynamic_layer, layer_config, rows_into_experts, tokens

from megatron_zeda import platform
from megatron_zeda.zero_experts import router_statistics

pytestmark = pytest.mark.usefixtures("megatron")

FUSED = {"moe_grouped_gemm": True, "moe_permute_fusion": True} if platform.have_transformer_engine() else {}
FP8 = pytest.mark.skipif(
    not platform.have_transformer_engine(), reason="FP8 arithmetic needs a GPU (its padding is rehearsed elsewhere)"
)
PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {"dtype": torch.float32},
    "bf16": {"dtype": torch.bfloat16},
    "tensorwise": {"dtype": torch.bfloat16, "fp8": "hybrid", "fp8_recipe": "tensorwise"},
    "blockwise": {"dtype": torch.bfloat16, "fp8": "e4m3", "fp8_recipe": "blockwise"},
}
# Output, then gradients. GEMMs of fp32 may run in TF32 on a GPU (10 bits); bf16 has 8 bits, e4m3 4 and e5m2 3.
TOLERANCES = {"fp32": (2e-3, 4e-3), "bf16": (1.5e-2, 2e-2), "tensorwise": (0.08, 0.15), "blockwise": (0.08, 0.15)}
COUNTS = {
    "0, 1, 15, 16, 17 tokens": [0, 1, 15, 16, 17, 33, 8, 2],
    "one expert empty": [0, 20, 20, 20, 20, 20, 20, 20],
    "nothing skips": [20] * E,
    "everything skips": [0] * E,
}


def within(table: dict[str, float], precision: str) -> None:
    output, gradient = TOLERANCES[precision]
    for name, value in table.items():
        assert value <= (output if name == "output" else gradient), table


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_layer_equals_float64(precision: str, counts: list[int], record: Callable[..., None]) -> None:
    """Includes law 10: the rows of the GEMMs are the real selections, and FP8's padding is what alignment demands."""
    one = case(counts, **PRECISIONS[precision], **FUSED)
    rows = rows_into_gemms(one.layer)
    found = errors(run(one), expected(one))
    real, padding = expert_rows(counts, alignment(one.layer.config))
    record(rows=sum(rows), real_rows=real, padding_rows=padding, **found)
    assert sum(rows) == real + padding
    within(found, precision)


@FP8
@pytest.mark.parametrize("precision", ["tensorwise", "blockwise"])
def test_fp8_against_bf16(precision: str, record: Callable[..., None]) -> None:
    counts = [0, 1, 15, 16, 17, 33, 8, 2]
    eight, sixteen = (run(case(counts, **PRECISIONS[name], **FUSED)) for name in (precision, "bf16"))
    found = errors(eight, sixteen)
    record(**found)
    within(found, precision)
    assert found["output"] > 1e-3, "FP8 was not used"


def test_the_router_computes_in_fp32(record: Callable[..., None]) -> None:
    """bf16 logits would be off by up to 2^-8; these are the fp32 product of the bf16 operands."""
    one = case([8] * E, **PRECISIONS["tensorwise" if platform.have_transformer_engine() else "bf16"], **FUSED)
    seen: list[torch.Tensor] = []
    routing = one.layer.router.routing
    one.layer.router.routing = lambda logits, **rest: (seen.append(logits), routing(logits, **rest))[1]
    run(one)
    wanted = one.hidden.detach().double().cpu() @ one.layer.router.weight.detach().double().cpu().T
    found = float((seen[0].detach().double().cpu().reshape(wanted.shape) - wanted).abs().max())
    record(largest_logit_error=found)
    assert seen[0].dtype == torch.float32 and found < 2e-3  # TF32 would be 5e-3: logits are of order 3


def twin_results(layer: Any, hidden: torch.Tensor) -> dict[str, torch.Tensor]:
    output = layer(hidden)[0]
    output.float().square().sum().backward()
    results = {"output": output, "grad hidden": hidden.grad, "grad router": layer.router.weight.grad}
    for name in ("linear_fc1", "linear_fc2"):
        # A GEMM that ran for no expert at all may leave no gradient.
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in expert_parameters(layer, name)]
        results[name] = torch.stack(gradients)
    return {name: value.detach().float().cpu() for name, value in results.items()}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
def test_law_2_layer_equals_stock_layer_with_all_zero_experts(
    dispatcher: str, precision: str, record: Callable[..., None]
) -> None:
    """Grouped GEMMs over other row counts may choose other tilings: not necessarily the same bits on a GPU."""
    dtype = PRECISIONS[precision]["dtype"]
    changes = {**FUSED, "moe_token_dispatcher_type": dispatcher, "params_dtype": dtype}
    layer = dynamic_layer(layer_config(zero_expert_balance_coeff=0.0, **changes)).to(platform.device()).to(dtype)
    twin = dense_zero_twin(layer, **changes).to(platform.device()).to(dtype)
    rows = rows_into_experts(layer)
    inputs = [tokens(64).detach().to(platform.device(), dtype).requires_grad_() for _ in range(2)]
    ours, theirs = (twin_results(module, x) for module, x in zip((layer, twin), inputs, strict=True))
    found = errors(ours, theirs)
    record(rows=rows[0], static_rows=64 * 2 * K, **found)
    within(found, precision)
    assert 0 < rows[0] < 64 * 2 * K


@pytest.mark.hardware
@pytest.mark.parametrize("switch", ["moe_permute_fusion", "moe_router_fusion", "moe_grouped_gemm"])
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_fused_equals_unfused(switch: str, counts: list[int], record: Callable[..., None]) -> None:
    """The fused permutation returns rows nobody wrote when their number is stated as tokens x K."""
    on, off = (run(case(counts, **{**FUSED, switch: value})) for value in (True, False))
    found = errors(on, off)
    record(**found)
    assert max(found.values()) <= 2e-3, found  # another order of summation, TF32 GEMMs


@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
def test_a_pass_without_a_row_leaves_the_next_ones_alone(dispatcher: str, record: Callable[..., None]) -> None:
    """Fused permutations cannot do it, so that a layer changes to unfused ones and back."""
    fused = {"moe_token_dispatcher_type": dispatcher}
    layers = two_layers(fused, {**fused, "moe_permute_fusion": False})
    rows = rows_into_experts(layers[0])
    for number, dial in enumerate((0.0, 1e3, 0.0, 1e3, 0.0)):
        for layer in layers:
            layer.zero_grad(set_to_none=True)
            layer.router.zero_logit_bias = dial
        inputs = [tokens(64).detach().to(platform.device()).requires_grad_() for _ in layers]
        ours, theirs = (twin_results(layer, x) for layer, x in zip(layers, inputs, strict=True))
        found = errors(ours, theirs)
        record(**{f"{name} {number}": value for name, value in found.items()})
        assert max(found.values()) <= 2e-3, (number, found)
    assert rows == [rows[0], 0, rows[0], 0, rows[0]] and rows[0] > 0


ROUTERS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "softmax before the choice": {"moe_router_pre_softmax": True},
    "sigmoid with a selection bias": {
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
    },
}


def two_layers(first: dict[str, Any], second: dict[str, Any]) -> list[Any]:
    """Two layers with the same weights and other settings."""
    layers = []
    for changes in (first, second):
        config = layer_config(zero_expert_balance_coeff=0.0, **{**FUSED, **changes})
        layers.append(dynamic_layer(config).to(platform.device()))
    layers[1].load_state_dict(layers[0].state_dict())
    return layers


@pytest.mark.parametrize("dial", [0.0, float("-inf")])
@pytest.mark.parametrize("router", ROUTERS.values(), ids=ROUTERS)
def test_fused_router(router: dict[str, Any], dial: float, record: Callable[..., None]) -> None:
    """Also with the zero experts masked, as the parity gate does."""
    changes = {**router, "zero_expert_logit_bias": dial}
    fusion = platform.have_transformer_engine()
    layers = two_layers({**changes, "moe_router_fusion": fusion}, {**changes, "moe_router_fusion": False})
    hidden = tokens(64).detach().to(platform.device())
    if layers[0].router.expert_bias is not None:
        for layer in layers:
            layer.router.expert_bias.copy_(torch.linspace(-0.1, 0.1, layer.router.num_experts))
    (probs, chosen), (wanted_probs, wanted) = (layer.router(hidden) for layer in layers)
    record(largest_difference=float((probs - wanted_probs).detach().abs().max()))
    assert chosen.bool().equal(wanted.bool())
    assert bool(chosen[:, E:].any()) == (dial == 0.0)
    torch.testing.assert_close(probs, wanted_probs, atol=1e-6, rtol=1e-5)


def test_shared_experts_overlapped(record: Callable[..., None]) -> None:
    shared = {"moe_shared_expert_intermediate_size": 32}
    layers = two_layers({**shared, "moe_shared_expert_overlap": True}, shared)
    inputs = [tokens(64).detach().to(platform.device()).requires_grad_() for _ in layers]
    ours, theirs = (twin_results(layer, x) for layer, x in zip(layers, inputs, strict=True))
    found = errors(ours, theirs)
    record(**found)
    assert max(found.values()) < 1e-5, found


def with_padding(num_padding: int, dtype: torch.dtype) -> tuple[Case, torch.Tensor | None]:
    """Forty tokens with the balancing loss on, and after them padding that looks like ordinary tokens."""
    one = case([8] * E, dtype=dtype, zero_expert_balance_coeff=0.1, **FUSED)
    if num_padding == 0:
        return one, None
    like = one.hidden.detach()[:num_padding].flip(0)
    one.hidden = torch.cat([one.hidden.detach(), like]).requires_grad_()
    one.cotangent = torch.cat([one.cotangent, torch.zeros_like(like)])
    mask = torch.arange(40 + num_padding, device=like.device) >= 40
    return one, mask[None]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_padding_changes_nothing(precision: str, record: Callable[..., None]) -> None:
    outcomes, statistics = [], []
    for num_padding in (0, 9):
        one, mask = with_padding(num_padding, PRECISIONS[precision]["dtype"])
        output, _ = one.layer(one.hidden, padding_mask=mask)
        output.backward(one.cotangent)
        results = {
            "output": output[:40],
            "grad hidden": one.hidden.grad[:40],
            "grad router": one.layer.router.weight.grad,
        }
        outcomes.append({name: value.detach().float().cpu() for name, value in results.items()})
        statistics.append(router_statistics(one.layer))
    found = errors(outcomes[1], outcomes[0])
    record(balance_loss=statistics[1].balance_loss, skip_rate=statistics[1].skip_rate, **found)
    assert statistics[0].num_selections == statistics[1].num_selections == (40 * K,)
    assert statistics[0].num_zero_selections == statistics[1].num_zero_selections == (40 * K - 8 * E,)
    assert statistics[1].balance_loss == pytest.approx(statistics[0].balance_loss, rel=1e-5)
    within(found, precision)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_balancing_loss_and_its_gradient(precision: str, record: Callable[..., None]) -> None:
    """Equation 5 of the paper in float64. The layer's output has no weight here, so the loss is all there is.

    The router's GEMMs of two fp32 matrices are TF32 in Transformer Engine: the backward ones always, the forward one
    for an fp32 model.
    """
    counts, weight, coeff = [4] * E, 2.0, 0.1
    one = case(counts, dtype=PRECISIONS[precision]["dtype"], zero_expert_balance_coeff=coeff, **FUSED)
    one.cotangent = torch.zeros_like(one.cotangent)
    found_gradient = run(one)["grad router"]
    found_loss = router_statistics(one.layer).balance_loss

    router = one.layer.router.weight.detach().double().cpu().requires_grad_()
    scores = torch.softmax(one.hidden.detach().double().cpu().reshape(40, -1) @ router.T, dim=-1).mean(0)
    num_zero = one.chosen.shape[1] - E
    f_real, f_zero = sum(counts) / 40, K - sum(counts) / 40
    groups = f_real * scores[:E].sum() / E + f_zero * scores[E:].sum() / (weight * num_zero)
    loss = (E + weight * num_zero) / K * groups
    (wanted,) = torch.autograd.grad(coeff * loss, router)
    loss = loss.detach()
    error = float((found_gradient.double() - wanted).norm() / wanted.norm())
    record(loss=found_loss, loss_error=abs(found_loss - float(loss)), gradient_error=error)
    assert found_loss == pytest.approx(float(loss), rel=1e-3)
    assert error < (4e-3 if precision == "fp32" else 1e-2)


def saved_and_peak(skip: float, precision: str) -> tuple[int, int]:
    """Bytes that one forward pass keeps for the backward pass, and the peak of both (0 on a CPU)."""
    num_tokens = 2048
    per_expert = int(num_tokens * K * (1 - skip)) // E
    one = case([per_expert] * E, num_tokens=num_tokens, **PRECISIONS[precision], **FUSED)
    storages: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    parameters = {p.untyped_storage().data_ptr() for p in one.layer.parameters()}
    gpu = platform.device().type == "cuda"
    gc.collect()
    if gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if gpu else 0
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output, _ = one.layer(one.hidden)
    output.backward(one.cotangent)
    peak = torch.cuda.max_memory_allocated() - before if gpu else 0
    return sum(size for address, size in storages.items() if address not in parameters), peak


@pytest.mark.parametrize("precision", ["bf16"])
def test_memory_falls_with_the_skip_rate(precision: str, record: Callable[..., None]) -> None:
    saved_and_peak(0.0, precision)  # workspaces that stay are not the layer's
    rates = (0.0, 0.25, 0.5, 0.75)
    measured = {rate: saved_and_peak(rate, precision) for rate in rates}
    record(
        saved_bytes={str(r): s for r, (s, _) in measured.items()},
        peak_bytes={str(r): p for r, (_, p) in measured.items()},
    )
    saved = [measured[rate][0] for rate in rates]
    # What belongs to a row is most of it; the hidden states and the routing belong to tokens.
    assert saved == sorted(saved, reverse=True) and saved[2] <= 0.65 * saved[0] and saved[3] <= 0.45 * saved[0]
    if platform.device().type == "cuda":
        peaks = [measured[rate][1] for rate in rates]
        assert peaks == sorted(peaks, reverse=True) and peaks[2] <= 0.8 * peaks[0]
