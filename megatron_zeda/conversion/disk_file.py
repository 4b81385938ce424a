"""Files that are read and written past the memory that the system keeps of them.

A checkpoint is larger than that memory, so keeping it there costs time (every page is fetched and cleared first) and
gives nothing; and what is read back to be verified shall come from the disk.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import mmap
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from megatron_zeda.conversion.folders import drop_from_cache, flush, read_errors
from megatron_zeda.errors import InputError

_BLOCK_BYTES = 4096
_BUFFER_BYTES = 1 << 23
_PART_BYTES = (1 << 22) - _BLOCK_BYTES
_MAX_OPEN = 8
_REFUSALS = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP)


class DiskFile:
    """A file, read past the page cache into one buffer that is used again and again.

    Asking the system to forget a file is only a request, and filling the cache a second time costs more than reading.
    File systems without direct access are read in the ordinary way, after that request.
    """

    def __init__(self, path: Path, *, written: bool = True) -> None:
        """Open the file; one that we have ``written`` is flushed to the disk first."""
        self._path, self._written = path, written
        if written:
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

    def parts(self, offset: int, length: int) -> Iterator[memoryview]:
        """The same bytes in parts of the size of the buffer, each valid until the next."""
        for done in range(0, length, _PART_BYTES):
            yield self.read(offset + done, min(length - done, _PART_BYTES))

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
        if self._written:
            drop_from_cache(self._path)
        return os.open(self._path, os.O_RDONLY)


class DiskFiles:
    """The files of a checkpoint, of which a few are open at a time.

    Attributes:
        passed: is given the path, the offset and the bytes of everything that is read; it may keep them.
    """

    def __init__(self) -> None:
        self._open: OrderedDict[Path, DiskFile] = OrderedDict()
        self.passed: Callable[[Path, int, memoryview], None] | None = None

    def read(self, path: Path, offset: int, length: int) -> torch.Tensor:
        """``length`` bytes of a file, as a tensor of bytes.

        Raises:
            InputError: if the file cannot be read, or ends before.
        """
        data = torch.empty(length, dtype=torch.uint8)
        view, done = memoryview(data.numpy()), 0
        with read_errors(path):
            for part in self._file(path).parts(offset, length):
                view[done : done + len(part)] = part
                if self.passed is not None:
                    self.passed(path, offset + done, view[done : done + len(part)])
                done += len(part)
        return data

    def close(self) -> None:
        """Close them."""
        while self._open:
            self._open.popitem()[1].close()

    def _file(self, path: Path) -> DiskFile:
        if path not in self._open:
            self._open[path] = DiskFile(path, written=False)
            if len(self._open) > _MAX_OPEN:
                self._open.popitem(last=False)[1].close()
        self._open.move_to_end(path)
        return self._open[path]


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
