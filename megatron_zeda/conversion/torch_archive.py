"""One tensor in the zip archive that ``torch.save`` makes of it: checked, and used where it lies.

A ``torch_dist`` data file is a row of such archives. PyTorch writes a CRC-32 for every record of an archive and never
looks at it again, so ``torch.load`` gives back flipped bits without a word. Here they are an error.
"""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_zeda.conversion.pickles import AllowListUnpickler
from megatron_zeda.errors import InputError, ZedaError

_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "BFloat16Storage": torch.bfloat16,
    "HalfStorage": torch.float16,
}
_GLOBALS = {("torch._utils", "_rebuild_tensor_v2"), ("collections", "OrderedDict")} | {
    ("torch", name) for name in _STORAGES
}
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, lengths of the name and of the extra field


@dataclass(frozen=True)
class ArchivedTensor:
    """Where a tensor's values are in its archive.

    Attributes:
        dtype: its type.
        shape: its shape.
        stride: its strides, in elements.
        offset: of its first element from the beginning of the archive, in bytes.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @property
    def contiguous(self) -> bool:
        """Whether the values lie in row-major order without gaps."""
        step = 1
        for size, stride in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if size != 1 and stride != step:
                return False
            step *= size
        return True

    def view(self, data: bytearray | memoryview) -> torch.Tensor:
        """The tensor in the bytes of its archive; nothing is copied."""
        if 0 in self.shape:
            return torch.empty(self.shape, dtype=self.dtype)
        last = sum((size - 1) * stride for size, stride in zip(self.shape, self.stride, strict=True))
        flat = torch.frombuffer(data, dtype=self.dtype, count=last + 1, offset=self.offset)
        return flat.as_strided(self.shape, self.stride)


def open_archive(data: bytearray | memoryview, where: str | Path) -> ArchivedTensor:
    """Check the CRC-32 of every record, and find the tensor.

    Args:
        data: the whole archive.
        where: names it in messages.

    Raises:
        InputError: if a record is damaged or missing.
        ZedaError: if it holds anything but one plain tensor.
    """
    try:
        with zipfile.ZipFile(_Buffer(data)) as archive:
            entries = archive.infolist()
        records = {entry.filename.partition("/")[2]: _checked(data, entry) for entry in entries}
        unpickler = _TensorUnpickler(io.BytesIO(_bytes(data, records["data.pkl"])), _GLOBALS, where)
        found = unpickler.load()
    except (zipfile.BadZipFile, pickle.UnpicklingError, *_DAMAGE) as error:
        reason = error if isinstance(error, zipfile.BadZipFile) else f"{type(error).__name__}: {error}"
        raise InputError(
            f"the bytes are damaged ({reason})",
            where=where,
            rule="every record agrees with its CRC-32",
            fix="copy the checkpoint again",
        ) from error
    if "byteorder" in records and _bytes(data, records["byteorder"]) != b"little":
        raise ZedaError("written on a big-endian machine", where=where)
    if not isinstance(found, _Rebuilt) or f"data/{found.key}" not in records:
        raise ZedaError("not a plain tensor", where=where)
    begin, length = records[f"data/{found.key}"]
    itemsize = found.dtype.itemsize
    last = found.offset + sum((size - 1) * stride for size, stride in zip(found.shape, found.stride, strict=True))
    if 0 not in found.shape and not 0 <= found.offset <= last < length // itemsize:
        raise ZedaError("the tensor is larger than its storage", where=where)
    return ArchivedTensor(found.dtype, found.shape, found.stride, begin + found.offset * itemsize)


def check_records(data: bytearray | memoryview, where: str | Path) -> None:
    """Check the CRC-32 of every record of an archive, whatever it holds.

    Args:
        data: the whole archive.
        where: names it in messages.

    Raises:
        InputError: if a record is damaged or missing.
    """
    try:
        with zipfile.ZipFile(_Buffer(data)) as archive:
            for entry in archive.infolist():
                _checked(data, entry)
    except (zipfile.BadZipFile, *_DAMAGE) as error:
        raise InputError(
            f"the bytes are damaged ({error})",
            where=where,
            rule="every record agrees with its CRC-32",
            fix="copy the checkpoint again",
        ) from error


_DAMAGE = (EOFError, AttributeError, IndexError, KeyError, TypeError, ValueError, NotImplementedError, struct.error)


def _checked(data: bytearray | memoryview, entry: zipfile.ZipInfo) -> tuple[int, int]:
    """Offset and length of a record whose bytes agree with their checksum."""
    signature, name, extra = _LOCAL_HEADER.unpack_from(data, entry.header_offset)
    begin, length = entry.header_offset + _LOCAL_HEADER.size + name + extra, entry.file_size
    if signature != b"PK\x03\x04" or entry.compress_type != zipfile.ZIP_STORED or begin + length > len(data):
        raise zipfile.BadZipFile(f"{entry.filename} is not where the directory says")
    with memoryview(data)[begin : begin + length] as record:
        if zlib.crc32(record) != entry.CRC:
            raise zipfile.BadZipFile(f"CRC-32 of {entry.filename} is wrong")
    return begin, length


def _bytes(data: bytearray | memoryview, place: tuple[int, int]) -> bytes:
    return bytes(data[place[0] : place[0] + place[1]])


@dataclass(frozen=True)
class _Rebuilt:
    """The arguments of ``torch._utils._rebuild_tensor_v2``."""

    dtype: torch.dtype
    key: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class _TensorUnpickler(AllowListUnpickler):
    """Reads a tensor's description; builds no tensor and calls nothing of torch's."""

    def find_class(self, module: str, name: str) -> Any:
        found = super().find_class(module, name)  # refuses what is not on the list
        if name == "_rebuild_tensor_v2":
            return self._rebuild
        return _STORAGES.get(name, found)

    def persistent_load(self, pid: Any) -> tuple[torch.dtype, str]:
        kind, dtype, key, _, _ = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype) or not isinstance(key, str):
            raise ValueError("not a storage")
        return dtype, key

    @staticmethod
    def _rebuild(storage: tuple[torch.dtype, str], offset: int, shape: Any, stride: Any, *rest: object) -> _Rebuilt:
        sizes, steps = tuple(shape), tuple(stride)
        numbers = (offset, *sizes, *steps)
        if len(sizes) != len(steps) or any(type(number) is not int or number < 0 for number in numbers):
            raise ValueError("not the description of a tensor")
        return _Rebuilt(*storage, offset, sizes, steps)


class _Buffer(io.RawIOBase):
    """A file over bytes that are not copied."""

    def __init__(self, data: bytearray | memoryview) -> None:
        self._data, self._position = data, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = max(
            0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: len(self._data)}[whence]
        )
        return self._position

    def readinto(self, target: Any) -> int:
        with memoryview(self._data)[self._position : self._position + len(target)] as part:
            target[: len(part)] = part
            self._position += len(part)
            return len(part)
