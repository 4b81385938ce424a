"""Writing a ``torch_dist`` checkpoint file by file, without building a model and without process groups.

The bytes are written by PyTorch's own distributed-checkpoint writer: every data file is one plan of its own, as if it
came from a rank of its own, and a block is made when its turn comes. The result is what Megatron-Core's
``dist_checkpointing`` reads, and depends on the weights only: no time, path or random number is in it.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner, create_default_global_save_plan
from torch.distributed.checkpoint.filesystem import (
    CURRENT_DCP_VERSION,
    FileSystem,
    FileSystemWriter,
    _StorageInfo,
    _StoragePrefix,
)
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from megatron_zeda.conversion.disk_file import DiskWriter
from megatron_zeda.conversion.folders import write_json
from megatron_zeda.conversion.ledger import Ledger
from megatron_zeda.models import WeightRow

COMMON_STATE = "common_state/shard_0_1"
"""Where Megatron-Core keeps everything that is not a sharded tensor."""
DEFAULT_FILE_BYTES = 5 * 10**8
Spans = list[tuple[int, int]]
"""Offset and length in the file of every block of a data file, in order."""


@dataclass(frozen=True)
class DataFile:
    """One file of the plan.

    Attributes:
        name: its name in the checkpoint's folder.
        rows: the blocks in it; none in the file of the common state.
        nbytes: how many bytes of weights.
    """

    name: str
    rows: tuple[WeightRow, ...]
    nbytes: int


class TorchDistWriter:
    """A checkpoint planned from the weight table.

    Attributes:
        files: the data files, to be written in any order, each once.
    """

    def __init__(
        self,
        folder: Path,
        rows: Sequence[WeightRow],
        dtypes: Mapping[str, torch.dtype],
        common_state: dict[str, Any],
        *,
        file_bytes: int = DEFAULT_FILE_BYTES,
    ) -> None:
        """Plan the files.

        Args:
            folder: where to write; made if it is not there.
            rows: the table.
            dtypes: Megatron key -> type.
            common_state: plain values, for instance the iteration.
            file_bytes: a new file starts when a block would go beyond this.
        """
        self._dtypes, self._common_state = dtypes, common_state
        self.files = plan_files(rows, dtypes, file_bytes)
        self._ledger = Ledger((file.name for file in self.files), what="written", where=folder)
        self._writer = _Writer(folder)
        folder.mkdir(parents=True, exist_ok=True)

    def write(self, file: DataFile, load: Callable[[WeightRow], torch.Tensor]) -> Spans:
        """Write one file anew, to the disk.

        Args:
            file: one of :attr:`files`.
            load: makes a block.

        Returns:
            Where its blocks are, for :meth:`finish`.
        """
        plan = self._plan(file)
        planner = _Planner(file, self._dtypes, self._common_state, load)
        try:
            written = self._writer.write_data(plan, planner).value()
        except RuntimeError as error:
            cause = _system_error(error)
            if cause is None:
                raise
            raise cause from error
        results = {result.index: result.storage_data for result in written}
        planner.ledger.close()
        self._ledger.tick(file.name)
        return [(results[item.index].offset, results[item.index].length) for item in plan.items]

    def sha256(self, file: DataFile) -> str:
        """Hash of a file that :meth:`write` has written."""
        return self._writer.fs.hashes[Path(self._writer.path) / file.name]

    def skip(self, file: DataFile) -> None:
        """Note that an interrupted run has written this file."""
        self._ledger.tick(file.name)

    def metadata(self, spans: Mapping[str, Sequence[Sequence[int]]]) -> Metadata:
        """What ``.metadata`` says of the files of which ``spans`` speaks (file name -> what :meth:`write` returned)."""
        plans = [self._plan(file) for file in self.files if file.name in spans]
        _, metadata = create_default_global_save_plan(plans)
        metadata.version = CURRENT_DCP_VERSION
        metadata.storage_data = {
            result.index: result.storage_data for results in self._results(plans, spans) for result in results
        }
        return metadata

    def finish(self, spans: Mapping[str, Sequence[Sequence[int]]]) -> None:
        """Write what makes the files a checkpoint. Raises :class:`ZedaError` if one was not written."""
        self._ledger.close()
        plans = [self._plan(file) for file in self.files]
        _, metadata = create_default_global_save_plan(plans)
        self._writer.finish(metadata, self._results(plans, spans))
        folder = Path(self._writer.path)
        write_json(folder / "metadata.json", {"sharded_backend": "torch_dist", "sharded_backend_version": 1})

    def _plan(self, file: DataFile) -> SavePlan:
        items = [self._item(row) for row in file.rows]
        if not file.rows:
            items = [WriteItem(index=MetadataIndex(COMMON_STATE), type=WriteItemType.BYTE_IO)]
        prefix = file.name.removesuffix("0.distcp")  # the writer appends the number of a file within its plan
        return SavePlan(items=items, storage_data=_StoragePrefix(prefix))

    def _item(self, row: WeightRow) -> WriteItem:
        offset = torch.Size(row.global_offset)
        return WriteItem(
            index=MetadataIndex(row.key, offset),
            type=WriteItemType.SHARD,
            tensor_data=TensorWriteData(
                chunk=ChunkStorageMetadata(offset, torch.Size(_sizes(row))),
                properties=TensorProperties(dtype=self._dtypes[row.key]),
                size=torch.Size(row.global_shape),
            ),
        )

    @staticmethod
    def _results(plans: list[SavePlan], spans: Mapping[str, Sequence[Sequence[int]]]) -> list[list[WriteResult]]:
        # Made anew from plain numbers: how a pickle looks depends on which objects are shared.
        found = []
        for plan in plans:
            name = f"{plan.storage_data.prefix}0.distcp"
            places = [_StorageInfo(name, offset, length) for offset, length in spans[name]]
            found.append(
                [
                    WriteResult(index=item.index, size_in_bytes=place.length, storage_data=place)
                    for item, place in zip(plan.items, places, strict=True)
                ]
            )
        return found


class _FileSystem(FileSystem):
    """PyTorch's access to files, with ours for those that are written.

    Attributes:
        hashes: SHA-256 of every file that was written.
    """

    def __init__(self) -> None:
        super().__init__()
        self.hashes: dict[Path, str] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[io.IOBase]:
        if mode != "wb":
            with super().create_stream(path, mode) as stream:
                yield stream
        else:
            with DiskWriter(Path(path)) as writer:
                yield writer
            self.hashes[writer.path] = writer.sha256()


class _Writer(FileSystemWriter):
    """PyTorch's writer, without the random number and the path that it puts into ``.metadata``."""

    def __init__(self, folder: Path) -> None:
        # One thread and no copying ahead: otherwise blocks lie in an order that depends on the machine.
        super().__init__(folder, sync_files=False, thread_count=1, per_thread_copy_ahead=0)
        self.fs: _FileSystem = _FileSystem()

    def storage_meta(self) -> StorageMeta | None:
        return None


