"""Streaming safetensors: a reader that trusts nothing and a writer of one planned file.

The format is a length, a JSON header and the raw little-endian bytes, so both sides are plain file access: a tensor, or
one slot of a stacked tensor, is read or written without touching the rest of its file.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from megatron_zeda.conversion.disk_file import DiskFile, DiskFiles, DiskWriter
from megatron_zeda.conversion.folders import read_errors
from megatron_zeda.conversion.ledger import Ledger
from megatron_zeda.errors import InputError, ZedaError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_MAX_HEADER_BYTES = 100 * 10**6

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_FP8 = {"F8_E4M3": torch.float8_e4m3fn}
_DTYPE_NAMES = {dtype: name for name, dtype in (_DTYPES | _FP8).items()}

TensorPlan = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
"""Name -> type and shape, in file order."""


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

    def part(self, slot: int | None) -> tuple[tuple[int, ...], int, int]:
        """Shape, offset in the file and bytes of the tensor, or of one slot along axis 0."""
        if slot is None:
            return self.shape, self.offset, self.nbytes
        nbytes = math.prod(self.shape[1:]) * self.dtype.itemsize
        return self.shape[1:], self.offset + slot * nbytes, nbytes


class SafetensorsReader:
    """All tensors of a Hugging Face folder (one file, or shards with an index), or those of one file of a folder.

    Everything that can be wrong with the files is found when the reader is made, before any weight is read.

    Raises:
        InputError: for missing, truncated or malformed files, an index that names a file outside the folder or does not
            agree with the shards, and types other than plain floating point.
    """

    def __init__(self, folder: str | Path, *, file: str | None = None, fp8: bool = False) -> None:
        """Open and check.

        Args:
            folder: the checkpoint.
            file: read this file only, whatever else is there.
            fp8: accept E4M3 too.
        """
        self.folder = Path(folder)
        self.files = _weight_files(self.folder) if file is None else {self.folder / file: None}
        self.sharded = (self.folder / INDEX_FILE).exists()
        self.tensors: dict[str, TensorInfo] = {}
        for path, names in self.files.items():
            stored = _read_header(path, _DTYPES | (_FP8 if fp8 else {}))
            if names is not None and names != stored.keys():
                name = min(names ^ stored.keys())
                raise InputError(
                    f"{name} is in the {'index' if name in names else 'shard'} only",
                    where=path,
                    rule=f"{INDEX_FILE} lists exactly the tensors of every shard",
                )
            self.tensors.update(stored)
        self._numbers = {path: number for number, path in enumerate(self.files)}
        self.disk = DiskFiles()

    def read(self, name: str, slot: int | None = None) -> torch.Tensor:
        """Read a tensor, or its ``slot``-th entry along axis 0."""
        info = self.tensors[name]
        shape, offset, nbytes = info.part(slot)
        return self.disk.read(info.file, offset, nbytes).view(info.dtype).reshape(shape)

    def place(self, name: str, slot: int | None = None) -> tuple[int, int]:
        """Where a tensor or a slot lies: number of its file, offset in it. Reading goes fastest in this order."""
        info = self.tensors[name]
        return self._numbers[info.file], info.part(slot)[1]

    def close(self) -> None:
        """Close the files."""
        self.disk.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


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


def _read_header(path: Path, dtypes: Mapping[str, torch.dtype]) -> dict[str, TensorInfo]:
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
        dtype, shape = dtypes.get(entry.get("dtype")), entry.get("shape")
        if dtype is None:
            raise InputError(
                f"{name} has a type that is not supported",
                where=path,
                value=entry.get("dtype"),
                rule=", ".join(dtypes),
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
    """Write one planned file, piece by piece in the order of the file, then read it back.

    Every planned byte must be written exactly once. :meth:`verify` reads the file from the disk, past the memory that
    the system keeps of it, at the places where :class:`SafetensorsReader` finds the tensors: every piece must have the
    checksum of what the source gave.
    """

    def __init__(self, path: Path, plan: TensorPlan, *, slots: Mapping[str, int] | None = None) -> None:
        """Lay out the file.

        Args:
            path: a file in an existing folder; replaced if it is there.
            plan: name -> (dtype, shape), in file order.
            slots: tensors that are written slot by slot along axis 0 -> number of slots.
        """
        self.path = path
        self._slots = {name: count for name, count in (slots or {}).items() if name in plan}
        parts = [(name, slot) for name in plan for slot in self._parts(name)]
        self._ledger = Ledger(parts, what="written", where=path)
        self._checksums: dict[tuple[str, int | None], int] = {}
        self.tensors = _layout(path, plan)
        self._file = DiskWriter(path)
        try:
            self._file.write(header_of(plan))
        except BaseException:
            self.abandon()
            raise

    def write(self, name: str, tensor: torch.Tensor, slot: int | None = None, *, checksum: int | None = None) -> None:
        """Write a whole tensor, or one slot of it.

        ``checksum`` is the :func:`checksum` of what the source gave, by default of ``tensor``.
        """
        self._ledger.tick((name, slot))
        info = self.tensors[name]
        shape, offset, _ = info.part(slot)
        if offset != self._file.tell():
            raise ZedaError(f"the piece before {name} was never written", where=self.path)
        if tensor.dtype != info.dtype or tuple(tensor.shape) != shape:
            raise ValueError(f"{name}: planned {info.dtype} {shape}, got {tensor.dtype} {tuple(tensor.shape)}")
        data = bytes_of(tensor)
        self._checksums[name, slot] = zlib.crc32(data) if checksum is None else checksum
        self._file.write(data)

    def close(self) -> None:
        """Every planned byte is on the disk."""
        try:
            self._ledger.close()
            self._file.close()
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Close the file as it is."""
        self._file.abandon()

    def verify(self) -> str:
        """Read the closed file back from the disk; return its SHA-256.

        Raises:
            ZedaError: if a tensor is not what was written.
        """
        with DiskFile(self.path) as file, SafetensorsReader(self.path.parent, file=self.path.name, fp8=True) as reader:
            if reader.tensors != self.tensors:
                raise ZedaError("verification failed: the header is not what was written", where=self.path)
            for (name, slot), expected in self._checksums.items():
                if self._read_back(reader.tensors[name], slot, file) != expected:
                    piece = name if slot is None else f"{name}[{slot}]"
                    raise ZedaError(
                        f"verification failed: {piece} was not read back as the source gave it",
                        where=self.path,
                        fix="run the command again; if it fails again, suspect the disk or the memory",
                    )
        return self._file.sha256()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abandon()

    @staticmethod
    def _read_back(info: TensorInfo, slot: int | None, file: DiskFile) -> int:
        """The checksum of a piece on the disk."""
        _, offset, nbytes = info.part(slot)
        found = 0
        for part in file.parts(offset, nbytes):
            found = zlib.crc32(part, found)
        return found

    def _parts(self, name: str) -> Iterable[int | None]:
        return range(self._slots[name]) if name in self._slots else (None,)


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor, without a copy if it is contiguous and on the CPU."""
    return memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def checksum(tensor: torch.Tensor) -> int:
    """CRC-32 of the bytes of a tensor: what is kept of it between reading and verifying."""
    return zlib.crc32(bytes_of(tensor))


def header_of(plan: TensorPlan) -> bytes:
    """The length and the JSON header of a file with these tensors."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, (dtype, shape) in plan.items():
        end = position + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _layout(path: Path, plan: TensorPlan) -> dict[str, TensorInfo]:
    tensors, offset = {}, len(header_of(plan))
    for name, (dtype, shape) in plan.items():
        tensors[name] = TensorInfo(dtype, shape, path, offset)
        offset += tensors[name].nbytes
    return tensors


def total_bytes(infos: Iterable[TensorInfo]) -> int:
    """Bytes of these tensors together."""
    return sum(info.nbytes for info in infos)
