"""Reading a ``torch_dist`` checkpoint block by block, without building a model and without process groups."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorStorageMetadata

from megatron_zeda.conversion.disk_file import DiskFiles
from megatron_zeda.conversion.pickles import check_pickles
from megatron_zeda.conversion.torch_archive import ArchivedTensor, open_archive
from megatron_zeda.errors import InputError, ZedaError
from megatron_zeda.models import WeightRow


@dataclass(frozen=True)
class _Overlap:
    """What a stored piece and a wanted block have in common: a box in the whole tensor."""

    chunk: ChunkStorageMetadata
    low: tuple[int, ...]
    sizes: tuple[int, ...]

    def within(self, origin: tuple[int, ...]) -> tuple[slice, ...]:
        return tuple(slice(o - b, o - b + n) for o, b, n in zip(self.low, origin, self.sizes, strict=True))

    def disjoint(self, other: _Overlap) -> bool:
        return any(
            a + n <= b or b + m <= a for a, n, b, m in zip(self.low, self.sizes, other.low, other.sizes, strict=True)
        )


class TorchDistReader:
    """Any block of any tensor of a ``torch_dist`` checkpoint, whatever layout saved it."""

    def __init__(self, folder: Path, metadata: Metadata | None = None) -> None:
        """Open a checkpoint.

        Args:
            folder: where its files are.
            metadata: what ``.metadata`` will say of a checkpoint that is still being written. By default it is read,
                and every pickle of the checkpoint is checked.

        Raises:
            InputError: for a checkpoint that is not complete.
            ZedaError: for pickles that are not only data.
        """
        self.folder = folder
        metadata = check_pickles(folder) if metadata is None else metadata
        self._storage = metadata.storage_data
        self.tensors: dict[str, TensorStorageMetadata] = {
            key: entry
            for key, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        self._chunks: dict[tuple[str, int], dict[tuple[int, ...] | None, list[ChunkStorageMetadata]]] = {}
        self._known: dict[MetadataIndex, ArchivedTensor] = {}
        self.disk = DiskFiles()

    def dtype(self, key: str) -> torch.dtype:
        """Type of a tensor."""
        return self.tensors[key].properties.dtype

    def require_complete(self, key: str) -> None:
        """Refuse a tensor of which pieces are missing; reading a block of it finds out where.

        Raises:
            InputError: names the tensor.
        """
        entry = self.tensors[key]
        stored, size = sum(math.prod(chunk.sizes) for chunk in entry.chunks), math.prod(entry.size)
        if stored != size:
            raise InputError(f"{key} is not complete", where=self.folder, value=f"{stored} of {size} values are stored")

    def place(self, key: str, index: tuple[int, ...]) -> tuple[str, int]:
        """Where the first piece of ``tensor[index]`` lies: file, offset in it. Reading goes fastest in this order."""
        chunks = self._chunks_near(key, index)
        info = self._storage.get(MetadataIndex(key, chunks[0].offsets)) if chunks else None
        return ("", 0) if info is None else (info.relative_path, info.offset)

    def read(self, row: WeightRow) -> torch.Tensor:
        """Read one block of the table; do not change it, several blocks may share memory.

        Raises:
            InputError: if the stored pieces do not cover it exactly once, or their bytes are damaged.
        """
        return self.read_block(row.key, row.index, row.shape)

    def read_block(self, key: str, index: tuple[int, ...], shape: tuple[int, ...]) -> torch.Tensor:
        """Read ``tensor[index][: shape[0], : shape[1], ...]`` of the tensor ``key``."""
        begin, sizes = (*index, *(0 for _ in shape)), (*(1 for _ in index), *shape)
        parts = self._overlaps(key, index, begin, sizes)
        covered = sum(math.prod(part.sizes) for part in parts)
        name = f"{key}[{', '.join(map(str, index))}]" if index else key
        if covered != math.prod(shape):
            raise InputError(
                f"{name} is not complete", where=self.folder, value=f"{covered} of {math.prod(shape)} values"
            )
        if not all(one.disjoint(two) for one, two in itertools.combinations(parts, 2)):
            raise InputError(f"{name} is stored twice in part, and a part of it is missing", where=self.folder)
        if len(parts) == 1:
            return self._read_part(key, parts[0]).reshape(shape)
        block = torch.full(sizes, math.nan, dtype=self.dtype(key))  # a part that is never filled cannot look right
        for part in parts:
            block[part.within(begin)] = self._read_part(key, part)
        return block.reshape(shape)

    def _overlaps(
        self, key: str, index: tuple[int, ...], begin: tuple[int, ...], sizes: tuple[int, ...]
    ) -> list[_Overlap]:
        parts = []
        for chunk in self._chunks_near(key, index):
            low = tuple(max(a, b) for a, b in zip(begin, chunk.offsets, strict=True))
            high = [min(a + n, b + m) for a, n, b, m in zip(begin, sizes, chunk.offsets, chunk.sizes, strict=True)]
            lengths = tuple(h - o for o, h in zip(low, high, strict=True))
            if all(n > 0 for n in lengths):
                parts.append(_Overlap(chunk, low, lengths))
        return parts

    def _chunks_near(self, key: str, index: tuple[int, ...]) -> list[ChunkStorageMetadata]:
        """Stored pieces that can overlap a block: those of its layer and expert, and those that span several.

        A large model has thousands of pieces per key, so they are sorted once.
        """
        axes = len(index)
        if (key, axes) not in self._chunks:
            places: dict[tuple[int, ...] | None, list[ChunkStorageMetadata]] = {None: []}
            for chunk in self.tensors[key].chunks:
                alone = all(size == 1 for size in chunk.sizes[:axes])
                places.setdefault(tuple(chunk.offsets[:axes]) if alone else None, []).append(chunk)
            self._chunks[key, axes] = places
        places = self._chunks[key, axes]
        return [*places.get(index, []), *places[None]]

    def _read_part(self, key: str, part: _Overlap) -> torch.Tensor:
        """The values that a stored piece has in common with a block, in that box's shape."""
        chunk, index = part.chunk, MetadataIndex(key, part.chunk.offsets)
        inside = part.within(tuple(chunk.offsets))
        whole = tuple(part.sizes) == tuple(chunk.sizes)
        place = self._known.get(index)
        if place is not None and not whole and (span := _contiguous(inside, chunk, place)) is not None:
            # Its checksums were looked at when the first block was read from it.
            begin, count = span
            data = self._bytes(index, place.offset + begin * place.dtype.itemsize, count * place.dtype.itemsize)
            return torch.frombuffer(data, dtype=place.dtype).reshape(part.sizes)
        info = self._place(index)
        data = self._bytes(index, 0, info.length)
        path = self.folder / info.relative_path
        place = open_archive(data, f"{path} ({_name(index)})")
        if place.shape != tuple(chunk.sizes) or place.dtype != self.dtype(key):
            raise InputError(
                f"{_name(index)} is not what the metadata says",
                where=path,
                value=f"{place.dtype} {list(place.shape)}",
                rule=f"{self.dtype(key)} {list(chunk.sizes)}",
            )
        self._known[index] = place
        return place.view(data) if whole else place.view(data)[inside].clone()

    def _place(self, index: MetadataIndex) -> Any:
        """File, offset and length of a stored piece."""
        info = self._storage.get(index)
        if info is None:
            raise InputError(f"{_name(index)} is not in any file", where=self.folder / ".metadata")
        return info

    def _bytes(self, index: MetadataIndex, begin: int, length: int) -> bytearray | memoryview:
        info = self._place(index)
        path = self.folder / info.relative_path
        if getattr(info, "transform_descriptors", None):
            raise ZedaError("compressed checkpoints are not supported", where=path, value=info.transform_descriptors)
        return memoryview(self.disk.read(path, info.offset + begin, length).numpy())


def _contiguous(
    inside: tuple[slice, ...], chunk: ChunkStorageMetadata, place: ArchivedTensor
) -> tuple[int, int] | None:
    """First element and number of elements of a box that lies in one run in its stored piece; else None."""
    if not place.contiguous:
        return None
    begin, count, step, partial = 0, 1, 1, False
    for box, size in zip(reversed(inside), reversed(chunk.sizes), strict=True):
        length = box.stop - box.start
        if partial and length != 1:
            return None
        partial = partial or length != size
        begin, count, step = begin + box.start * step, count * length, step * size
    return begin, count


def _name(index: MetadataIndex) -> str:
    return f"{index.fqn}{list(index.offset or ())}"
