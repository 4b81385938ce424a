"""Checkpoints in Megatron-LM's layout, complete or visibly absent.

::

    <save>/latest_checkpointed_iteration.txt   written last
    <save>/iter_0000100/                       torch_dist, plus config.yaml and zeda_manifest.json
    <save>/hf/                                 the model's config.json and tokenizer, so that export needs nothing else

A checkpoint is written into a hidden sibling folder and renamed when it is complete. It can be loaded at another
layout: weights and optimizer states are stored in the shape of the whole model.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.distributed.checkpoint.api import CheckpointException

from megatron_zeda import platform
from megatron_zeda.config import Config, zero_expert_weight
from megatron_zeda.config_io import to_yaml
from megatron_zeda.config_megatron import pipeline_split
from megatron_zeda.conversion import megatron_io
from megatron_zeda.conversion.checksums import check_checksums
from megatron_zeda.errors import InputError, ZedaError, disk_errors
from megatron_zeda.models import family_for, load_hf_config, with_method
from megatron_zeda.models.hf_config import zero_logit_bias
from megatron_zeda.training.optimizer_state import (
    METADATA,
    allocate_adam_states,
    allocate_to_save,
    load_optimizer,
    only_data,
)
from megatron_zeda.training.setup import unwrap
from megatron_zeda.training.signals import helpers_outlive_signals


@dataclass
class Progress:
    """How far a run is.

    Attributes:
        iteration: steps done, updated or not.
        consumed_samples: samples seen.
        skipped_steps: steps whose loss or gradient was not finite.
        skipped_in_a_row: how many of them were the last ones.
        zero_expert_weight: w of the next step, where a controller moves it.
        weights: in stage 2, a name of the student's weights by what they came from.
        rollout_version: in stage 2, of the weights that sampled the latest responses.
    """

    iteration: int = 0
    consumed_samples: int = 0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    zero_expert_weight: float | None = None
    weights: str = ""
    rollout_version: str = ""


# Subclasses of RuntimeError that say nothing about a checkpoint: memory, CUDA, NCCL and gloo.
_MACHINE_ERRORS = (torch.OutOfMemoryError, torch.AcceleratorError, torch.distributed.DistError)
# How torch begins the RuntimeError about a state dict of another model.
_MISFIT = "Error(s) in loading state_dict"


@contextmanager
def _loading(folder: Path) -> Iterator[None]:
    """What can be wrong with a checkpoint, as one clear error; what is wrong with the machine stays as it is."""
    from megatron.core.dist_checkpointing.core import CheckpointingException

    try:
        yield
    except (CheckpointingException, CheckpointException, KeyError, RuntimeError) as error:
        causes = [cause for cause, _ in error.failures.values()] if isinstance(error, CheckpointException) else [error]
        for cause in causes:
            if isinstance(cause, _MACHINE_ERRORS):
                raise cause from (None if cause is error else error)
        if isinstance(error, RuntimeError) and not str(error).startswith(_MISFIT):
            raise
        reason = " ".join(str(error).split())[:300]
        raise ZedaError(
            f"the checkpoint cannot be loaded into this model: {reason}",
            where=folder,
            rule="family, shape and number of zero experts must be those of model.hf",
            fix="check that the folder is complete and belongs to this model",
        ) from error


# A writer that fails with less than this left on the disk has filled it.
_FULL_DISK_BYTES = 1 << 26


@contextmanager
def _writing(folder: Path, partial: Path) -> Iterator[None]:
    """Nothing half-written stays behind, and a full disk is one clear error.

    The writers of tensors run in threads of their own, and only the text of their errors arrives here.
    """
    done = False
    try:
        with disk_errors(folder):
            yield
        done = True
    except CheckpointException as error:
        if shutil.disk_usage(folder).free < _FULL_DISK_BYTES:
            raise ZedaError("the disk is full", where=folder, fix="free space or choose another folder") from error
        reason = " ".join(str(error).split())[-300:]
        raise ZedaError(f"the checkpoint cannot be written: {reason}", where=folder, fix="check the disk") from error
    finally:
        if not done:
            shutil.rmtree(partial, ignore_errors=True)


def _names(chunks: list[Any]) -> list[str]:
    """Megatron-LM's names of the chunks in a state dict."""
    return ["model"] if len(chunks) == 1 else [f"model{index}" for index in range(len(chunks))]


