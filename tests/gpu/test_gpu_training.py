"""Whole runs of stage 1 on one GPU: against a CPU, in FP8, and with every optimizer that the paper's layout needs."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cpu_reference import call
from training_runs import make_config

from megatron_zeda.conversion.pickles import check_pickles
from megatron_zeda.training import train

PRECISION_AWARE = {"optimizer.use_precision_aware_optimizer": True}
OFFLOAD = {**PRECISION_AWARE, "optimizer.optimizer_cpu_offload": True}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adam": {},
    "precision-aware": PRECISION_AWARE,
    "precision-aware, bf16 moments": {
        **PRECISION_AWARE,
        "optimizer.exp_avg_dtype": "bf16",
        "optimizer.exp_avg_sq_dtype": "bf16",
    },
    "offloaded": OFFLOAD,
    "offloaded, overlapped": {**OFFLOAD, "optimizer.overlap_cpu_optimizer_d2h_h2d": True},
    "half offloaded": {**OFFLOAD, "optimizer.optimizer_offload_fraction": 0.5},
}
WITHOUT_GPU = {"adam", "offloaded", "offloaded, overlapped"}
FP8: dict[str, dict[str, Any]] = {
    "tensorwise": {"model.fp8": "hybrid", "model.fp8_recipe": "tensorwise"},
    "blockwise": {"model.fp8": "e4m3", "model.fp8_recipe": "blockwise"},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Teacher, student, data, and a CPU's run of six fp32 steps, written by a process without GPU."""
    folder: Path = tmp_path_factory.mktemp("runs")
    call("runs", folder)
    return folder


def train_one(root: Path, name: str, settings: dict[str, Any], *, bf16: bool = True) -> list[dict[str, Any]]:
    """Six steps in ``root/name``, or what is left of them; returns the run's metrics."""
    config = make_config(root, name)
    config.model.bf16 = bf16
    for key, value in settings.items():
        section, field = key.split(".")
        setattr(getattr(config, section), field, value)
    assert train(config) == 0
    return metrics(root, name)


def metrics(root: Path, name: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (root / name / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "tokens_per_second"} for line in lines]


def largest(actual: list[dict[str, Any]], wanted: list[dict[str, Any]]) -> dict[str, float]:
    """Largest relative difference over the steps, and whether all metrics are the same bits."""
    assert [line["step"] for line in actual] == [line["step"] for line in wanted]
    table = {
        key: max(abs(a[key] - b[key]) / abs(b[key]) for a, b in zip(actual, wanted, strict=True))
        for key in ("ce", "grad_norm", "skip_rate", "balance_loss")
    }
    return {**table, "same bits": float(actual == wanted)}


def test_gpu_equals_cpu(root: Path, record: Callable[..., None]) -> None:
    """In fp32, with the parity gate before the first step. Six steps at a high learning rate amplify differences."""
    found = largest(train_one(root, "gpu", {}, bf16=False), metrics(root, "cpu"))
    record(**found)
    assert found["ce"] < 2e-2 and found["skip_rate"] < 0.1, found


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in WITHOUT_GPU else pytest.mark.hardware) for n in OPTIMIZERS]
)
def test_optimizers_resume(root: Path, name: str, record: Callable[..., None]) -> None:
    """Law 7, and the same training whatever keeps the states; a GPU may add in another order each time."""
    folder = name.replace(", ", "-").replace(" ", "-")
    alone = {"teacher.checkpoint": None, "dataset.validation": [], **OPTIMIZERS[name]}
    whole = train_one(root, f"{folder}-whole", alone)
    train_one(root, folder, {**alone, "checkpoint.save_interval": 2})
    (root / folder / "checkpoints/latest_checkpointed_iteration.txt").write_text("2")
    resumed = largest(train_one(root, folder, alone), whole)
    plain = root / "adam-whole"
    against_adam = largest(whole, metrics(root, plain.name)) if plain.exists() else {}
    record(**{f"resumed: {k}": v for k, v in resumed.items()}, **{f"adam: {k}": v for k, v in against_adam.items()})
    assert resumed["ce"] < 1e-3 and resumed["grad_norm"] < 1e-2, resumed
    assert against_adam.get("ce", 0.0) < (5e-2 if "moments" in name else 1e-2), against_adam


@pytest.mark.hardware
@pytest.mark.parametrize("recipe", FP8)
def test_fp8_training(root: Path, recipe: str, record: Callable[..., None]) -> None:
    """FP8 is compute only: the parity gate passes, and checkpoints hold bf16 weights and fp32 masters."""
    sixteen = train_one(root, f"bf16-for-{recipe}", {})
    found = largest(train_one(root, recipe, FP8[recipe]), sixteen)
    record(**found)
    assert found["ce"] < 0.1 and not found["same bits"], found
    entries = check_pickles(root / recipe / "checkpoints/iter_0000006").state_dict_metadata
    tensors = {key: entry.properties.dtype for key, entry in entries.items() if hasattr(entry, "properties")}
    weights = {dtype for key, dtype in tensors.items() if not key.startswith("optimizer.")}
    assert weights == {torch.bfloat16}
    assert {dtype for key, dtype in tensors.items() if key.startswith("optimizer.state.")} == {torch.float32}
