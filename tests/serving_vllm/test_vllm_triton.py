"""The path that skips: vLLM's own Triton kernel, in Triton's interpreter, with the plugin's ids and expert map.

The two operators around it exist for GPUs only and are written here again from their sources: sorting slots by expert,
which drops those whose expert maps to -1, and the sum over a token's slots, which leaves them out.

Shapes: T tokens, D hidden, F intermediate, N real experts, Z zero experts, K slots.
"""

from __future__ import annotations

import ast
import importlib.util
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_zeda.serving.vllm.layers import SKIPPING_KERNELS, ZeroSlotRouter, class_name, expert_map
from megatron_zeda.serving.vllm.settings import ZeroExperts

T, D, F, N, Z, K, BLOCK = 12, 64, 32, 8, 4, 4, 16
MODEL = ZeroExperts(num_real=N, num_zero=Z, dial=0.0, renormalizes=False, latent_norm_eps=None)


@pytest.fixture
def kernel(tmp_path: Path) -> Any:
    """``fused_moe_kernel`` of the installed vLLM. Without a GPU vLLM does not load Triton, so its source is taken."""
    spec = find_spec("vllm")
    assert spec is not None and spec.origin is not None
    source = (Path(spec.origin).parent / "model_executor/layers/fused_moe/fused_moe.py").read_text()
    wanted = ("write_zeros_to_output", "fused_moe_kernel")
    parts = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef) and node.name in wanted]
    lines = ["import triton", "import triton.language as tl"]
    lines += [f"@triton.jit\n{ast.get_source_segment(source, node)}\n" for node in parts]
    path = tmp_path / "taken_from_vllm.py"
    path.write_text("\n".join(lines))
    module_spec = importlib.util.spec_from_file_location(path.stem, path)
    assert module_spec is not None and module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    return module.fused_moe_kernel


