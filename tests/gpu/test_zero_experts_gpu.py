"""Checks that need one GPU with Transformer Engine: the fused path of zero-expert layers.

They skip elsewhere. docs/verification.md records where and when they were run, and what came out.
"""

from __future__ import annotations

import pytest
import torch
from layers import E, H, K, Z, dense_zero_twin, dynamic_layer, layer_config, rows_into_experts, tokens

from megatron_zeda import platform

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not platform.have_transformer_engine(), reason="needs a GPU and Transformer Engine"),
    pytest.mark.usefixtures("megatron"),
]
FUSED = {"moe_grouped_gemm": True, "moe_permute_fusion": True, "moe_router_dtype": "fp32"}


def _on_gpu(layer: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    layer = layer.cuda().to(dtype)
    layer.config.params_dtype = dtype
    return layer


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
def test_law_2_fused_layer_equals_stock_layer_with_all_zero_experts(dispatcher: str, dtype: torch.dtype) -> None:
    changes = {**FUSED, "moe_token_dispatcher_type": dispatcher, "params_dtype": dtype}
    layer = dynamic_layer(layer_config(zero_expert_balance_coeff=0.0, **changes))
    twin = _on_gpu(dense_zero_twin(layer, **changes), dtype)
    layer = _on_gpu(layer, dtype)
    rows = rows_into_experts(layer)
    inputs = [tokens(64).detach().to("cuda", dtype).requires_grad_() for _ in range(2)]
    ours, theirs = (module(x)[0] for module, x in zip((layer, twin), inputs, strict=True))
    ours.float().square().sum().backward()
    theirs.float().square().sum().backward()
    # Grouped GEMMs over other row counts may choose other tilings: not necessarily the same bits.
    tolerance = {"atol": 2e-2, "rtol": 2e-2} if dtype == torch.bfloat16 else {"atol": 1e-4, "rtol": 1e-4}
    torch.testing.assert_close(ours, theirs, **tolerance)
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, **tolerance)
    stock = dict(twin.named_parameters())
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(parameter.grad, stock[name].grad, msg=name, **tolerance)
    assert 0 < rows[0] < 64 * 2 * K


def test_fused_equals_unfused_permutation() -> None:
    """The fused kernel returns rows nobody wrote when the number of permuted rows is stated as tokens x K."""
    outputs = []
    for fusion in (True, False):
        torch.manual_seed(0)
        layer = _on_gpu(dynamic_layer(layer_config(**{**FUSED, "moe_permute_fusion": fusion})), torch.float32)
        outputs.append(layer(tokens(64).detach().cuda())[0])
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-5)


def test_gpu_layer_equals_cpu_arithmetic() -> None:
    layer = _on_gpu(dynamic_layer(layer_config(**FUSED)), torch.float32).eval()
    hidden = tokens(16).detach()
    with torch.no_grad():
        output = layer(hidden.cuda())[0].cpu().double().reshape(-1, H)
    x = hidden.reshape(-1, H).double()
    parameters = {name: value.detach().cpu().double() for name, value in layer.named_parameters()}
    top = (x @ parameters["router.weight"].T).topk(K)
    weights = top.values.softmax(-1)
    expected = torch.zeros_like(x)
    for token in range(x.shape[0]):
        for slot in range(K):
            expert = int(top.indices[token, slot])
            if expert < E:
                gate, up = (x[token] @ parameters[f"experts.linear_fc1.weight{expert}"].T).chunk(2)
                act = torch.nn.functional.silu(gate) * up
                expected[token] += weights[token, slot] * (act @ parameters[f"experts.linear_fc2.weight{expert}"].T)
    torch.testing.assert_close(output, expected, atol=5e-3, rtol=5e-3)  # TF32 is allowed in the GEMMs
    assert Z > 0
