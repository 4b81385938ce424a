"""Streaming safetensors: a reader that trusts nothing and a writer that plans its shards first.

The format is a length, a JSON header and the raw little-endian bytes, so both sides are plain file access: a tensor, or
one slot of a stacked tensor, is read or written without touching the rest of its file.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from megatron_zeda.conversion.folders import read_errors, write_json
from megatron_zeda.conversion.ledger import Ledger
from megatron_zeda.errors import InputError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
DEFAULT_SHARD_BYTES = 4 * 10**9
_MAX_HEADER_BYTES = 100 * 10**6

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """Type and shape of a stored tensor, and where its bytes are."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    offset: int

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


class SafetensorsReader:
    """All tensors of a Hugging Face folder: one file, or shards with an index.

    Everything that can be wrong with the files is found when the reader is made, before any weight is read.

    Raises:
        InputError: for missing, truncated or malformed files, an index that names a file outside the folder or does not
            agree with the shards, and types other than plain floating point.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.files = _weight_files(self.folder)
        self.sharded = (self.folder / INDEX_FILE).exists()
        self.tensors: dict[str, TensorInfo] = {}
        for path, names in self.files.items():
            stored = _read_header(path)
            if names is not None and names != stored.keys():
                name = min(names ^ stored.keys())
                raise InputError(
                    f"{name} is in the {'index' if name in names else 'shard'} only",
                    where=path,
                    rule=f"{INDEX_FILE} lists exactly the tensors of every shard",
                )
            self.tensors.update(stored)
        self._descriptors: dict[Path, int] = {}

    def read(self, name: str, slot: int | None = None) -> torch.Tensor:
        """Read a tensor, or its ``slot``-th entry along axis 0."""
        info = self.tensors[name]
        shape, offset = info.shape, info.offset
        if slot is not None:
            shape = info.shape[1:]
            offset += slot * math.prod(shape) * info.dtype.itemsize
        buffer = bytearray(math.prod(shape) * info.dtype.itemsize)
        view, done = memoryview(buffer), 0
        while done < len(buffer):
            with read_errors(info.file):
                count = os.preadv(self._descriptor(info.file), [view[done:]], offset + done)
            if not count:
                raise InputError("the file ended early", where=info.file, value=name, fix="download it again")
            done += count
        if not buffer:
            return torch.empty(shape, dtype=info.dtype)
        return torch.frombuffer(buffer, dtype=info.dtype).reshape(shape)

    def close(self) -> None:
        """Close the files."""
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _descriptor(self, path: Path) -> int:
        if path not in self._descriptors:
            self._descriptors[path] = os.open(path, os.O_RDONLY)
        return self._descriptors[path]


def check_inside(path: Path, folder: Path) -> None:
    """Refuse a link that leads out of a checkpoint folder.

    The one legal exception is the layout of the Hugging Face cache, where a snapshot links to ``../../blobs``.
    """
    real, home = path.resolve(), folder.resolve()
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else None
    if home not in real.parents and (blobs is None or real.parent != blobs):
        raise InputError("the file is a link that leads out of the folder", where=path, value=str(real))


def _weight_files(folder: Path) -> dict[Path, set[str] | None]:
    """Weight files -> names that the index expects in each (None without an index)."""
    index, single = folder / INDEX_FILE, folder / SINGLE_FILE
    if index.exists() and single.exists():
        raise InputError(
            f"both {SINGLE_FILE} and {INDEX_FILE} are there", where=folder, fix="remove the one that is stale"
        )
    if single.exists():
        check_inside(single, folder)
        return {single: None}
    if not index.exists():
        pickled = any(folder.glob("*.bin")) or any(folder.glob("*.pt"))
        raise InputError(
            f"neither {SINGLE_FILE} nor {INDEX_FILE} is there",
            where=folder,
            fix="convert the pickled weights to safetensors first" if pickled else "give a checkpoint with weights",
        )
    check_inside(index, folder)
    weight_map = _read_index(index)
    files: dict[Path, set[str] | None] = {}
    for file_name in sorted(set(weight_map.values())):
        path = folder / file_name
        if not path.is_file():
            raise InputError("a shard is missing", where=path, rule=f"named by {INDEX_FILE}", fix="download it again")
        check_inside(path, folder)
        files[path] = {name for name, value in weight_map.items() if value == file_name}
    return files


def _read_index(path: Path) -> dict[str, str]:
    with read_errors(path):
        data = path.read_bytes()
    weight_map = _load_json(data, path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError("`weight_map` is missing or empty", where=path)
    for name, file_name in weight_map.items():
        plain = isinstance(file_name, str) and Path(file_name).name == file_name and file_name not in ("", ".", "..")
        if not plain or not file_name.endswith(".safetensors"):
            raise InputError(
                f"the index sends {name} to a file that cannot be a shard",
                where=path,
                value=file_name,
                rule="a plain *.safetensors file name in the same folder",
            )
    return weight_map


def _read_header(path: Path) -> dict[str, TensorInfo]:
    """Parse and check one file: ranges in order, without gaps, up to exactly the end of the file."""
    truncated = InputError("the file is truncated or not safetensors", where=path, fix="download it again")
    with read_errors(path), path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 2 <= length <= min(size - 8, _MAX_HEADER_BYTES):
            raise truncated
        header = _load_json(file.read(length), path)
    header.pop("__metadata__", None)
    tensors: dict[str, TensorInfo] = {}
    position = 0
    for name, entry in sorted(header.items(), key=lambda item: _range(item[1], path)):
        begin, end = _range(entry, path)
        dtype, shape = _DTYPES.get(entry.get("dtype")), entry.get("shape")
        if dtype is None:
            raise InputError(
                f"{name} has a type that is not supported",
                where=path,
                value=entry.get("dtype"),
                rule=", ".join(_DTYPES),
            )
        if not isinstance(shape, list) or any(type(n) is not int or n < 0 for n in shape):
            raise InputError(f"{name} has no valid shape", where=path, value=shape)
        info = TensorInfo(dtype, tuple(shape), path, 8 + length + begin)
        if begin != position or end - begin != info.nbytes:
            raise InputError(f"the byte range of {name} is wrong", where=path, value=[begin, end])
        position = end
        tensors[name] = info
    if 8 + length + position != size:
        raise truncated
    return tensors


def _range(entry: Any, path: Path) -> tuple[int, int]:
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    if not isinstance(offsets, list) or len(offsets) != 2 or any(type(n) is not int or n < 0 for n in offsets):
        raise InputError("the header has an entry without valid offsets", where=path, value=entry)
    return offsets[0], offsets[1]


def _load_json(data: bytes, path: Path) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise InputError(f"{twice} is there twice", where=path)
        return result

    try:
        values = json.loads(data, object_pairs_hook=unique)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError):
        raise InputError("not valid JSON", where=path, fix="download it again") from None
    if not isinstance(values, dict):
        raise InputError("not a JSON object", where=path)
    return values


class SafetensorsWriter:
    """Write a planned set of tensors, in any order and piece by piece, into one file or several.

    Shards are filled in the order of the plan, up to ``shard_bytes`` each. :meth:`close` checks that every byte was
    written exactly once and adds the index.
    """

    def __init__(
        self,
        folder: Path,
        plan: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
        *,
        shard_bytes: int = DEFAULT_SHARD_BYTES,
        slots: Mapping[str, int] | None = None,
    ) -> None:
        """Lay out the files.

        Args:
            folder: an existing folder.
            plan: name -> (dtype, shape), in file order.
            shard_bytes: a new shard starts when a tensor would go beyond this.
            slots: tensors that are written slot by slot along axis 0 -> number of slots.
        """
        self.folder = folder
        self._slots = dict(slots or {})
        shards = _plan_shards(plan, shard_bytes)
        count = len(shards)
        self.tensors: dict[str, TensorInfo] = {}
        self._descriptors: dict[Path, int] = {}
        for number, names in enumerate(shards, start=1):
            name = SINGLE_FILE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
            self._start_file(folder / name, {tensor: plan[tensor] for tensor in names})
        entries: list[tuple[str, int | None]] = []
        for name in plan:
            entries += [(name, slot) for slot in range(self._slots[name])] if name in self._slots else [(name, None)]
        self._ledger = Ledger(entries, what="written", where=folder)

    def write(self, name: str, tensor: torch.Tensor, slot: int | None = None) -> None:
        """Write a whole tensor, or one slot of it."""
        self._ledger.tick((name, slot))
        info = self.tensors[name]
        shape = info.shape if slot is None else info.shape[1:]
        if tensor.dtype != info.dtype or tuple(tensor.shape) != shape:
            raise ValueError(f"{name}: planned {info.dtype} {shape}, got {tensor.dtype} {tuple(tensor.shape)}")
        if not tensor.numel():
            return
        data = memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        offset = info.offset + (0 if slot is None else slot * len(data))
        done = 0
        while done < len(data):
            done += os.pwrite(self._descriptors[info.file], data[done:], offset + done)

    def close(self) -> None:
        """Finish: every planned byte is on disk, and the index if there are several files."""
        self._ledger.close()
        for descriptor in self._descriptors.values():
            os.fsync(descriptor)
        files = list(self._descriptors)
        self.abandon()
        if len(files) > 1:
            weight_map = {name: info.file.name for name, info in sorted(self.tensors.items())}
            total = sum(info.nbytes for info in self.tensors.values())
            write_json(self.folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})

    def abandon(self) -> None:
        """Close the files as they are."""
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abandon()

    def _start_file(self, path: Path, plan: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        ends, position = {}, 0
        for name, (dtype, shape) in plan.items():
            ends[name] = position + math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": _DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [position, ends[name]]}
            position = ends[name]
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        self._descriptors[path] = descriptor
        os.pwrite(descriptor, len(text).to_bytes(8, "little") + text, 0)
        for name, (dtype, shape) in plan.items():
            begin = ends[name] - math.prod(shape) * dtype.itemsize
            self.tensors[name] = TensorInfo(dtype, shape, path, 8 + len(text) + begin)


def _plan_shards(plan: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, (dtype, shape) in plan.items():
        nbytes = math.prod(shape) * dtype.itemsize
        if shards[-1] and filled + nbytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += nbytes
    return shards


def total_bytes(infos: Iterable[TensorInfo]) -> int:
    """Bytes of these tensors together."""
    return sum(info.nbytes for info in infos)
