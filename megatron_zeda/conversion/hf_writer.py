"""The one writer of Hugging Face weights: any source in, verified shards and a true index out, one file at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from megatron_zeda.conversion.background import Verifier
from megatron_zeda.conversion.checks import require_finite
from megatron_zeda.conversion.folders import OutputFolder
from megatron_zeda.conversion.hf_folder import pieces_of
from megatron_zeda.conversion.ledger import Ledger
from megatron_zeda.conversion.progress import ByteProgress
from megatron_zeda.conversion.safetensors_io import (
    INDEX_FILE,
    SINGLE_FILE,
    SafetensorsWriter,
    TensorPlan,
    checksum,
    header_of,
)
from megatron_zeda.conversion.verification import Source
from megatron_zeda.models import HfPiece

DEFAULT_SHARD_BYTES = 10**9
"""A file is what is verified while the next one is written, and what is kept when a run is killed: not too large."""


def write_hf(
    view: Source, out: OutputFolder, *, shard_bytes: int | None = DEFAULT_SHARD_BYTES, what: str = "write"
) -> dict[str, Any]:
    """Write the weights of ``view``, and the index if there are several files.

    Every piece is read once, written once, and read back from the disk. Files that an earlier run finished are kept.
    Tensors go to the files in the order of ``view.rows`` and ``view.carried``.

    Args:
        view: what the output shall hold.
        out: where; configuration and other small files are the caller's.
        shard_bytes: a new file starts when a tensor would go beyond this; None for one file.
        what: label of the progress bar.

    Returns:
        ``num_tensors``, ``num_carried`` (of them) and ``num_bytes``.

    Raises:
        InputError: for a weight that is not finite, or a source that cannot be read.
        ZedaError: if a file is not read back as it was written.
    """
    pieces = pieces_of([*view.rows, *view.carried])
    files = plan_files(view, shard_bytes)
    sizes = {name: sum(_nbytes(*entry) for entry in tensors.values()) for name, tensors in files.items()}
    out.need_space(sum(file_sizes(files).values()))
    ledger = Ledger(map(str, pieces), what="read", where=out.path)
    by_name: dict[str, list[HfPiece]] = {}
    file_of = {tensor: name for name, tensors in files.items() for tensor in tensors}
    for piece in pieces:
        by_name.setdefault(file_of[piece.name], []).append(piece)
    with ByteProgress(what, sum(sizes.values())) as bar, Verifier(out) as verifier:
        for name, tensors in files.items():
            for piece in by_name[name]:
                ledger.tick(str(piece))
            if out.done(name) is not None:
                bar.skip(sizes[name])
                continue
            slots = {piece.name: piece.num_slots for piece in by_name[name] if piece.slot is not None}
            with SafetensorsWriter(out.partial / name, tensors, slots=slots) as writer:
                places = {tensor: place for place, tensor in enumerate(tensors)}
                _fill(writer, view, sorted(by_name[name], key=lambda piece: (places[piece.name], piece.slot)), bar)
            verifier.submit(name, writer.verify)
    ledger.close()
    if len(files) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": dict(sorted(file_of.items()))}
        out.write_json(INDEX_FILE, index)
    carried = {piece.name for piece in pieces_of(view.carried)}
    return {"num_tensors": len(file_of), "num_carried": len(carried), "num_bytes": sum(sizes.values())}


def _fill(writer: SafetensorsWriter, view: Source, pieces: Sequence[HfPiece], bar: ByteProgress) -> None:
    for piece in pieces:
        tensor = view.read(piece)
        require_finite(tensor, piece, view.where(piece))
        writer.write(piece.name, tensor, piece.slot, checksum=checksum(tensor))
        bar.advance(tensor.nbytes)


def plan_files(view: Source, shard_bytes: int | None) -> dict[str, TensorPlan]:
    """File name -> its tensors. Files are filled in the order of the view."""
    plan = {piece.name: (view.dtype(piece), piece.tensor_shape) for piece in pieces_of([*view.rows, *view.carried])}
    shards: list[dict[str, tuple[torch.dtype, tuple[int, ...]]]] = [{}]
    filled = 0
    for name, entry in plan.items():
        if shards[-1] and shard_bytes is not None and filled + _nbytes(*entry) > shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = entry
        filled += _nbytes(*entry)
    count = len(shards)
    if count == 1:
        return {SINGLE_FILE: shards[0]}
    return {f"model-{number:05d}-of-{count:05d}.safetensors": part for number, part in enumerate(shards, start=1)}


def file_sizes(files: Mapping[str, TensorPlan]) -> dict[str, int]:
    """File name -> bytes on the disk."""
    return {
        name: len(header_of(tensors)) + sum(_nbytes(*entry) for entry in tensors.values())
        for name, tensors in files.items()
    }


def _nbytes(dtype: torch.dtype, shape: Sequence[int]) -> int:
    return math.prod(shape) * dtype.itemsize
