"""Reading back what was written: from the disk, not from the memory that the system keeps of it."""

from __future__ import annotations

import errno
import mmap
import os
from pathlib import Path
from types import TracebackType
from typing import Self

from megatron_zeda.conversion.folders import drop_from_cache, flush
from megatron_zeda.errors import InputError

_BLOCK_BYTES = 4096
_REFUSALS = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP)


class DiskFile:
    """A finished file, read past the page cache into one buffer that is used again and again.

    Asking the system to forget a file is only a request, and filling the cache a second time costs more than reading.
    File systems without direct access are read in the ordinary way, after that request.
    """

    def __init__(self, path: Path) -> None:
        """Flush the file to the disk and open it."""
        self._path = path
        flush(path)
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
        except OSError as error:
            if error.errno not in _REFUSALS:
                raise
            self._descriptor = self._open_ordinarily()
        self._size = os.fstat(self._descriptor).st_size
        self._buffer = mmap.mmap(-1, 1 << 22)  # on a page boundary, as direct access demands

    @property
    def size(self) -> int:
        """Length of the file in bytes."""
        return self._size

    def read(self, offset: int, length: int) -> memoryview:
        """Some bytes of the file, valid until the next call.

        Raises:
            InputError: if the file ends before.
        """
        begin = offset - offset % _BLOCK_BYTES
        wanted = -(-(offset + length - begin) // _BLOCK_BYTES) * _BLOCK_BYTES
        if wanted > len(self._buffer):
            self._buffer = mmap.mmap(-1, wanted)  # what was handed out keeps the old one alive
        view, done = memoryview(self._buffer)[:wanted], 0
        while done < offset + length - begin:
            count = self._read_into(view[done:], begin + done)
            if not count:
                raise InputError("the file ended early", where=self._path)
            done += count
            if done % _BLOCK_BYTES and begin + done < self._size:  # direct access goes on at a boundary only
                done -= done % _BLOCK_BYTES
        return view[offset - begin : offset - begin + length]

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _read_into(self, view: memoryview, offset: int) -> int:
        try:
            return os.preadv(self._descriptor, [view], offset)
        except OSError as error:
            if error.errno not in _REFUSALS:
                raise
        os.close(self._descriptor)
        self._descriptor = self._open_ordinarily()
        return os.preadv(self._descriptor, [view], offset)

    def _open_ordinarily(self) -> int:
        drop_from_cache(self._path)
        return os.open(self._path, os.O_RDONLY)
