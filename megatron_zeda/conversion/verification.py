"""Do two checkpoints hold the same tensors: names, shapes, types and bits."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Protocol

import torch

from megatron_zeda.conversion.folders import MANIFEST_FILE, read_errors, sha256
from megatron_zeda.conversion.hf_folder import CONVERTIBLE, HfFolder, pieces_of
from megatron_zeda.conversion.manifest import read_manifest
from megatron_zeda.conversion.megatron_io import MegatronFolder, is_megatron_folder
from megatron_zeda.conversion.progress import progress
from megatron_zeda.conversion.safetensors_io import bytes_of
from megatron_zeda.errors import InputError, ZedaError
from megatron_zeda.models import Family, HfPiece, WeightRow

_CHUNK_VALUES = 1 << 22
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Source(Protocol):
    """Anything that gives Hugging Face pieces: a checkpoint, or what an output is to hold.

    Attributes:
        rows: the weight table.
        carried: rows of the tensors beside the model, see ``Family.carried_rows``; those that are there.
    """

    rows: list[WeightRow]
    carried: list[WeightRow]

    def read(self, piece: HfPiece) -> torch.Tensor:
        """One piece of ``rows`` or ``carried``."""
        ...

    def dtype(self, piece: HfPiece) -> torch.dtype:
        """Its type."""
        ...

    def where(self, piece: HfPiece) -> Path:
        """The file or folder it comes from, for messages."""
        ...


def verify_checkpoint(a: str | Path, b: str | Path, *, hf_config: str | Path | None = None) -> list[str]:
    """Compare two checkpoints, each a Hugging Face or a Megatron folder, tensor by tensor and bit by bit.

    A Megatron folder is compared under its Hugging Face names, in the expert layout of the other side.

    Args:
        a: the first checkpoint.
        b: the second.
        hf_config: folder with ``config.json`` for Megatron folders that no import of ours made.

    Returns:
        One line for every difference, in what the configurations say of the model or in a tensor; empty if there is
        none. Before them a line says it if the two cannot be compared so.

    Raises:
        InputError: if one of them is not a complete checkpoint.
    """
    first, second = open_checkpoint(a, hf_config), open_checkpoint(b, hf_config)
    if isinstance(first, MegatronFolder) and isinstance(second, HfFolder):
        first = MegatronFolder(a, layout=second.layout, hf_config=hf_config)
    elif isinstance(second, MegatronFolder):
        second = MegatronFolder(b, layout=first.layout, hf_config=hf_config)
    found = [*config_differences(first, second), *differences(first, second)]
    return [*_why_not_compared(first, second), *found] if found else []


def verify_files(folder: str | Path) -> list[str]:
    """Compare the files of a result of these tools with the list in its manifest, for instance after copying it.

    Returns:
        One line for every file that is missing or not as it was written; empty if there is none.

    Raises:
        InputError: for a folder without such a list, or a file that cannot be read.
    """
    folder = Path(folder)
    if not os.path.isdir(folder):
        raise InputError("no such folder", where=folder, rule="a result of these tools")
    files = read_manifest(folder).get("files")
    if not isinstance(files, dict) or not all(isinstance(record, dict) for record in files.values()):
        raise InputError(
            f"no {MANIFEST_FILE} that lists its files",
            where=folder,
            rule="results of these tools have one",
            fix="give a second folder to compare it with",
        )
    found = []
    for name in progress(sorted(files), "verify"):
        path, record = folder / name, files[name]
        if not path.is_file():
            found.append(f"{name}: missing")
            continue
        with read_errors(path):
            if path.stat().st_size != record.get("bytes"):
                found.append(f"{name}: {path.stat().st_size} bytes, and {record.get('bytes')} when it was written")
            elif sha256(path) != record.get("sha256"):
                found.append(f"{name}: another SHA-256 than when it was written")
    return found


def config_differences(first: HfFolder | MegatronFolder, second: HfFolder | MegatronFolder) -> list[str]:
    """One line for every key of ``config.json`` that makes another model of the same tensors.

    Keys with two spellings, and keys that say nothing of the model (versions, types), are no differences.
    """
    one, two, family = first.config, second.config, first.family
    if family.name != second.family.name:
        return [f"config.json: model_type is {_shown(one, 'model_type')} and {_shown(two, 'model_type')}"]
    settings, others = _model_settings(family, one), _model_settings(family, two)
    if settings == others:
        return []
    differing = sorted(key for key in {**one, **two} if one.get(key) != two.get(key))
    # A key with two spellings matters where it is taken away, and not where it is added.
    keys = [key for key in differing if _matters(family, one, two, key) and _matters(family, two, one, key)]
    if not keys:  # keys that matter only together
        return [f"{key} is {settings[key]} and {others[key]}" for key in settings if settings[key] != others[key]]
    return [f"config.json: {key} is {_shown(one, key)} and {_shown(two, key)}" for key in keys]


def differences(first: Source, second: Source) -> list[str]:
    """One line for every tensor that is not the same in both."""
    left = {str(piece): piece for piece in pieces_of(first.rows + first.carried)}
    right = {str(piece): piece for piece in pieces_of(second.rows + second.carried)}
    found = [f"{name}: only in the first" for name in left if name not in right]
    found += [f"{name}: only in the second" for name in right if name not in left]
    for name in progress([name for name in left if name in right], "verify"):
        one, two = left[name], right[name]
        if first.dtype(one) != second.dtype(two):
            found.append(f"{name}: {first.dtype(one)} and {second.dtype(two)}")
        elif one.shape != two.shape:
            found.append(f"{name}: {list(one.shape)} and {list(two.shape)}")
        else:
            wrong = _different_values(first.read(one), second.read(two))
            if wrong:
                found.append(f"{name}: {wrong} of {one.shape} values differ")
    return found


def require_equal(first: Source, second: Source, where: Path) -> None:
    """The last step of every conversion, before its result becomes visible."""
    found = differences(first, second)
    if found:
        raise ZedaError(f"verification failed, nothing was written: {found[0]}", where=where, value=len(found))


def _model_settings(family: Family, config: dict[str, Any]) -> dict[str, Any]:
    """What a configuration says of the model, in Megatron-Core's terms."""
    settings = {**family.transformer_config_kwargs(config), **family.gpt_model_kwargs(config)}
    settings.pop("init_method_std", None)  # of training from scratch
    return settings


