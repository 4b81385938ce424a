"""The benchmarks run at tiny sizes and write what they promise. What they measure is not tested: tests time nothing."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_zeda.conversion import verify_checkpoint
from megatron_zeda.models import HfConfig, family_for

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
pytestmark = pytest.mark.usefixtures("megatron")


@pytest.fixture(autouse=True)
def _own_modules(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The scripts import their neighbours, as scripts do. What they change in this process is put back."""
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    from megatron_zeda.zero_experts import set_loss_tokens

    threads = torch.get_num_threads()
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import side_by_side

    monkeypatch.setattr(side_by_side, "_keep_freed_memory", lambda: None)
    # A backward pass of its own leaves a scalar here, Megatron's schedules a vector, and neither takes the other's.
    monkeypatch.setattr(MoEAuxLossAutoScaler, "main_loss_backward_scale", None)
    yield
    torch.set_num_threads(threads)
    set_loss_tokens(None)
    for name in ("conversion", "kl", "moe_layer", "step", "side_by_side", "zero_expert_layers"):
        sys.modules.pop(name, None)


def _run(script: Any, arguments: list[str], output: Path) -> dict[str, Any]:
    script.main([*arguments, "--threads", "1", "--output", str(output)])
    return json.loads(output.read_text())


def test_moe_layer_writes_ratios_memory_and_targets(tmp_path: Path) -> None:
    import moe_layer

    arguments = ["--shape", "tiny", "--tokens", "64", "--skip-rates", "0", "0.5", "--rounds", "2"]
    record = _run(moe_layer, arguments, tmp_path / "layer.json")
    assert {"cpu", "cores", "memory_gib", "versions", "date", "revision"} <= record["machine"].keys()
    assert str(Path.home()) not in json.dumps(record["machine"])
    (result,) = record["results"]
    none, half = result["skip_rates"]
    assert none["skip_rate"] == 0.0 and half["skip_rate"] == pytest.approx(0.5, abs=0.01)
    for entry in (none, half):
        ratio = entry["dynamic_over_stock"]
        assert 0 < ratio["min"] <= ratio["median"] <= ratio["max"]
    # Half of the routed rows and their activations are gone; the router's own stay, so it is not half.
    assert 0.4 < half["saved_activation_bytes"] / none["saved_activation_bytes"] < 0.75
    assert "raises RuntimeError" in record["settings"]["slicing_with_the_stock_dispatcher"]
    assert [target["limit"] for target in record["targets"]] == [1.03, 0.03]


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_compared_layers_compute_the_same(score: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At no skip the dynamic layer is the stock one, and at any skip the naive one, weights being shared."""
    import zero_expert_layers as compared

    shape = compared.SHAPES["tiny"] | {"moe_router_score_function": score}
    shape["moe_router_enable_expert_bias"] = score == "sigmoid"
    monkeypatch.setitem(compared.SHAPES, "tiny", shape)
    device = torch.device("cpu")
    dynamic = compared.dynamic_layer("tiny", device)
    stock = compared.stock_layer(dynamic, "tiny", device)
    dense = compared.dense_zeros_layer(dynamic, "tiny", device)
    hidden = torch.randn(32, 1, shape["hidden_size"], dtype=torch.bfloat16)
    outputs = {}
    for rate in (0.0, 0.5):
        compared.turn_dial(dynamic.router, hidden, rate)
        outputs[rate] = dynamic(hidden)[0]
    assert torch.equal(outputs[0.0], stock(hidden)[0])
    assert not torch.equal(outputs[0.0], outputs[0.5])
    dynamic.router.zero_logit_bias = 0.0
    torch.testing.assert_close(dense(hidden)[0], dynamic(hidden)[0], atol=1e-3, rtol=2e-2)
    with pytest.raises(RuntimeError, match="split"):
        compared.naive_layer(dynamic, "tiny", device)(hidden)


def test_step_writes_ratios(tmp_path: Path) -> None:
    import step

    arguments = ["--size", "tiny", "--seq-length", "16", "--rounds", "1", "--skip-rates", "0", "0.5"]
    record = _run(step, arguments, tmp_path / "step.json")
    none, half = record["results"]["skip_rates"]
    assert none["skip_rate"] == 0.0 and half["skip_rate"] == pytest.approx(0.5, abs=0.02)
    assert record["settings"]["tokens_per_step"] == 2 * 4 * 16
    assert record["targets"][0]["limit"] == 1.03


def test_conversion_writes_ratios_and_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import conversion

    def in_this_process(operation: str, source: Path, target: Path, profile: int = 0) -> dict[str, float]:
        shutil.rmtree(target, ignore_errors=True)
        return conversion.child(operation, source, target, profile) | {"seconds_with_start": 1.0}

    monkeypatch.setattr(conversion, "in_child", in_this_process)
    monkeypatch.setattr(os, "sync", lambda: None)
    monkeypatch.setattr(sys, "argv", ["conversion.py"])
    output = tmp_path / "result.json"
    arguments = ["--shape", "tiny", "--folder", str(tmp_path / "work"), "--rounds", "2", "--shard-bytes", "1_000_000"]
    conversion.main([*arguments, "--keep", "--output", str(output)])
    record = json.loads(output.read_text())
    assert [result["operation"] for result in record["results"]] == ["inject", "import", "export"]
    for result in record["results"]:
        assert result["bytes"] > 2_000_000 and result["files"] > 3
        ratio = result["conversion_over_copy"]
        assert 0 < ratio["min"] <= ratio["median"] <= ratio["max"]
        assert result["conversion"]["gigabytes_per_second"]["median"] > 0
    assert [target["limit"] for target in record["targets"]][1::2] == [2.0, 2.0]
    folder = tmp_path / "work/tiny-2"
    assert sorted(path.name for path in folder.iterdir()) == ["megatron", "source"]
    assert verify_checkpoint(folder / "source", folder / "megatron") == []


def test_conversion_is_measured_at_real_sizes() -> None:
    import conversion

    for shape in ("qwen3-30b-a3b", "glm-4.7-flash"):
        config = HfConfig(conversion.CONFIGS[shape], where=shape)
        rows = family_for(config).weight_table(config)
        assert 2 * sum(row.numel for row in rows) > (4e9 if shape == "qwen3-30b-a3b" else 2.5e9)


def test_spread_and_ratio() -> None:
    import side_by_side

    assert side_by_side.spread([3.0, 1.0, 2.0]) == {"median": 2.0, "min": 1.0, "max": 3.0}
    assert side_by_side.ratio([2.0, 3.0], [4.0, 3.0]) == {"median": 0.75, "min": 0.5, "max": 1.0}
    assert side_by_side.ratio([3.0], [5.0], offset=1.0)["median"] == 0.5


def test_kl_compares_time_and_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import kl

    monkeypatch.setitem(sys.modules, "modelopt", None)  # its import takes seconds and changes this process
    arguments = ["--vocabulary", "300", "--hidden-size", "8", "--tokens", "16", "--rounds", "2"]
    record = _run(kl, arguments, tmp_path / "kl.json")
    assert record["settings"]["not_compared"].keys() == {"modelopt", "liger"}
    for direction in ("forward", "reverse"):
        logits, hidden = record["results"][direction]["logits"], record["results"][direction]["hidden_states"]
        assert logits["seconds"].keys() == {"plain torch", "ours"} and logits["seconds"]["ours"]["min"] > 0
        assert logits["ours_over"]["ours"]["plain torch"]["peak_bytes"] < 1
        # bf16 logits of both, fp32 log-probabilities, ...: what the definition holds at once is at least this
        assert logits["peak_fp32_copies_of_logits"]["plain torch"] > 3
        assert hidden["ours_over"].keys() == {"ours", "ours, fused"}
    assert len(record["targets"]) == 8
