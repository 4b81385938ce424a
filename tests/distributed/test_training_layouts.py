"""Law 3, its first part: stage 1 at several layouts equals one process that sees the same global batches."""

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import read_tensors
from spawn import run_distributed
from training_runs import make_config, make_run, run_training

from megatron_zeda.conversion import megatron_to_hf, verify_checkpoint
from megatron_zeda.errors import ZedaError

pytestmark = pytest.mark.distributed


# A micro-step is four sequences over all data-parallel ranks: the balancing loss is a product of two means over it.
TP = {"model.tensor_model_parallel_size": 2, "model.sequence_parallel": True}
DP = {"train.micro_batch_size": 2}
CP = {"model.context_parallel_size": 2}
EP = {"model.expert_model_parallel_size": 2}
PP = {"model.pipeline_model_parallel_size": 2}
VIRTUAL = {**PP, "model.virtual_pipeline_model_parallel_size": 2}
RECOMPUTE = {
    "model.recompute_granularity": "full",
    "model.recompute_method": "uniform",
    "model.recompute_num_layers": 1,
}
PACKED = {"dataset.packing": True, "train.micro_batch_size": 2}
UNBALANCED = {"zero_experts.balance_coeff": 0.0}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "dp2": (2, DP),
    "dp2-plain-optimizer": (2, {**DP, "optimizer.use_distributed_optimizer": False, "ddp.overlap_grad_reduce": True}),
    # Without an evaluation, whose forward pass would gather the parameters that the checkpoint needs.
    "dp2-overlap": (
        2,
        {**DP, "ddp.overlap_grad_reduce": True, "ddp.overlap_param_gather": True, "dataset.validation": []},
    ),
    "ep2": (2, {**DP, **EP}),
    "tp2-ep2-recompute": (2, {**TP, **RECOMPUTE, **EP}),
    "cp2-ep2": (2, {**CP, **EP}),
    "pp2-virtual": (2, VIRTUAL),
    "tp2-pp2": (4, {**TP, **PP}),
    "cp2-ep2-pp2-virtual": (4, {**CP, **EP, **VIRTUAL, **RECOMPUTE, "ddp.overlap_grad_reduce": True}),
}
# The same packs as in one process.
PACKED_LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {"tp2-packed": (2, {**TP, **PACKED})}
# The reference pads: without the balancing loss, which is a product over each micro-step, all ways to
# cut a global batch into micro-batches are one objective.
UNBALANCED_LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one-packed-unbalanced": (1, {**PACKED, **UNBALANCED}),
    "cp2-ep2-packed": (2, {**CP, **EP, **PACKED, **UNBALANCED}),
    "ep2-packed": (2, {**EP, **PACKED, **UNBALANCED}),
    # Enough micro-batches for stages to send in both directions at once, which two have not.
    "pp2-virtual-rows-of-one": (2, {**VIRTUAL, **UNBALANCED, "train.micro_batch_size": 1}),
    "pp2-virtual-packed": (2, {**VIRTUAL, **PACKED, **UNBALANCED}),
    "tp2-cp2-packed": (4, {**TP, **CP, **PACKED, **UNBALANCED}),
}
REFERENCES: dict[str, dict[str, Any]] = {"one": {}, "one-packed": PACKED, "one-unbalanced": UNBALANCED}
ALL = LAYOUTS | PACKED_LAYOUTS | UNBALANCED_LAYOUTS


def run_layouts(rank: int, world_size: int, root: str, layouts: dict[str, dict[str, Any]]) -> None:
    for name, settings in layouts.items():
        train_one(Path(root), name, settings)


def run_all(root: Path, layouts: dict[str, tuple[int, dict[str, Any]]]) -> None:
    """Each in a folder of its name; those with the same number of processes share a launch."""
    for size in sorted({size for size, _ in layouts.values()}):
        settings = {name: settings for name, (world_size, settings) in layouts.items() if world_size == size}
        if size == 1:
            run_layouts(0, 1, str(root), settings)
        else:
            run_distributed(run_layouts, size, str(root), settings)


def train_one(root: Path, name: str, settings: dict[str, Any]) -> None:
    config = make_config(root, name)
    config.scheduler.lr_decay_iters = 8  # the same schedule for runs of 6 and of 8 steps
    config.optimizer.adam_eps = 1e-5  # or Adam makes whole steps of the rounding noise in gradients that are nearly 0
    for key, value in settings.items():
        section, field = key.split(".")
        setattr(getattr(config, section), field, value)
    run_training(config)


