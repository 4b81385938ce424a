"""Law 3 with the teacher in the step: every layout gives the objective, its terms and the gradient of one process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from checkpoints import read_tensors
from spawn import run_distributed
from test_training_layouts import CP, DP, EP, PACKED, PP, TP, UNBALANCED, VIRTUAL, train_one
from training_runs import make_run

from megatron_zeda.conversion import megatron_to_hf

pytestmark = pytest.mark.distributed

# Every term, at another temperature, in chunks that do not divide the tokens.
TERMS = {
    "distillation.cross_entropy": 0.3,
    "distillation.forward_kl": 0.5,
    "distillation.reverse_kl": 0.8,
    "distillation.temperature": 1.5,
    "distillation.chunk_size": 5,
    "train.train_iters": 3,
}
TOPK = {"distillation.estimator": "topk", "distillation.topk": 7}
HOST = {"teacher.placement": "host"}
OVERLAP = {"ddp.overlap_grad_reduce": True, "ddp.overlap_param_gather": True}
# By the run of one process they must equal. Two micro-batches of four sequences over all data-parallel ranks; the
# balancing loss is a product of two means over each, so that other micro-batches need runs without it.
LAYOUTS: dict[str, tuple[str, dict[str, Any]]] = {
    "tp2-ep2-pp2": ("one", {**TP, **EP, **PP, **HOST}),
    "dp2-tp2-ep2": ("one", {**DP, **TP, **EP, **OVERLAP}),
    "cp2-ep2-pp2-virtual": ("one", {**CP, **EP, **VIRTUAL}),
    "dp2-ep2-pp2-packed": ("one-unbalanced", {**EP, **PP, **PACKED, **UNBALANCED}),
    "tp4-topk": ("one-topk", {"model.tensor_model_parallel_size": 4, "model.sequence_parallel": True, **EP, **TOPK}),
}
REFERENCES: dict[str, dict[str, Any]] = {"one": {}, "one-unbalanced": UNBALANCED, "one-topk": TOPK}
# The output layer's weight is the embedding's, which is on the first pipeline stage.
TIED = "tp2-pp2-tied"


def run_layouts(rank: int, world_size: int, root: str) -> None:
    for name, (_, settings) in LAYOUTS.items():
        train_one(Path(root), name, TERMS | settings)
    train_one(Path(root) / "tied", TIED, TERMS | TP | PP)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root: Path = tmp_path_factory.mktemp("distillation")
    make_run(root, num_layers=4, num_key_value_heads=4)
    (root / "tied").mkdir()
    make_run(root / "tied", tie_word_embeddings=True)
    for name, settings in REFERENCES.items():
        train_one(root, name, TERMS | settings)
    train_one(root / "tied", "one", TERMS)
    run_distributed(run_layouts, 4, str(root))
    return root


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", [*LAYOUTS, TIED])
def test_law_3_the_teacher_in_the_step_equals_one_process(runs: Path, name: str) -> None:
    root, reference = (runs / "tied", "one") if name == TIED else (runs, LAYOUTS[name][0])
    expected, actual = metrics(root / reference), metrics(root / name)
    assert len(actual) == len(expected) == 3
    for one, other in zip(expected, actual, strict=True):
        assert one["kl_forward"] > 1e-3 and one["kl_reverse"] > 1e-3
        for key, tolerance in {"loss": 1e-5, "ce": 1e-5, "kl_forward": 1e-4, "kl_reverse": 1e-4}.items():
            assert other[key] == pytest.approx(one[key], rel=tolerance), (one["step"], key)
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=2e-4)
        assert other["skip_rate_per_layer"] == pytest.approx(one["skip_rate_per_layer"], abs=1e-12)
    for key in ("ce", "kl_forward"):
        assert actual[-1]["validation"][key] == pytest.approx(expected[-1]["validation"][key], rel=1e-4)


@pytest.mark.parametrize("name", ["tp2-ep2-pp2", "cp2-ep2-pp2-virtual"])
def test_the_weights_after_three_steps_are_those_of_one_process(runs: Path, name: str) -> None:
    for run in ("one", name):
        if not (runs / f"{run}-hf").exists():
            megatron_to_hf(runs / run / "checkpoints", runs / f"{run}-hf")
    expected, actual, before = (read_tensors(runs / folder) for folder in ("one-hf", f"{name}-hf", "student_hf"))
    assert actual.keys() == expected.keys() == before.keys()  # nothing of the teacher is among them
    assert sum(bool((expected[key] - before[key]).abs().max() > 2e-3) for key in expected) > len(expected) / 2
    assert max(float((actual[key] - expected[key]).abs().max()) for key in expected) < 2e-4
