"""The teacher in the training step on one GPU: against a CPU, in host memory, in FP8."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cpu_reference import call, run_config

from megatron_zeda import platform
from megatron_zeda.models import load_hf_config
from megatron_zeda.training import setup, train
from megatron_zeda.training import teacher as teachers

TERMS: dict[str, Any] = {
    "distillation.cross_entropy": 0.3,
    "distillation.forward_kl": 0.5,
    "distillation.reverse_kl": 0.8,
    "train.train_iters": 3,
}
WIDE: dict[str, Any] = {**TERMS, "model.bf16": True, "model.seq_length": 128}
FUSED: dict[str, Any] = {"model.moe_permute_fusion": True, "model.overrides": {"moe_grouped_gemm": True}}


@pytest.fixture(scope="module")
def wide_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Teacher, student and data of the sizes that FP8 takes, written by a process without GPU."""
    folder: Path = tmp_path_factory.mktemp("wide-teacher")
    call("wide", folder)
    return folder


def train_one(root: Path, name: str, settings: dict[str, Any]) -> list[dict[str, Any]]:
    kernels = FUSED if platform.have_transformer_engine() else {}
    assert train(run_config(root, name, {**settings, **kernels})) == 0
    lines = (root / name / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "tokens_per_second"} for line in lines]


def test_a_teacher_in_host_memory_is_the_same_teacher(wide_root: Path, record: Callable[..., None]) -> None:
    resident = train_one(wide_root, "resident", WIDE)
    hosted = train_one(wide_root, "hosted", {**WIDE, "teacher.placement": "host"})
    gaps = {
        key: max(abs(a[key] - b[key]) for a, b in zip(resident, hosted, strict=True)) for key in ("ce", "kl_forward")
    }
    record(**gaps)
    # Kernels of the backward pass may add in another order; the first step is before any of them.
    assert resident[0]["kl_forward"] == pytest.approx(hosted[0]["kl_forward"], rel=1e-5)
    assert gaps["ce"] < 0.05 and gaps["kl_forward"] < 0.05


@pytest.mark.hardware
def test_the_device_memory_of_a_hosted_teacher_is_free_between_passes(
    wide_root: Path, record: Callable[..., None]
) -> None:
    config = run_config(wide_root, "memory", {**WIDE, **FUSED, "teacher.placement": "host"})
    created = setup.start_processes(config)
    try:
        before = torch.cuda.memory_allocated()
        teacher = teachers.build(config, load_hf_config(wide_root / "student" / "hf"))
        assert teacher is not None and teacher._host is not None
        between = torch.cuda.memory_allocated() - before
        with teacher._host.on_device():
            during = torch.cuda.memory_allocated() - before
        record(weights=teacher.num_bytes, between=between, during=during)
        assert during >= teacher.num_bytes > 20 * between
        assert all(parameter.is_pinned() for parameter in teacher.chunks[0].parameters())
    finally:
        setup.end_processes(created)


@pytest.mark.hardware
@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise"])
@pytest.mark.parametrize("student", ["bf16", "fp8"])
def test_an_fp8_teacher(wide_root: Path, recipe: str, student: str, record: Callable[..., None]) -> None:
    """The gate passes in one precision, and the KL of the step is that of the other teacher to the precision of FP8."""
    fp8 = "hybrid" if recipe == "tensorwise" else "e4m3"
    model = {"model.fp8": fp8, "model.fp8_recipe": recipe} if student == "fp8" else {}
    other: dict[str, Any] = {"teacher.fp8": "none"} if student == "fp8" else {"teacher.fp8": fp8}
    if student == "bf16":
        other["teacher.fp8_recipe"] = recipe
    same = train_one(wide_root, f"{student}-{recipe}-same", {**WIDE, **model})
    mixed = train_one(wide_root, f"{student}-{recipe}-mixed", {**WIDE, **model, **other})
    gap = abs(same[0]["kl_forward"] - mixed[0]["kl_forward"])
    record(same=same[0]["kl_forward"], mixed=mixed[0]["kl_forward"])
    assert 0 < gap < 0.05
