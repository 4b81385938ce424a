"""Hugging Face checkpoint -> Megatron checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

from megatron_zeda.conversion.background import SourceHashes, Verifier
from megatron_zeda.conversion.checks import require_finite
from megatron_zeda.conversion.disk_file import DiskFile
from megatron_zeda.conversion.dry_run import dry_run
from megatron_zeda.conversion.folders import OutputFolder
from megatron_zeda.conversion.hf_folder import CARRIED_FILE, HfFolder, copy_side_files, pieces_of
from megatron_zeda.conversion.ledger import Ledger
from megatron_zeda.conversion.manifest import KEY_STYLE, make_manifest, make_plan
from megatron_zeda.conversion.megatron_io import HF_FOLDER, RELEASE, MegatronFolder, unpack_row, write_latest_iteration
from megatron_zeda.conversion.origins import known_hashes
from megatron_zeda.conversion.pickles import check_pickles
from megatron_zeda.conversion.progress import ByteProgress
from megatron_zeda.conversion.safetensors_io import SafetensorsWriter, checksum
from megatron_zeda.conversion.torch_dist import TorchDistReader
from megatron_zeda.conversion.torch_dist_writer import DEFAULT_FILE_BYTES, DataFile, Spans, TorchDistWriter, plan_files
from megatron_zeda.conversion.verification import Source
from megatron_zeda.errors import ZedaError
from megatron_zeda.models import HfPiece, WeightRow


def hf_to_megatron(
    hf: str | Path, megatron: str | Path, *, file_bytes: int = DEFAULT_FILE_BYTES, plan_only: bool = False
) -> dict[str, Any]:
    """Convert a static or dynamic Hugging Face checkpoint; loads at any parallel layout.

    Weights keep their bits and their types. No model is built, and one block of weights is in memory at a time. Every
    file is read back from the disk and compared with the source before it counts as written. Killed and started
    again, the conversion goes on after the last finished file, and the result is the same to the byte.

    Args:
        hf: Hugging Face folder.
        megatron: folder to create, see :mod:`megatron_zeda.conversion.megatron_io`.
        file_bytes: a new data file starts when a block would go beyond this.
        plan_only: write nothing, and return what :func:`megatron_zeda.conversion.dry_run.dry_run` does.

    Returns:
        The manifest that was written.

    Raises:
        InputError: for an input that is not a complete checkpoint of a known family, or an output that exists.
        ZedaError: if the disk is full, or a file is not read back as it was written.
    """
    with HfFolder(hf) as source:
        dtypes = _dtypes(source)
        files = source.source_files()
        if plan_only:
            return dry_run(source, megatron, files.values(), _planned_bytes(source, dtypes, file_bytes))
        plan = make_plan("hf_to_megatron", files, file_bytes=file_bytes)
        with (
            OutputFolder(megatron, plan=plan) as out,
            SourceHashes(files, known_hashes(source.path)) as hashes,
        ):
            source.watch(hashes.passed)
            summary = write_megatron(source, dtypes, out, file_bytes=file_bytes)
            out.write_json(f"{HF_FOLDER}/config.json", source.config)
            copy_side_files(source.path, out.partial / HF_FOLDER)
            write_latest_iteration(out.partial, RELEASE)
            MegatronFolder(out.partial)  # opens as a user will open it
            out.manifest = make_manifest(
                source,
                files=hashes.result(),
                tool="hf_to_megatron",
                key_style=KEY_STYLE,
                expert_layout=source.layout,
                sharded=source.reader.sharded,
                **summary,
            )
        return out.manifest


def write_megatron(
    view: Source, dtypes: dict[str, torch.dtype], out: OutputFolder, *, file_bytes: int = DEFAULT_FILE_BYTES
) -> dict[str, Any]:
    """Write the weights of ``view`` as ``release/``, and what it carries beside the model.

    Args:
        view: what the output shall hold.
        dtypes: Megatron key -> type.
        out: where; configuration and other small files are the caller's.
        file_bytes: a new data file starts when a block would go beyond this.

    Returns:
        ``num_tensors``, ``num_carried`` (of them) and ``num_bytes``.

    Raises:
        InputError: for a weight that is not finite, or a source that cannot be read.
        ZedaError: if a file is not read back as it was written.
    """
    state = {"iteration": 0, "checkpoint_version": 3.0}
    writer = TorchDistWriter(out.partial / RELEASE, view.rows, dtypes, state, file_bytes=file_bytes)
    carried = pieces_of(view.carried)
    beside = sum(_nbytes(view, piece) for piece in carried)
    total = beside + sum(file.nbytes for file in writer.files)
    out.need_space(total)
    pieces = pieces_of([*view.rows, *view.carried])
    with ByteProgress("import", total) as bar, Verifier(out) as verifier:
        work = _Import(view, out, writer, verifier, bar, Ledger(map(str, pieces), what="read", where=out.path))
        spans = {file.name: work.data_file(file) for file in writer.files}
        if carried:
            work.carried_file(carried, beside)
        work.ledger.close()
    writer.finish(spans)
    if check_pickles(out.partial / RELEASE) != writer.metadata(spans):
        raise ZedaError("verification failed: not what was written", where=out.partial / RELEASE / ".metadata")
    names = {piece.name for piece in pieces}
    return {"num_tensors": len(names), "num_carried": len({piece.name for piece in carried}), "num_bytes": total}


class _Import:
    """The parts that one file after another needs."""

    def __init__(
        self,
        view: Source,
        out: OutputFolder,
        writer: TorchDistWriter,
        verifier: Verifier,
        bar: ByteProgress,
        ledger: Ledger,
    ) -> None:
        self._view, self._out, self._writer, self._verifier, self._bar = view, out, writer, verifier, bar
        self.ledger = ledger

    def data_file(self, file: DataFile) -> Spans:
        """Write one file of ``release/``, unless an earlier run did; return where its blocks are."""
        name = f"{RELEASE}/{file.name}"
        record = self._out.done(name)
        if record is not None:
            for piece in pieces_of(file.rows):
                self.ledger.tick(str(piece))
            self._writer.skip(file)
            self._bar.skip(file.nbytes)
            return [(offset, length) for offset, length in record["spans"]]
        path, checksums = self._out.partial / name, dict[HfPiece, int]()

        def load(row: WeightRow) -> torch.Tensor:
            tensors = [self._read(piece) for piece in row.pieces]
            checksums.update(zip(row.pieces, map(checksum, tensors), strict=True))
            return row.packing.pack(tensors)

        spans = self._writer.write(file, load)
        metadata = self._writer.metadata({file.name: spans})

        def check() -> str:
            _verify(path, metadata, file, checksums)
            return self._writer.sha256(file)

        self._verifier.submit(name, check, spans=spans)
        return spans

    def carried_file(self, pieces: list[HfPiece], nbytes: int) -> None:
        """Write what lies beside the model."""
        name = f"{HF_FOLDER}/{CARRIED_FILE}"
        if self._out.done(name) is not None:
            for piece in pieces:
                self.ledger.tick(str(piece))
            self._bar.skip(nbytes)
            return
        path = self._out.partial / name
        path.parent.mkdir(exist_ok=True)
        plan = {piece.name: (self._view.dtype(piece), piece.tensor_shape) for piece in pieces}
        with SafetensorsWriter(path, plan) as writer:
            for piece in pieces:
                tensor = self._read(piece)
                writer.write(piece.name, tensor, piece.slot, checksum=checksum(tensor))
        self._verifier.submit(name, writer.verify)

    def _read(self, piece: HfPiece) -> torch.Tensor:
        self.ledger.tick(str(piece))
        tensor = self._view.read(piece)
        require_finite(tensor, piece, self._view.where(piece))
        self._bar.advance(tensor.nbytes)
        return tensor


class _DiskReader(TorchDistReader):
    """The ordinary reader, over a file that was just written, past the memory that the system keeps of it."""

    def __init__(self, path: Path, metadata: Metadata) -> None:
        super().__init__(path.parent, metadata)
        self.file = DiskFile(path)

    def _bytes(self, index: MetadataIndex, begin: int, length: int) -> memoryview:
        return self.file.read(self._storage[index].offset + begin, length)


def _verify(path: Path, metadata: Metadata, file: DataFile, checksums: dict[HfPiece, int]) -> None:
    """Read a file back from the disk, as an export does."""
    reader = _DiskReader(path, metadata)
    with reader.file:
        for row in file.rows:
            for piece, tensor in unpack_row(row, reader.read(row)):
                if checksum(tensor) != checksums[piece]:
                    raise ZedaError(
                        f"verification failed: {piece} was not read back as the source gave it",
                        where=path,
                        fix="run the command again; if it fails again, suspect the disk or the memory",
                    )


def _planned_bytes(view: Source, dtypes: dict[str, torch.dtype], file_bytes: int) -> dict[str, int]:
    """Name -> bytes of the weights in each file."""
    sizes = {f"{RELEASE}/{file.name}": file.nbytes for file in plan_files(view.rows, dtypes, file_bytes) if file.rows}
    if view.carried:
        sizes[f"{HF_FOLDER}/{CARRIED_FILE}"] = sum(_nbytes(view, piece) for piece in pieces_of(view.carried))
    return sizes


def _nbytes(view: Source, piece: HfPiece) -> int:
    return torch.Size(piece.shape).numel() * view.dtype(piece).itemsize


def _dtypes(source: HfFolder) -> dict[str, torch.dtype]:
    """Megatron key -> type; all pieces of a key have the same, which :class:`HfFolder` has checked."""
    return {row.key: source.dtype(row.pieces[0]) for row in source.rows}