class _Layer:
    """Weights, tokens and a routing, and what they give in float64."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.tokens = torch.randn(T, D)
        self.w13, self.w2 = torch.randn(N, 2 * F, D) / 8, torch.randn(N, D, F) / 6
        scores, self.ids = (2 * torch.randn(T, N + Z)).softmax(-1).topk(K)
        self.weights, self.ids = scores / scores.sum(-1, keepdim=True), self.ids.int()

    def expected(self, experts: range = range(N)) -> torch.Tensor:
        """``[T, D]``: what these experts add."""
        out = torch.zeros(T, D, dtype=torch.double)
        for t in range(T):
            for weight, expert in zip(self.weights[t].double(), self.ids[t].tolist(), strict=True):
                if expert in experts:
                    gate, up = (self.w13[expert].double() @ self.tokens[t].double()).chunk(2)
                    out[t] += weight * (self.w2[expert].double() @ (torch.nn.functional.silu(gate) * up))
        return out


def _align(ids: torch.Tensor, local: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Slots sorted by expert, each expert's rows filled up to a block; slots of experts elsewhere are dropped."""
    places, rows, owners = local[ids.long()].flatten().tolist(), [], []
    for place in range(int(local.max()) + 1):
        mine = [slot for slot, found in enumerate(places) if found == place]
        mine += [ids.numel()] * (-len(mine) % BLOCK)
        rows += mine
        owners += [place] * (len(mine) // BLOCK)
    count = torch.tensor([len(rows)], dtype=torch.int32)
    return torch.tensor(rows, dtype=torch.int32), torch.tensor(owners, dtype=torch.int32), count


def _gemm(kernel: Any, a: torch.Tensor, b: torch.Tensor, slots: tuple[Any, ...], weights: Any, top_k: int) -> Any:
    """One grouped GEMM as vLLM launches it: ``[T * K, rows of b]``, NaN where nothing was written."""
    import triton
    import triton.language as tl

    rows, owners, count = slots
    out = torch.full((T * K, b.shape[1]), torch.nan)
    given = {
        "a_ptr": a, "b_ptr": b, "c_ptr": out, "topk_weights_ptr": weights,
        "sorted_token_ids_ptr": rows, "expert_ids_ptr": owners, "num_tokens_post_padded_ptr": count,
        "N": b.shape[1], "K": b.shape[2], "EM": len(rows), "num_valid_tokens": T * K,
        "stride_am": a.stride(0), "stride_ak": a.stride(1), "stride_be": b.stride(0), "stride_bk": b.stride(2),
        "stride_bn": b.stride(1), "stride_cm": out.stride(0), "stride_cn": out.stride(1),
        "BLOCK_SIZE_M": BLOCK, "BLOCK_SIZE_N": 32, "BLOCK_SIZE_K": 32, "GROUP_SIZE_M": 1, "SPLIT_K": 1,
        "MUL_ROUTED_WEIGHT": top_k == 1, "top_k": top_k, "compute_type": tl.float32,
    }  # fmt: skip
    off = {name: None if name.endswith("_ptr") else 0 for name in kernel.arg_names if name not in given}
    off |= {name: False for name in off if name.isupper() or name.startswith(("use_", "per_", "naive_"))}
    grid = (triton.cdiv(len(rows), BLOCK) * triton.cdiv(b.shape[1], 32),)
    kernel[grid](**given, **off)
    return out


def _run(kernel: Any, layer: _Layer, ids: torch.Tensor, weights: torch.Tensor, local: torch.Tensor) -> Any:
    """A layer on the experts of ``local``: outputs ``[T, D]`` and the rows that were computed."""
    slots = _align(ids, local)
    gate, up = _gemm(kernel, layer.tokens, layer.w13, slots, None, K).chunk(2, -1)
    hidden = (torch.nn.functional.silu(gate) * up).contiguous()
    out = _gemm(kernel, hidden, layer.w2, slots, weights.contiguous(), 1).view(T, K, D)
    kept = (local[ids.long()] >= 0).unsqueeze(-1)
    return out.where(kept, torch.zeros(())).sum(1), int(slots[2])


def _router(layer: _Layer, *, skips: bool) -> ZeroSlotRouter:
    name = "vllm.model_executor.layers.fused_moe.experts.triton_moe.TritonExperts"
    experts_class = type(name.rsplit(".", 1)[1], (), {"__module__": name.rsplit(".", 1)[0]})
    assert class_name(experts_class) in SKIPPING_KERNELS
    method = SimpleNamespace(moe_kernel=SimpleNamespace(fused_experts=experts_class()))
    stock = SimpleNamespace(top_k=K, _compute_routing=lambda *args, **kwargs: (layer.weights, layer.ids))
    return ZeroSlotRouter(stock, SimpleNamespace(quant_method=method), MODEL, skips=skips)


def test_zero_slots_are_dropped_before_the_gemms(kernel: Any) -> None:
    layer = _Layer()
    weights, ids = _router(layer, skips=True).select_experts(layer.tokens, torch.empty(0))
    out, computed = _run(kernel, layer, ids, weights, expert_map(N, Z, None))
    torch.testing.assert_close(out.double(), layer.expected(), atol=2e-6, rtol=0)

    hidden_weights, hidden_ids = _router(layer, skips=False).select_experts(layer.tokens, torch.empty(0))
    out, everything = _run(kernel, layer, hidden_ids, hidden_weights, torch.arange(N, dtype=torch.int32))
    torch.testing.assert_close(out.double(), layer.expected(), atol=2e-6, rtol=0)
    real = layer.ids.flatten().bincount(minlength=N + Z)[:N]
    assert computed == int(-(-real // BLOCK).sum()) * BLOCK
    assert everything > computed


@pytest.mark.parametrize("rank", [0, 1])
def test_with_expert_parallelism_every_rank_adds_its_experts(kernel: Any, rank: int) -> None:
    mine = range(rank * N // 2, (rank + 1) * N // 2)
    of_rank = torch.full((N,), -1, dtype=torch.int32)
    of_rank[mine.start : mine.stop] = torch.arange(N // 2, dtype=torch.int32)
    layer = _Layer()
    weights, ids = _router(layer, skips=True).select_experts(layer.tokens, torch.empty(0))
    expected = layer.expected(mine)
    layer.w13, layer.w2 = layer.w13[mine.start : mine.stop], layer.w2[mine.start : mine.stop]
    out, _ = _run(kernel, layer, ids, weights, expert_map(N, Z, of_rank))
    torch.testing.assert_close(out.double(), expected, atol=2e-6, rtol=0)


def test_another_kernel_than_the_layer_was_built_with_is_refused() -> None:
    layer = _Layer()
    router = _router(layer, skips=True)
    router.experts.quant_method.moe_kernel = SimpleNamespace(fused_experts=object())
    with pytest.raises(RuntimeError, match="would not skip"):
        router.select_experts(layer.tokens, torch.empty(0))


def test_what_reports_of_routed_experts_hold() -> None:
    layer, seen = _Layer(), []
    router = _router(layer, skips=False)
    router.set_capture_fn(seen.append)
    router.select_experts(layer.tokens, torch.empty(0))
    assert torch.equal(seen[0], layer.ids)  # zero experts have ids of N and more: the skip rate can be read from them