def _model_state(chunks: list[Any]) -> dict[str, Any]:
    return {
        name: megatron_io.drop_extra_state(unwrap(chunk).sharded_state_dict(metadata=dict(METADATA)))
        for name, chunk in zip(_names(chunks), chunks, strict=True)
    }


def _load_model_state(chunks: list[Any], state: dict[str, Any]) -> None:
    for name, chunk in zip(_names(chunks), chunks, strict=True):
        # Not strict: Transformer Engine's _extra_state is not stored. What is stored was checked key by key.
        unwrap(chunk).load_state_dict(state[name], strict=False)


def _check_bytes(iteration_dir: Path) -> None:
    """Nothing but data in its pickles, and no bit flipped: PyTorch looks at no checksum. Ranks share the reading."""
    metadata = megatron_io.check_pickles(iteration_dir)
    with _all_or_none(iteration_dir, "read"):
        rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        check_checksums(iteration_dir, metadata, part=rank, parts=size)


def load_weights(chunks: list[Any], folder: Path) -> None:
    """Load the weights of the latest checkpoint in ``folder`` into model chunks of any layout; a collective call.

    Raises:
        ZedaError: the folder is no checkpoint of this model, or its pickles hold anything but data.
    """
    from megatron.core import dist_checkpointing

    iteration_dir = megatron_io.latest_checkpoint_dir(folder)
    _check_bytes(iteration_dir)
    with _loading(iteration_dir):
        state = dist_checkpointing.load(_model_state(chunks), str(iteration_dir), strict="raise_unexpected")
        _load_model_state(chunks, state)


def resume_folder(config: Config) -> Path | None:
    """Where a run goes on: its own folder once it has saved there, else ``checkpoint.load``; None for a fresh run.

    Raises:
        InputError: ``checkpoint.load`` is given but holds no checkpoint.
    """
    for folder in (config.save_dir, config.load_dir):
        if (folder / megatron_io.TRACKER).is_file():
            return folder
    if config.checkpoint.load is not None:
        raise InputError(
            f"no {megatron_io.TRACKER} in this folder",
            where="checkpoint.load",
            value=config.checkpoint.load,
            fix="name a folder with a checkpoint, or remove checkpoint.load to start from model.checkpoint",
        )
    return None


_OTHER_SAMPLES = "the samples seen so far are not those that the data order skips"
_OTHER_TEACHER = "the student goes on towards another teacher, which is not compared with it again"
# Settings that decide which samples are the first ``consumed_samples`` ones, or which model has seen them.
_SAME_ON_RESUMING = (
    ("dataset", "train", _OTHER_SAMPLES),
    ("dataset", "seed", _OTHER_SAMPLES),
    ("rollout", "prompts", _OTHER_SAMPLES),
    ("rollout", "samples_per_prompt", _OTHER_SAMPLES),
    ("train", "global_batch_size", _OTHER_SAMPLES),
    ("model", "checkpoint", _OTHER_SAMPLES),
    ("teacher", "checkpoint", _OTHER_TEACHER),
)


def changed_settings(config: Config, folder: Path) -> list[str]:
    """What the run that wrote the latest checkpoint in ``folder`` had set differently, a line each."""
    path = megatron_io.latest_checkpoint_dir(folder) / "config.yaml"
    saved = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else None
    present = yaml.safe_load(to_yaml(config))
    lines = []
    for section, name, consequence in _SAME_ON_RESUMING:
        settings = saved.get(section) if isinstance(saved, dict) else None
        now = present[section][name]
        if section == "teacher" and now is None:
            continue  # nothing is compared with it any more
        if isinstance(settings, dict) and name in settings and settings[name] != now:
            lines.append(
                f"warning: {section}.{name} was {settings[name]!r} when the checkpoint was written and is "
                f"{now!r} now: {consequence}"
            )
    return lines


# ---- random states --------------------------------------------------------------------------------------------------


def _rng_state() -> dict[str, Any]:
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    return {
        "cpu": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(),
        "tracker": dict(get_cuda_rng_tracker().get_states()),
    }


def _set_rng_state(state: dict[str, Any]) -> None:
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    torch.cuda.set_rng_state(state["cuda"])
    torch.set_rng_state(state["cpu"])
    get_cuda_rng_tracker().set_states(state["tracker"])