class _Planner(DefaultSavePlanner):
    """Gives the writer a block when it asks for it, each once."""

    def __init__(
        self,
        file: DataFile,
        dtypes: Mapping[str, torch.dtype],
        common_state: dict[str, Any],
        load: Callable[[WeightRow], torch.Tensor],
    ) -> None:
        super().__init__(flatten_state_dict=False)
        self._rows = {(row.key, row.global_offset): row for row in file.rows}
        self._dtypes, self._common_state, self._load = dtypes, common_state, load
        self.ledger = Ledger(self._rows or [(COMMON_STATE, ())], what="written", where=file.name)

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        key = (write_item.index.fqn, tuple(write_item.index.offset or ()))
        self.ledger.tick(key)
        if write_item.type == WriteItemType.BYTE_IO:
            buffer = io.BytesIO()
            torch.save([self._common_state], buffer)
            return buffer
        row = self._rows[key]
        block = self._load(row)
        if block.dtype != self._dtypes[row.key] or tuple(block.shape) != row.shape:
            raise ValueError(
                f"{row}: planned {self._dtypes[row.key]} {row.shape}, got {block.dtype} {tuple(block.shape)}"
            )
        return block.contiguous().reshape(_sizes(row))


def write_torch_dist(
    folder: Path,
    rows: Sequence[WeightRow],
    dtypes: Mapping[str, torch.dtype],
    load: Callable[[WeightRow], torch.Tensor],
    common_state: dict[str, Any],
    *,
    file_bytes: int = DEFAULT_FILE_BYTES,
) -> None:
    """Write a whole checkpoint at once; the arguments are those of :class:`TorchDistWriter`."""
    writer = TorchDistWriter(folder, rows, dtypes, common_state, file_bytes=file_bytes)
    writer.finish({file.name: writer.write(file, load) for file in writer.files})


def _system_error(error: BaseException) -> OSError | None:
    """What the system said of a full disk, which the archive writer of torch hides behind an error of its own."""
    cause = error.__context__
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__context__
    return cause


def plan_files(rows: Sequence[WeightRow], dtypes: Mapping[str, torch.dtype], file_bytes: int) -> list[DataFile]:
    """The data files: first that of the common state, then the blocks in the order of the table."""
    files = [DataFile("__0_0.distcp", (), 0)]
    waiting: list[WeightRow] = []
    filled = 0
    for row in [*rows, None]:
        nbytes = row.numel * dtypes[row.key].itemsize if row is not None else 0
        if waiting and (row is None or filled + nbytes > file_bytes):
            files.append(DataFile(f"__{len(files)}_0.distcp", tuple(waiting), filled))
            waiting, filled = [], 0
        if row is not None:
            waiting.append(row)
            filled += nbytes
    return files


def _sizes(row: WeightRow) -> tuple[int, ...]:
    """Shape of a block in the whole tensor's axes."""
    return (*(1 for _ in row.index), *row.shape)
