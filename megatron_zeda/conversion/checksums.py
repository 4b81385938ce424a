"""Checksums of a whole ``torch_dist`` checkpoint, for a loader that does not look at them."""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any

from megatron_zeda.conversion.folders import read_errors
from megatron_zeda.conversion.torch_archive import check_records
from megatron_zeda.errors import InputError


def check_checksums(folder: Path, metadata: Any, *, part: int = 0, parts: int = 1) -> int:
    """Compare every stored piece with the CRC-32 that PyTorch wrote beside it, and never reads.

    Args:
        folder: of the checkpoint's files.
        metadata: what its ``.metadata`` says.
        part: which share of the pieces to read, from 0.
        parts: into how many shares they are dealt, by bytes that lie behind each other.

    Returns:
        The number of bytes that were read.

    Raises:
        InputError: for a piece that is damaged or not all there, with its name and its file.
    """
    pieces = sorted(metadata.storage_data.items(), key=lambda item: (item[1].relative_path, item[1].offset))
    total, done, read = sum(info.length for _, info in pieces), 0, 0
    for index, info in pieces:
        mine, done = done * parts // max(total, 1) == part, done + info.length
        if not mine:
            continue
        path = folder / info.relative_path
        with read_errors(path), path.open("rb") as file:
            if path.stat().st_size < info.offset + info.length:
                raise InputError("the file ended early", where=path, value=index.fqn, fix="copy the checkpoint again")
            with (
                mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
                memoryview(mapped) as view,
                view[info.offset : info.offset + info.length] as data,
            ):
                check_records(data, f"{path} ({index.fqn})")
        read += info.length
    return read
