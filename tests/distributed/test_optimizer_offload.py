"""Adam states in host memory: the same run as without, saved and resumed exactly, also at another layout.

On a CPU everything is in host memory already; what runs here is Megatron-Core's bookkeeping (which copy belongs to
which parameter, what a checkpoint holds of it), not the transfers.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from spawn import run_distributed
from training_runs import make_config, make_run, run_training

from megatron_zeda.conversion import megatron_to_hf, verify_checkpoint
from megatron_zeda.conversion.pickles import check_pickles

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

OFFLOAD = {"optimizer.use_precision_aware_optimizer": True, "optimizer.optimizer_cpu_offload": True}
OVERLAP = {**OFFLOAD, "optimizer.overlap_cpu_optimizer_d2h_h2d": True}
TWO = {"train.micro_batch_size": 2}
# With experts split over ranks Megatron-Core chains two optimizers.
EP2 = {**TWO, "model.expert_model_parallel_size": 2}


def train_one(root: Path, name: str, settings: dict[str, Any]) -> None:
    """Five bf16 steps in ``root/name``, or what is left of them."""
    config = make_config(root, name)
    config.model.bf16 = True
    config.teacher.checkpoint, config.dataset.validation = None, []
    config.train.train_iters = 5
    config.scheduler.lr_decay_iters = 5
    for key, value in settings.items():
        section, field = key.split(".")
        setattr(getattr(config, section), field, value)
    run_training(config)


def train_resumed(root: Path, name: str, settings: dict[str, Any]) -> None:
    """As :func:`train_one`, saving after step 2 too, then once more from there."""
    settings = {**settings, "checkpoint.save_interval": 2}
    train_one(root, name, settings)
    (root / name / "checkpoints/latest_checkpointed_iteration.txt").write_text("2")
    train_one(root, name, settings)


def metrics(root: Path, name: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (root / name / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "tokens_per_second"} for line in lines]


def hf(root: Path, name: str) -> Path:
    """The weights at the end of a run."""
    folder = root / f"{name}-hf"
    if not folder.exists():
        megatron_to_hf(root / name / "checkpoints", folder)
    return folder


def assert_same_up_to_rounding(root: Path, one: str, other: str) -> None:
    """States in host memory are updated by torch's fused AdamW, others by its plain one: a bf16 may round otherwise."""
    for expected, actual in zip(metrics(root, one), metrics(root, other), strict=True):
        for key in ("ce", "grad_norm", "balance_loss", "skip_rate"):
            assert actual[key] == pytest.approx(expected[key], rel=1e-3), (expected["step"], key)
        assert actual["lr"] == expected["lr"]
    differing = values = 0
    for file in sorted(hf(root, one).glob("*.safetensors")):
        theirs = load_file(hf(root, other) / file.name)
        for name, weight in load_file(file).items():
            torch.testing.assert_close(theirs[name], weight, rtol=2**-7, atol=1e-4)
            differing += int((theirs[name] != weight).sum())
            values += weight.numel()
    assert differing <= values / 100


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("offload")
    make_run(folder)
    train_one(folder, "plain", {})
    train_one(folder, "offload", OFFLOAD)
    return folder


def test_the_run_is_the_one_without_offload(root: Path) -> None:
    assert_same_up_to_rounding(root, "plain", "offload")


@pytest.mark.parametrize("name", ["in-order", "overlapped"])
def test_law_7_a_resumed_run_is_the_uninterrupted_one(root: Path, name: str) -> None:
    train_resumed(root, name, OVERLAP if name == "overlapped" else OFFLOAD)
    assert metrics(root, name) == metrics(root, "offload")
    assert verify_checkpoint(hf(root, name), hf(root, "offload")) == []


def test_checkpoints_hold_data_and_fp32_masters(root: Path) -> None:
    folder = root / "offload/checkpoints/iter_0000005"
    metadata = check_pickles(folder)  # refuses the classes that Megatron-Core would have written
    entries = metadata.state_dict_metadata
    weights = {key for key in entries if key.startswith("optimizer.state.param.")}
    assert weights and all(entries[key].properties.dtype == torch.float32 for key in weights)
    for moment in ("exp_avg", "exp_avg_sq"):
        assert {key.replace("state.param.", f"state.{moment}.") for key in weights} <= set(entries)


def test_offload_can_be_turned_on_and_off_between_runs(root: Path) -> None:
    """The file format is the same with and without."""
    for start, settings in (("plain", OFFLOAD), ("offload", {})):
        on = {"checkpoint.load": str(root / start / "checkpoints"), "train.train_iters": 7}
        train_one(root, f"{start}-on", {**on, **settings})
    assert_same_up_to_rounding(root, "plain-on", "offload-on")
    assert [line["step"] for line in metrics(root, "plain-on")] == [6, 7]


def two_ranks(rank: int, world_size: int, root: str) -> None:
    train_one(Path(root), "ep2-plain", EP2)
    train_one(Path(root), "ep2-one-go", {**EP2, **OFFLOAD})
    train_one(Path(root), "ep2", {**EP2, **OFFLOAD, "train.train_iters": 2})
    train_one(Path(root), "ep2", {**EP2, **OFFLOAD})


def test_two_ranks_and_one_that_goes_on_from_them(root: Path) -> None:
    run_distributed(two_ranks, 2, str(root))
    assert metrics(root, "ep2") == metrics(root, "ep2-one-go")
    assert verify_checkpoint(hf(root, "ep2"), hf(root, "ep2-one-go")) == []
    assert_same_up_to_rounding(root, "ep2-plain", "ep2")
    for start in ("ep2-plain", "ep2"):
        on = {"checkpoint.load": str(root / start / "checkpoints"), "train.train_iters": 7}
        train_one(root, f"{start}-on", {**on, **(OFFLOAD if start == "ep2" else {})})
    assert_same_up_to_rounding(root, "ep2-plain-on", "ep2-on")
