"""Law 3 of every method and control: TP 2 x PP 2 x EP 2 equals one process that sees the same global batches."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import read_tensors
from spawn import run_distributed
from training_runs import make_config, make_run, run_training

from megatron_zeda.conversion import megatron_to_hf

pytestmark = pytest.mark.distributed

LAYOUT = {
    "model.tensor_model_parallel_size": 2,
    "model.sequence_parallel": True,
    "model.pipeline_model_parallel_size": 2,
    "model.expert_model_parallel_size": 2,
}
RECOMPUTE = {
    "model.recompute_granularity": "full",
    "model.recompute_method": "uniform",
    "model.recompute_num_layers": 1,
}
RUNS: dict[str, dict[str, Any]] = {
    "net": {"zero_experts.method": "net"},
    "adamoe": {"zero_experts.method": "adamoe"},
    "copy": {"zero_experts.method": "copy", **RECOMPUTE},
    "dynamic_skipping": {"zero_experts.method": "dynamic_skipping", "zero_experts.target_skip_rate": 0.4},
    "router": {"train.trainable": "router", **RECOMPUTE},
    "response": {"zero_experts.balance_tokens": "response", "zero_experts.skip_rate_gain": 2.0},
}


def train_one(root: Path, name: str, kind: str, settings: dict[str, Any]) -> None:
    config = make_config(root, name)
    config.train.train_iters = 3
    config.optimizer.adam_eps = 1e-5  # or Adam makes whole steps of the rounding noise in gradients that are nearly 0
    if kind in ("net", "dynamic_skipping"):
        config.model.checkpoint = str(root / "teacher")
    for key, value in settings.items():
        section, field = key.split(".")
        setattr(getattr(config, section), field, value)
    run_training(config)


def run_all(rank: int, world_size: int, root: str) -> None:
    for kind, settings in RUNS.items():
        train_one(Path(root), f"{kind}-layout", kind, {**settings, **LAYOUT})


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root: Path = tmp_path_factory.mktemp("methods")
    make_run(root, num_experts_per_tok=4, tie_word_embeddings=True)
    for kind, settings in RUNS.items():
        train_one(root, kind, kind, settings)
    run_distributed(run_all, 4, str(root))
    return root


@pytest.mark.parametrize("kind", [kind for kind in RUNS if kind != "dynamic_skipping"])
def test_law_3_of_every_method(runs: Path, kind: str) -> None:
    expected, actual = (
        [json.loads(line) for line in (runs / name / "metrics.jsonl").read_text().splitlines()]
        for name in (kind, f"{kind}-layout")
    )
    assert len(expected) == len(actual) == 3
    for one, other in zip(expected, actual, strict=True):
        for key, tolerance in {"ce": 1e-5, "loss": 1e-5, "grad_norm": 1e-4}.items():
            assert other[key] == pytest.approx(one[key], rel=tolerance), (one["step"], key)
        assert other["skip_rate_per_layer"] == pytest.approx(one["skip_rate_per_layer"], abs=1e-12)
        assert other["zero_expert_weight"] == (
            None if kind == "net" else pytest.approx(one["zero_expert_weight"], rel=1e-12)
        )
    assert actual[-1]["validation"]["kl_forward"] == pytest.approx(expected[-1]["validation"]["kl_forward"], rel=1e-4)
    assert (actual[0]["zero_expert_weight"] != actual[-1]["zero_expert_weight"]) == (kind == "response")


def test_only_routers_are_trained_at_any_layout(runs: Path) -> None:
    for name in ("router", "router-layout"):
        megatron_to_hf(runs / name / "checkpoints", runs / f"{name}-hf")
    before, one, other = (read_tensors(runs / name) for name in ("student_hf", "router-hf", "router-layout-hf"))
    for key in before:
        trained = key.endswith("mlp.gate.weight")
        assert torch.equal(before[key], other[key]) != trained, key
        torch.testing.assert_close(other[key], one[key], rtol=0, atol=2e-4)


def test_every_layout_finds_the_same_beta(runs: Path) -> None:
    one, other = (
        json.loads((runs / name / "calibration.json").read_text())
        for name in ("dynamic_skipping", "dynamic_skipping-layout")
    )
    assert one["beta"] == pytest.approx(other["beta"], abs=1e-3) and 0 < one["beta"] < 1
    assert one["tokens"] == other["tokens"]
    assert one["skip_rate_per_layer"] == pytest.approx(other["skip_rate_per_layer"], abs=1e-3)
    assert one["skip_rate"] == pytest.approx(0.4, abs=0.01)