def _matters(family: Family, config: dict[str, Any], other: dict[str, Any], key: str) -> bool:
    """Whether the other value of a key makes another model."""
    changed = {name: value for name, value in config.items() if name != key}
    if key in other:
        changed[key] = other[key]
    try:
        return _model_settings(family, changed) != _model_settings(family, config)
    except (InputError, KeyError):
        return True


def _shown(config: dict[str, Any], key: str) -> str:
    return repr(config[key]) if key in config else "missing"


def _why_not_compared(first: HfFolder | MegatronFolder, second: HfFolder | MegatronFolder) -> list[str]:
    for side in (first, second):
        if isinstance(side, HfFolder) and side.export_format not in CONVERTIBLE:
            return [f"{side.path}: an export in the {side.export_format} form is no way back; compare with --logits"]
        if isinstance(side, HfFolder) and side.fp8:
            return [f"{side.path}: its weights are rounded to FP8; compare with --logits"]
    if first.layout != second.layout:
        return [f"experts lie {first.layout} in the first and {second.layout} in the second; compare with --logits"]
    return []


def _different_values(one: torch.Tensor, two: torch.Tensor) -> int:
    """Number of elements whose bits differ (so NaN equals the same NaN, and 0 is not -0).

    Comparing makes no copy of a tensor, counting works on a piece at a time.
    """
    one, two = one.contiguous(), two.contiguous()
    if bytes_of(one) == bytes_of(two):
        return 0
    bits = [tensor.reshape(-1).view(_INTEGERS[tensor.dtype.itemsize]).split(_CHUNK_VALUES) for tensor in (one, two)]
    return sum(int((left != right).sum()) for left, right in zip(*bits, strict=True))


def open_checkpoint(path: str | Path, hf_config: str | Path | None = None) -> HfFolder | MegatronFolder:
    """Open a checkpoint of either kind; ``hf_config`` is for Megatron folders."""
    path = Path(path)
    if not os.path.isdir(path):
        raise InputError("no such folder", where=path, rule="a Hugging Face or a Megatron checkpoint folder")
    if is_megatron_folder(path):
        return MegatronFolder(path, hf_config=hf_config)
    return HfFolder(path)
