"""The other methods on one GPU: layers against their equations, runs against a CPU's, exports in transformers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cpu_reference import METHODS, call, method_config
from forced_routing import errors
from layers import H, tokens
from method_equations import PAIRS, SCORES, build, equation

from megatron_zeda import platform
from megatron_zeda.rollout.hf_folder import load_model
from megatron_zeda.training import train

HAVE_KERNELS = platform.have_transformer_engine()
FUSED_LAYER = {"moe_grouped_gemm": True, "moe_permute_fusion": True} if HAVE_KERNELS else {}
# Norms of errors over norms, of the output and of gradients: fp32 GEMMs may run in TF32, bf16 has 8 bits.
TOLERANCES = {torch.float32: (2e-3, 4e-3), torch.bfloat16: (1.5e-2, 2e-2)}


@pytest.mark.usefixtures("megatron")
@pytest.mark.parametrize("dtype", TOLERANCES, ids=["fp32", "bf16"])
@pytest.mark.parametrize(("method", "scores"), PAIRS)
def test_a_layer_is_its_equation(method: str, scores: str, dtype: torch.dtype, record: Callable[..., None]) -> None:
    """With the router's own selections: near-ties are decided by the last bits of its logits."""
    changes = {**FUSED_LAYER, "params_dtype": dtype, **SCORES[scores]}
    layer = build(method, **changes).to(platform.device()).to(dtype)
    if layer.router.expert_bias is not None:
        layer.router.expert_bias = layer.router.expert_bias.float()
    maps: list[torch.Tensor] = []
    layer.router.register_forward_hook(lambda *call: maps.append(call[2][1].bool()))
    hidden = tokens(64).detach().to(platform.device(), dtype).requires_grad_()
    cotangent = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1)).to(hidden)
    output, _ = layer(hidden)
    output.backward(cotangent)
    x_TH = hidden.detach().reshape(-1, H).double().requires_grad_()
    gate_GH = layer.router.weight.detach().double().requires_grad_()
    wanted = equation(method, layer, x_TH, gate_GH, maps[0])
    wanted.backward(cotangent.reshape(-1, H).double())
    assert hidden.grad is not None and x_TH.grad is not None and gate_GH.grad is not None
    found = errors(
        {
            "output": output.detach().reshape(-1, H),
            "hidden": hidden.grad.reshape(-1, H),
            "router": layer.router.weight.grad,
        },
        {"output": wanted.detach(), "hidden": x_TH.grad, "router": gate_GH.grad},
    )
    record(selections=int(maps[0].sum()), **found)
    allowed, gradient = TOLERANCES[dtype]
    assert found["output"] <= allowed and max(found["hidden"], found["router"]) <= gradient, found


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CPU's run of every method, and what it started from."""
    folder: Path = tmp_path_factory.mktemp("method-runs")
    call("methods", folder)
    return folder


def metrics(root: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (root / name / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("kind", METHODS)
def test_a_run_on_the_gpu_equals_the_cpus(root: Path, kind: str, record: Callable[..., None]) -> None:
    """Held-out numbers, skip rates and the w of the controller; with the parity gate before the first step."""
    config = method_config(root, f"gpu-{kind}", kind)
    if HAVE_KERNELS:
        config.model.moe_permute_fusion, config.model.overrides = True, {"moe_grouped_gemm": True}
    config.checkpoint.export_hf = kind not in ("router", "controller")
    assert train(config) == 0
    if kind == "dynamic_skipping":
        found, wanted = (json.loads((root / n / "calibration.json").read_text()) for n in (f"gpu-{kind}", kind))
        record(beta=found["beta"], cpu_beta=wanted["beta"], skip_rate=found["skip_rate"])
        assert found["beta"] == pytest.approx(wanted["beta"], abs=0.02) and found["tokens"] == wanted["tokens"]
        assert found["skip_rate"] == pytest.approx(0.4, abs=0.02)
    else:
        gaps: dict[str, float] = {}
        for one, other in zip(metrics(root, f"gpu-{kind}"), metrics(root, kind), strict=True):
            for key in ("ce", "skip_rate", "zero_expert_weight"):
                if other[key] is not None:
                    gaps[key] = max(gaps.get(key, 0.0), abs(one[key] - other[key]) / abs(other[key]))
        record(**gaps)
        assert gaps["ce"] < 2e-2 and gaps.get("skip_rate", 0.0) < 0.1, gaps
        assert ("zero_expert_weight" in gaps) == (kind != "net") and gaps.get("zero_expert_weight", 0.0) < 0.05


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
@pytest.mark.parametrize("kind", ["net", "adamoe", "copy", "dynamic_skipping"])
def test_exports_in_transformers(root: Path, kind: str, implementation: str, record: Callable[..., None]) -> None:
    """What a CPU makes of an export the GPU makes of it, whatever runs the experts; slots of weight 0 and below too."""
    folder = root / f"gpu-{kind}" / "hf"
    if not folder.exists():
        pytest.skip("its run has not ended")
    ids = torch.arange(4 * 32).reshape(4, 32) * 11 % 96
    logits = []
    for device, experts in ((torch.device("cpu"), "eager"), (platform.device(), implementation)):
        model = load_model(folder, device=device, dtype="bfloat16")
        model.set_experts_implementation(experts)
        with torch.no_grad():
            logits.append(model(ids.to(device)).logits.float().log_softmax(-1).cpu())
    wanted, found = logits
    divergence = (wanted.exp() * (wanted - found)).sum(-1)
    record(mean_kl=float(divergence.mean()), largest=float(divergence.max()))
    assert float(divergence.mean()) < 1e-3
