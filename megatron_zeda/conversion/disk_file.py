"""Files that are written and read back past the memory that the system keeps of them.

A checkpoint is larger than that memory, so keeping it there costs time (every page is fetched and cleared first) and
gives nothing; and what is read back shall come from the disk.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import mmap
import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from megatron_zeda.conversion.folders import drop_from_cache, flush
from megatron_zeda.errors import InputError

_BLOCK_BYTES = 4096
_BUFFER_BYTES = 1 << 23
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


class DiskWriter(io.RawIOBase):
    """A new file, written from its beginning to its end; on the disk when it is closed without an error.

    What is written is copied into one of two buffers; a thread hashes the full one and brings it to the disk meanwhile.
    File systems without direct access are written in the ordinary way.
    """

    def __init__(self, path: Path) -> None:
        """Create the file, or empty it if it is there."""
        super().__init__()
        self.path = path
        flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC
        try:
            self._descriptor = os.open(path, flags | os.O_DIRECT, 0o644)
        except OSError as error:
            if error.errno not in _REFUSALS:
                raise
            self._descriptor = os.open(path, flags, 0o644)
        self._buffer, self._spare = mmap.mmap(-1, _BUFFER_BYTES), mmap.mmap(-1, _BUFFER_BYTES)
        self._begin, self._filled = 0, 0  # where the buffer belongs in the file, and how much is in it
        self._digest = hashlib.sha256()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="write")
        self._written: Future[None] | None = None

    def writable(self) -> bool:
        """Yes."""
        return True

    def tell(self) -> int:
        """Bytes written so far."""
        return self._begin + self._filled

    def write(self, data: Any) -> int:
        """Append bytes.

        Raises:
            OSError: for a full disk; possibly of what was written before.
        """
        view = memoryview(data).cast("B")
        done = 0
        while done < len(view):
            count = min(len(view) - done, _BUFFER_BYTES - self._filled)
            self._buffer[self._filled : self._filled + count] = view[done : done + count]
            self._filled += count
            done += count
            if self._filled == _BUFFER_BYTES:
                self._wait()
                self._written = self._thread.submit(self._put, memoryview(self._buffer), self._begin)
                self._begin, self._filled = self._begin + _BUFFER_BYTES, 0
                self._buffer, self._spare = self._spare, self._buffer
        return len(view)

    def sha256(self) -> str:
        """Hash of the closed file, as it was handed to the system."""
        return self._digest.hexdigest()

    def close(self) -> None:
        """Write the rest, and wait until everything is on the disk."""
        if self.closed:
            return
        try:
            self._wait()
            # Direct access takes whole blocks only.
            fcntl.fcntl(self._descriptor, fcntl.F_SETFL, fcntl.fcntl(self._descriptor, fcntl.F_GETFL) & ~os.O_DIRECT)
            self._put(memoryview(self._buffer)[: self._filled], self._begin)
            os.fsync(self._descriptor)
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Close the file as it is."""
        if not self.closed:
            self._thread.shutdown()
            os.close(self._descriptor)
            super().close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abandon()

    def __del__(self) -> None:
        self.abandon()  # the class above would write the rest

    def _wait(self) -> None:
        if self._written is not None:
            written, self._written = self._written, None
            written.result()

    def _put(self, view: memoryview, offset: int) -> None:
        self._digest.update(view)
        done = 0
        while done < len(view):
            done += os.pwrite(self._descriptor, view[done:], offset + done)
