"""New output folders that are either complete or absent."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_zeda.errors import InputError, ZedaError, disk_errors

_CHUNK_BYTES = 1 << 22


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """Fill a folder that appears under its name only when everything in it is written.

    Yields a hidden sibling; a block that ends without an error renames it to ``path``. Any error, interruption
    included, removes it, and removes parents that were created for it.

    Raises:
        InputError: if ``path`` exists or cannot be a folder, or if a file elsewhere cannot be read.
        ZedaError: if the disk is full or not writable.
    """
    path = Path(os.path.abspath(path))
    with disk_errors(path):
        _refuse_existing(path)
        created = [parent for parent in path.parents if not parent.exists()]
        partial = _partial_of(path)
        done = False
        try:
            partial.mkdir(parents=True)
            yield partial
            _refuse_existing(path)
            os.replace(partial, path)
            done = True
        except OSError as error:
            _blame_input(error, path, partial)
            raise
        finally:
            if not done:
                shutil.rmtree(partial, ignore_errors=True)
                for parent in created:  # nearest first
                    if parent.is_dir() and not any(parent.iterdir()):
                        parent.rmdir()


def _partial_of(path: Path) -> Path:
    """A hidden sibling whose name is not too long when that of ``path`` is not."""
    name = os.fsdecode(os.fsencode(path.name)[:200])
    return path.with_name(f".{name}.partial-{os.getpid()}")


def _blame_input(error: OSError, path: Path, partial: Path) -> None:
    """Turn an error at a file that is neither the output nor above it into one about that file."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT) or not isinstance(error.filename, (str, os.PathLike)):
        return  # a copy that fills the disk names its source
    place = Path(os.path.abspath(error.filename))
    if place not in (path, partial, *path.parents) and partial not in place.parents:
        raise InputError(f"cannot be read ({error.strerror})", where=place) from error


@contextmanager
def read_errors(path: Path) -> Iterator[None]:
    """Turn whatever the system says about reading an input into one :class:`InputError` that names it."""
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot be read ({error.strerror})", where=path, fix="check the file") from error


def _refuse_existing(path: Path) -> None:
    if path.exists() or path.is_symlink():
        raise InputError("the output exists", where=path, fix="remove it or choose another folder")


def need_space(folder: Path, num_bytes: int) -> None:
    """Refuse at the start what cannot fit in the end."""
    free = shutil.disk_usage(folder).free
    if num_bytes > free:
        raise ZedaError(
            "not enough space on the disk",
            where=folder.parent,
            value=f"{free / 1e9:.1f} GB free",
            rule=f"{num_bytes / 1e9:.1f} GB needed",
            fix="free space or choose another folder",
        )


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write a JSON object for people and programs."""
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def sha256(path: Path) -> str:
    """Hash of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_CHUNK_BYTES):
            digest.update(piece)
    return digest.hexdigest()