def _sharded_rng_state() -> Any:
    from megatron.core.dist_checkpointing import ShardedObject

    world = torch.distributed.get_world_size()
    return ShardedObject("rng_state", _rng_state(), (world,), (torch.distributed.get_rank(),), replica_id=0)


# ---- saving ---------------------------------------------------------------------------------------------------------


def save_checkpoint(config: Config, chunks: list[Any], optimizer: Any, scheduler: Any, progress: Progress) -> Path:
    """Write one checkpoint on all ranks; a collective call.

    Returns:
        The iteration's folder.

    Raises:
        ZedaError: the disk is full or the folder cannot be written; the checkpoint is then absent.
    """
    from megatron.core import dist_checkpointing

    final = megatron_io.iteration_dir(config.save_dir, progress.iteration)
    partial = final.with_name(f".{final.name}.partial")
    first = torch.distributed.get_rank() == 0
    with _writing(config.save_dir, partial), helpers_outlive_signals():
        with _all_or_none(config.save_dir):
            if first:
                _begin(partial)
        state = _model_state(chunks)
        allocate_to_save(optimizer)  # of a run whose steps were all skipped so far
        state["optimizer"] = only_data(optimizer.sharded_state_dict(dict(state), metadata=dict(METADATA)))
        state |= {
            "opt_param_scheduler": scheduler.state_dict(),
            "rng_state": _sharded_rng_state(),
            "checkpoint_version": 3.0,
            "zeda_progress": asdict(progress),
            "iteration": progress.iteration,
        }
        dist_checkpointing.save(state, str(partial), content_metadata=dict(METADATA))
        with _all_or_none(config.save_dir):
            if first:
                _finish(config, partial, final, progress)
    return final


@contextmanager
def _all_or_none(folder: Path, what: str = "write") -> Iterator[None]:
    """What one rank does for all: every rank leaves the block when it is done, or raises because it failed."""
    failure: OSError | ZedaError | None = None
    try:
        yield
    except (OSError, ZedaError) as error:
        failure = error
    failures = torch.tensor(float(failure is not None), device=platform.device())
    torch.distributed.all_reduce(failures)
    if failure is not None:
        raise failure
    if failures > 0:
        raise ZedaError(f"another process could not {what} the checkpoint; its message says why", where=folder)


def _begin(partial: Path) -> None:
    """Make an empty folder, and remove what killed runs left beside it."""
    partial.parent.mkdir(parents=True, exist_ok=True)
    for left_over in partial.parent.glob(".iter_*"):
        shutil.rmtree(left_over)
    partial.mkdir()