def metrics(root: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (root / name / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root: Path = tmp_path_factory.mktemp("layouts")
    make_run(root, num_layers=4)  # one for each virtual stage
    run_all(root, {name: (1, settings) for name, settings in REFERENCES.items()} | ALL)
    return root


def assert_same_course(runs: Path, name: str, reference: str, keys: dict[str, float]) -> None:
    """Every step and the held-out numbers of two runs, to relative tolerances; skip rates are counts and thus exact."""
    expected, actual = metrics(runs, reference), metrics(runs, name)
    assert len(actual) == len(expected) == 6
    for one, other in zip(expected, actual, strict=True):
        for key, tolerance in keys.items():
            assert other[key] == pytest.approx(one[key], rel=tolerance), (one["step"], key)
        assert other["skip_rate_per_layer"] == pytest.approx(one["skip_rate_per_layer"], abs=1e-12)
        assert other["lr"] == one["lr"]
    if "validation" not in actual[-1]:
        return
    one, other = expected[-1]["validation"], actual[-1]["validation"]
    assert other["tokens"] == one["tokens"]
    for key in ("ce", "kl_forward", "skip_rate"):
        assert other[key] == pytest.approx(one[key], rel=1e-4)


WITH_BALANCE = {"ce": 1e-5, "loss": 1e-5, "balance_loss": 1e-5, "grad_norm": 1e-4}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_equals_one_process(runs: Path, name: str) -> None:
    assert_same_course(runs, name, "one", WITH_BALANCE)


@pytest.mark.parametrize("name", PACKED_LAYOUTS)
def test_packed_layout_equals_one_process(runs: Path, name: str) -> None:
    assert_same_course(runs, name, "one-packed", WITH_BALANCE)


@pytest.mark.parametrize("name", UNBALANCED_LAYOUTS)
def test_other_micro_batches_are_the_same_objective(runs: Path, name: str) -> None:
    assert_same_course(runs, name, "one-unbalanced", {"ce": 1e-5, "loss": 1e-5, "grad_norm": 1e-4})


@pytest.mark.parametrize("name", ["dp2", "ep2", "tp2-pp2", "cp2-ep2", "pp2-virtual", "cp2-ep2-pp2-virtual"])
def test_one_process_goes_on_from_a_checkpoint_of_another_layout(runs: Path, name: str) -> None:
    for start in ("one", name):
        go_on(runs, start)
    assert_same_end(runs, "one-on", f"{name}-on")


def go_on(runs: Path, start: str) -> None:
    """Two more steps of a run, in one process; once."""
    if not (runs / f"{start}-on").exists():
        train_one(runs, f"{start}-on", {"checkpoint.load": str(runs / start / "checkpoints"), "train.train_iters": 8})


def assert_same_end(runs: Path, reference: str, name: str) -> None:
    expected, actual = metrics(runs, reference), metrics(runs, name)
    assert [line["step"] for line in actual] == [7, 8]
    for one, other in zip(expected, actual, strict=True):
        assert other["ce"] == pytest.approx(one["ce"], rel=1e-5)
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)
        assert other["skip_rate_per_layer"] == pytest.approx(one["skip_rate_per_layer"], abs=1e-12)


def test_a_packed_run_goes_on_from_a_checkpoint_of_another_layout(runs: Path) -> None:
    for start in ("one-packed", "tp2-packed"):
        settings = {**PACKED, "checkpoint.load": str(runs / start / "checkpoints"), "train.train_iters": 8}
        train_one(runs, f"{start}-on", settings)
    assert_same_end(runs, "one-packed-on", "tp2-packed-on")


def go_on_with_virtual_stages(rank: int, world_size: int, root: str) -> None:
    for start in ("one", "cp2-ep2"):
        settings = {"checkpoint.load": f"{root}/{start}/checkpoints", "train.train_iters": 8}
        train_one(Path(root), f"{start}-on-virtual", {**VIRTUAL, **settings})


def test_virtual_stages_go_on_from_a_checkpoint_of_another_layout(runs: Path) -> None:
    go_on(runs, "one")
    run_distributed(go_on_with_virtual_stages, 2, str(runs))
    for start in ("one", "cp2-ep2"):
        assert_same_end(runs, "one-on", f"{start}-on-virtual")


@pytest.mark.parametrize("name", ["cp2-ep2", "cp2-ep2-pp2-virtual"])
def test_exports_do_not_depend_on_the_layout(runs: Path, name: str) -> None:
    for run in ("one", name):
        if not (runs / f"{run}-hf").exists():
            megatron_to_hf(runs / run / "checkpoints", runs / f"{run}-hf")
    expected, actual = read_tensors(runs / "one-hf"), read_tensors(runs / f"{name}-hf")
    before = read_tensors(runs / "student_hf")
    assert actual.keys() == expected.keys()
    moved = 0
    for key in expected:
        torch.testing.assert_close(actual[key], expected[key], rtol=0, atol=2e-4)
        moved += bool((expected[key] - before[key]).abs().max() > 5e-3)
    assert moved == len(expected)  # the six steps of at most 1e-2 have changed every tensor, so that equality says much


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
