"""Reading and writing a ``torch_dist`` checkpoint block by block, without building a model and without process groups.

The writer is PyTorch's own distributed-checkpoint writer with a planner that loads a block only when its turn comes, so
memory holds one block at a time. The result is what Megatron-Core's ``dist_checkpointing`` reads.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner, create_default_global_save_plan
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.state_dict_saver import save

from megatron_zeda.conversion.folders import write_json
from megatron_zeda.conversion.ledger import Ledger
from megatron_zeda.conversion.pickles import check_pickles
from megatron_zeda.errors import InputError, ZedaError
from megatron_zeda.models import WeightRow

COMMON_STATE = "common_state/shard_0_1"
"""Where Megatron-Core keeps everything that is not a sharded tensor."""


class _LazySavePlanner(DefaultSavePlanner):
    """Plans from the table; a block is made when the writer asks for it, and forgotten afterwards."""

    def __init__(
        self,
        rows: Sequence[WeightRow],
        dtypes: Mapping[str, torch.dtype],
        load: Callable[[WeightRow], torch.Tensor],
        common_state: dict[str, Any],
        where: Path,
    ) -> None:
        super().__init__(flatten_state_dict=False)
        self._rows = {(row.key, row.global_offset): row for row in rows}
        self._dtypes, self._read, self._common_state = dtypes, load, common_state
        self.ledger = Ledger(self._rows, what="written", where=where)

    def create_local_plan(self) -> SavePlan:
        items = [WriteItem(index=MetadataIndex(COMMON_STATE), type=WriteItemType.BYTE_IO)]
        for row in self._rows.values():
            sizes = (*(1 for _ in row.index), *row.shape)
            items.append(
                WriteItem(
                    index=MetadataIndex(row.key, torch.Size(row.global_offset)),
                    type=WriteItemType.SHARD,
                    tensor_data=TensorWriteData(
                        chunk=ChunkStorageMetadata(torch.Size(row.global_offset), torch.Size(sizes)),
                        properties=TensorProperties(dtype=self._dtypes[row.key]),
                        size=torch.Size(row.global_shape),
                    ),
                )
            )
        self.plan = SavePlan(items=items)
        return self.plan

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        # The default would compare all blocks of a tensor pairwise; the ledger knows that they are the table's.
        self.global_plan, self.metadata = create_default_global_save_plan(all_plans)
        return self.global_plan, self.metadata

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        if write_item.type == WriteItemType.BYTE_IO:
            buffer = io.BytesIO()
            torch.save([self._common_state], buffer)
            return buffer
        key = (write_item.index.fqn, tuple(write_item.index.offset or ()))
        self.ledger.tick(key)
        row = self._rows[key]
        block = self._read(row)
        if block.dtype != self._dtypes[row.key] or tuple(block.shape) != row.shape:
            raise ValueError(
                f"{row}: planned {self._dtypes[row.key]} {row.shape}, got {block.dtype} {tuple(block.shape)}"
            )
        return block.reshape(*(1 for _ in row.index), *row.shape)


def write_torch_dist(
    folder: Path,
    rows: Sequence[WeightRow],
    dtypes: Mapping[str, torch.dtype],
    load: Callable[[WeightRow], torch.Tensor],
    common_state: dict[str, Any],
) -> None:
    """Write ``rows`` as a checkpoint that ``dist_checkpointing.load`` reads at any parallel layout.

    Args:
        folder: an existing, empty folder.
        rows: the table.
        dtypes: Megatron key -> type.
        load: makes one block.
        common_state: plain values, for instance the iteration.
    """
    planner = _LazySavePlanner(rows, dtypes, load, common_state, folder)
    writer = FileSystemWriter(folder, single_file_per_rank=True, sync_files=True, thread_count=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "torch.distributed is uninitialized": on purpose
        try:
            save({}, storage_writer=writer, planner=planner, no_dist=True)
        except CheckpointException as error:  # PyTorch wraps whatever went wrong, a full disk or an unreadable source
            cause, _ = next(iter(error.failures.values()))
            raise cause from error
    planner.ledger.close()
    write_json(folder / "metadata.json", {"sharded_backend": "torch_dist", "sharded_backend_version": 1})


class TorchDistReader:
    """Any block of any tensor of a ``torch_dist`` checkpoint, whatever layout saved it."""

    def __init__(self, folder: Path) -> None:
        """Check every pickle, then keep the metadata. Raises what :func:`check_pickles` raises."""
        self.folder = folder
        metadata = check_pickles(folder)
        self._storage = metadata.storage_data
        self.tensors: dict[str, TensorStorageMetadata] = {
            key: entry
            for key, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        self._chunks: dict[tuple[str, tuple[int, ...] | None], list[ChunkStorageMetadata]] = {}
        self._last: tuple[MetadataIndex, torch.Tensor] | None = None

    def dtype(self, key: str) -> torch.dtype:
        """Type of a tensor."""
        return self.tensors[key].properties.dtype

    def read(self, row: WeightRow) -> torch.Tensor:
        """Read one block of the table.

        Raises:
            InputError: if the stored pieces do not cover it exactly once.
        """
        begin, sizes = row.global_offset, (*(1 for _ in row.index), *row.shape)
        block = torch.empty(sizes, dtype=self.dtype(row.key))
        covered = 0
        for chunk in self._chunks_near(row):
            low = [max(a, b) for a, b in zip(begin, chunk.offsets, strict=True)]
            high = [min(a + n, b + m) for a, n, b, m in zip(begin, sizes, chunk.offsets, chunk.sizes, strict=True)]
            lengths = [h - o for o, h in zip(low, high, strict=True)]
            if any(n <= 0 for n in lengths):
                continue
            stored = self._chunk(MetadataIndex(row.key, chunk.offsets), chunk)
            target = tuple(slice(o - b, o - b + n) for o, b, n in zip(low, begin, lengths, strict=True))
            source = tuple(slice(o - b, o - b + n) for o, b, n in zip(low, chunk.offsets, lengths, strict=True))
            block[target] = stored[source]
            covered += math.prod(lengths)
        if covered != row.numel:
            raise InputError(f"{row} is not complete", where=self.folder, value=f"{covered} of {row.numel} values")
        return block.reshape(row.shape)

    def _chunks_near(self, row: WeightRow) -> list[ChunkStorageMetadata]:
        """Stored pieces that can overlap a block: those of its layer and expert, and those that span several.

        A large model has thousands of pieces per key, so they are sorted once.
        """
        axes = len(row.index)
        if (row.key, None) not in self._chunks:
            self._chunks[row.key, None] = []
            for chunk in self.tensors[row.key].chunks:
                alone = all(size == 1 for size in chunk.sizes[:axes])
                place = tuple(chunk.offsets[:axes]) if alone else None
                self._chunks.setdefault((row.key, place), []).append(chunk)
        spanning = self._chunks[row.key, None]
        return self._chunks.get((row.key, row.index), []) + spanning

    def _chunk(self, index: MetadataIndex, chunk: ChunkStorageMetadata) -> torch.Tensor:
        if self._last is not None and self._last[0] == index:
            return self._last[1]
        info = self._storage[index]
        path = self.folder / info.relative_path
        if getattr(info, "transform_descriptors", None):
            raise InputError("compressed checkpoints are not supported", where=path, value=info.transform_descriptors)
        with path.open("rb") as file:
            file.seek(info.offset)
            data = io.BytesIO(file.read(info.length))
        try:
            tensor = torch.load(data, map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, ValueError) as error:
            raise InputError(f"{index.fqn} cannot be read", where=path, fix="copy the checkpoint again") from error
        if not isinstance(tensor, torch.Tensor) or tensor.shape != chunk.sizes:
            raise ZedaError(f"{index.fqn} is not what the metadata says", where=path)
        self._last = (index, tensor)
        return tensor