def _finish(config: Config, partial: Path, final: Path, progress: Progress) -> None:
    """Everything beside the tensors, then the renames that make the checkpoint exist."""
    (partial / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    assert config.model.checkpoint is not None  # the rules of the configuration demand it
    source = Path(config.model.checkpoint)
    manifest = megatron_io.read_manifest(source)
    manifest.pop("files", None)  # those of the import
    manifest |= {
        "iteration": progress.iteration,
        "layout": _layout(config),
        "precision": _precision(config),
        "seed": config.train.seed,
        "zero_expert_weight": _last_weight(config, progress),
    }
    text = json.dumps(manifest, indent=2, sort_keys=True) + "\n"
    (partial / "zeda_manifest.json").write_text(text, encoding="utf-8")
    write_hf_folder(config, source / megatron_io.HF_FOLDER)
    write_atomically(config.save_dir / "zeda_manifest.json", text)
    doomed = []
    if final.exists():  # written, but the run was killed before it became the latest
        doomed.append(_hide(final))
    os.replace(partial, final)
    megatron_io.write_latest_iteration(config.save_dir, progress.iteration)
    doomed += [_hide(old) for old in _superseded(config, progress.iteration)]
    for folder in doomed:
        shutil.rmtree(folder)


def _hide(folder: Path) -> Path:
    """Make a folder absent at once; removing its files takes long."""
    hidden = folder.with_name(f".{folder.name}.deleted")
    os.replace(folder, hidden)
    return hidden


def write_hf_folder(config: Config, source: Path) -> None:
    """``<save>/hf``: a copy of the model's, with the method and the dial that the student is trained with (law 6)."""
    folder = config.save_dir / megatron_io.HF_FOLDER
    if not folder.exists():
        copy = config.save_dir / ".hf.partial"
        shutil.copytree(source, copy, dirs_exist_ok=True)
        os.replace(copy, folder)
    bias = config.zero_experts.logit_bias
    if bias is None:
        assert config.hf_dir is not None  # follows from model.checkpoint
        bias = zero_logit_bias(load_hf_config(config.hf_dir))
    values = load_hf_config(folder)
    zero = config.zero_experts
    trained = with_method(values, zero.method, target_skip_rate=zero.target_skip_rate)
    if zero_logit_bias(values) != bias:
        trained["zeda_zero_logit_bias"] = bias
    if trained != values:
        text = json.dumps(trained, indent=2, ensure_ascii=False)
        write_atomically(folder / "config.json", text + "\n")


def _superseded(config: Config, iteration: int) -> list[Path]:
    """Iterations to remove once ``iteration`` is the latest one.

    Newer ones were written by a run that was killed before it named them, and belong to another past than ours.
    """
    found = [path for path in config.save_dir.glob("iter_*") if path.name.removeprefix("iter_").isdigit()]
    by_number = sorted((int(path.name.removeprefix("iter_")), path) for path in found)
    stale = [path for number, path in by_number if number > iteration]
    kept = [path for number, path in by_number if number <= iteration]
    keep_last = config.checkpoint.keep_last
    return stale if keep_last is None else stale + kept[:-keep_last]


def _last_weight(config: Config, progress: Progress) -> float | None:
    """w that the student was trained with last, for its model card; None without zero experts."""
    if progress.zero_expert_weight is not None:
        return progress.zero_expert_weight
    assert config.hf_dir is not None  # follows from model.checkpoint
    hf_config = load_hf_config(config.hf_dir)
    family = family_for(hf_config, where=config.hf_dir)
    num_zero = family.num_zero_experts(hf_config)
    return zero_expert_weight(config, family.num_experts(hf_config), num_zero) if num_zero else None


def _layout(config: Config) -> dict[str, Any]:
    """What a rank's random states belong to."""
    sizes = {key: value for key, value in asdict(config.model).items() if key.endswith("_parallel_size") and value}
    sizes |= pipeline_split(config)
    return {**sizes, "world_size": torch.distributed.get_world_size(), "device": platform.device().type}


def _precision(config: Config) -> dict[str, str]:
    """What parameters are stored in, and what linear layers computed in: FP8 leaves no trace in the checkpoint."""
    model = config.model
    stored = "bf16" if model.bf16 else "fp32"
    return {"parameters": stored, "compute": stored if model.fp8 is None else f"fp8 {model.fp8} {model.fp8_recipe}"}


def write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.partial-{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


# ---- resuming -------------------------------------------------------------------------------------------------------


def resume(config: Config, folder: Path, chunks: list[Any], optimizer: Any, scheduler: Any) -> tuple[Progress, bool]:
    """Load the latest checkpoint of a run; a collective call.

    Returns:
        The progress, and whether the random states were restored (at the same layout only).

    Raises:
        InputError: the checkpoint was not written by a run.
        ZedaError: it does not fit this model, or its pickles hold anything but data.
    """
    from megatron.core import dist_checkpointing

    iteration_dir = megatron_io.latest_checkpoint_dir(folder)
    _check_bytes(iteration_dir)
    saved = megatron_io.read_manifest(iteration_dir)
    if "layout" not in saved:
        raise InputError(
            "this checkpoint holds weights and no training state",
            where=iteration_dir,
            rule="a run goes on from a checkpoint that a run has saved",
            fix="start a run from it with model.checkpoint",
        )
    same_layout = saved["layout"] == _layout(config)
    allocate_adam_states(optimizer)
    with _loading(iteration_dir):
        state = _model_state(chunks)
        state["optimizer"] = optimizer.sharded_state_dict(dict(state), is_loading=True, metadata=dict(METADATA))
        if same_layout:
            state["rng_state"] = _sharded_rng_state()
        state = dist_checkpointing.load(state, str(iteration_dir), strict="raise_unexpected")
        _load_model_state(chunks, state)
        load_optimizer(optimizer, state["optimizer"])
        scheduler.load_state_dict(state["opt_param_scheduler"])
        if same_layout:
            _set_rng_state(state["rng_state"])
    return Progress(**state["zeda_progress"]), same_layout
