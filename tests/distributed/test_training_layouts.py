"""Law 3, its first part: stage 1 at several layouts equals one process that sees the same global batches."""

import errno
import json
from pathlib import Path
from typing import Any

import pytest
from spawn import run_distributed
from training_runs import make_config, make_run

from megatron_zeda.conversion import megatron_to_hf, verify_checkpoint
from megatron_zeda.errors import ZedaError

pytestmark = pytest.mark.distributed


# A micro-step is four sequences over all data-parallel ranks: the balancing loss is a product of two means over it.
TP = {"model.tensor_model_parallel_size": 2, "model.sequence_parallel": True}
DP = {"train.micro_batch_size": 2}
RECOMPUTE = {
    "model.recompute_granularity": "full",
    "model.recompute_method": "uniform",
    "model.recompute_num_layers": 1,
}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "dp2": (2, DP),
    "dp2-plain-optimizer": (2, {**DP, "optimizer.use_distributed_optimizer": False, "ddp.overlap_grad_reduce": True}),
    # Without an evaluation, whose forward pass would gather the parameters that the checkpoint needs.
    "dp2-overlap": (
        2,
        {**DP, "ddp.overlap_grad_reduce": True, "ddp.overlap_param_gather": True, "dataset.validation": []},
    ),
    "ep2": (2, {**DP, "model.expert_model_parallel_size": 2}),
    "tp2-ep2-recompute": (2, {**TP, **RECOMPUTE, "model.expert_model_parallel_size": 2}),
    "tp2-pp2": (4, {**TP, "model.pipeline_model_parallel_size": 2}),
}


def run_layouts(rank: int, world_size: int, root: str) -> None:
    for name, (size, settings) in LAYOUTS.items():
        if size == world_size:
            train_one(Path(root), name, settings)


def train_one(root: Path, name: str, settings: dict[str, Any]) -> None:
    from megatron_zeda.training import train

    config = make_config(root, name)
    config.scheduler.lr_decay_iters = 8  # the same schedule for runs of 6 and of 8 steps
    for key, value in settings.items():
        section, field = key.split(".")
        setattr(getattr(config, section), field, value)
    assert train(config) == 0


def metrics(root: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (root / name / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root: Path = tmp_path_factory.mktemp("layouts")
    make_run(root)
    train_one(root, "one", {})
    for world_size in sorted({size for size, _ in LAYOUTS.values()}):
        run_distributed(run_layouts, world_size, str(root))
    return root


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_equals_one_process(runs: Path, name: str) -> None:
    expected, actual = metrics(runs, "one"), metrics(runs, name)
    assert len(actual) == len(expected) == 6
    for one, other in zip(expected, actual, strict=True):
        for key, tolerance in {"ce": 1e-5, "loss": 1e-5, "balance_loss": 1e-5, "grad_norm": 1e-4}.items():
            assert other[key] == pytest.approx(one[key], rel=tolerance), (one["step"], key)
        assert other["skip_rate_per_layer"] == pytest.approx(one["skip_rate_per_layer"], abs=1e-12)
        assert other["lr"] == one["lr"]
    if "validation" not in actual[-1]:
        return
    one, other = expected[-1]["validation"], actual[-1]["validation"]
    assert other["tokens"] == one["tokens"]
    for key in ("ce", "kl_forward", "skip_rate"):
        assert other[key] == pytest.approx(one[key], rel=1e-4)


@pytest.mark.parametrize("name", ["dp2", "ep2", "tp2-pp2"])
def test_one_process_goes_on_from_a_checkpoint_of_another_layout(runs: Path, name: str) -> None:
    for start in ("one", name):
        if not (runs / f"{start}-on").exists():
            settings = {"checkpoint.load": str(runs / start / "checkpoints"), "train.train_iters": 8}
            train_one(runs, f"{start}-on", settings)
    expected, actual = metrics(runs, "one-on"), metrics(runs, f"{name}-on")
    assert [line["step"] for line in actual] == [7, 8]
    for one, other in zip(expected, actual, strict=True):
        assert other["ce"] == pytest.approx(one["ce"], rel=1e-5)
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)
        assert other["skip_rate_per_layer"] == pytest.approx(one["skip_rate_per_layer"], abs=1e-12)


def save_on_a_full_disk(rank: int, world_size: int, root: str, name: str) -> str:
    """The message of the error that a save ends with, on every rank."""
    from megatron_zeda.training import checkpoint

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    setattr(checkpoint, name, full)  # only the first rank calls it
    try:
        train_one(Path(root), f"full{name}", {**DP, "train.train_iters": 1, "dataset.validation": []})
    except ZedaError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize("name", ["_begin", "_finish"])
def test_all_ranks_know_that_a_save_failed(runs: Path, name: str) -> None:
    first, second = run_distributed(save_on_a_full_disk, 2, str(runs), name)
    assert "the disk is full" in first
    assert "another process could not write the checkpoint" in second
    assert not list((runs / f"full{name}").glob("checkpoints/*iter*"))


def test_overlapped_parameters_are_whole_in_the_checkpoint(runs: Path) -> None:
    for name in ("dp2", "dp2-overlap"):
        megatron_to_hf(runs / name / "checkpoints", runs / f"{name}-hf")
    assert verify_checkpoint(runs / "dp2-hf", runs / "dp2-overlap-hf") == []
