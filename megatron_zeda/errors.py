"""The two errors a user of this project ever sees.

Every message names the place, the value, the rule and the fix, on one line, so that it can be acted on without reading
a traceback. Programming errors keep their own exception types and their traceback.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_UNSET: Any = object()
FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "a file is larger than this disk or a limit of this process allows",
}
"""What the system says when it takes no more bytes."""
BROKEN = (errno.EIO, errno.ESTALE, errno.EREMOTEIO, errno.EMFILE, errno.ENFILE)
"""What the system says when a disk or a file server fails, or when too many files are open."""


class ZedaError(Exception):
    """Something failed that is not the caller's input (exit code 1)."""

    exit_code = 1

    def __init__(
        self,
        message: str,
        *,
        where: str | Path | None = None,
        value: Any = _UNSET,
        rule: str = "",
        fix: str = "",
    ) -> None:
        """Build the one-line message.

        Args:
            message: what is wrong, a clause without a full stop.
            where: the file, folder or configuration key it is about.
            value: what was found there.
            rule: what would have been right.
            fix: what the user can do about it.
        """
        self.where, self.rule, self.fix = where, rule, fix
        text = f"{where}: {message}" if where is not None else message
        if value is not _UNSET:
            text += f" (got {value!r})"
        for part in (rule, fix):
            if part:
                text += f"; {part}"
        super().__init__(text)


class InputError(ZedaError):
    """The caller's input is wrong: a file, a key, a value or a combination (exit code 2)."""

    exit_code = 2


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out. PyTorch has no exception of its own for that on a CPU."""
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, RuntimeError) and re.search(r"can't allocate memory|out of memory", str(error)) is not None


@contextmanager
def disk_errors(where: str | Path, *, more: str = "") -> Iterator[None]:
    """Turn a full disk, a missing permission or a broken disk under ``where`` into one clear :class:`ZedaError`.

    ``more`` is added to what the message says can be done.
    """
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise ZedaError(FULL[error.errno], where=where, fix=f"free space or choose another folder{more}") from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            place = error.filename or where
            raise ZedaError(f"no access ({error.strerror})", where=place, fix=f"check the permissions{more}") from error
        if error.errno in (errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG):
            raise InputError(f"not a usable path ({error.strerror})", where=where, fix="choose another path") from error
        if error.errno in BROKEN:
            place = error.filename or where
            raise ZedaError(f"the system failed ({error.strerror})", where=place, fix=f"try again{more}") from error
        raise
