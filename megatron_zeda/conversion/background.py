"""What runs beside a conversion: verifying finished files, hashing the source. One thread each."""

from __future__ import annotations

import hashlib
import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from megatron_zeda.conversion.folders import OutputFolder, read_errors
from megatron_zeda.conversion.origins import record_of
from megatron_zeda.errors import InputError

_CHUNK_BYTES = 1 << 20
_STEP_BYTES = 1 << 26
_WAITING_BYTES = 1 << 26
_QUEUE_LENGTH = 16  # parts of 4 MB: the hash may lag behind by no more


class Verifier:
    """Verify a written file while the next one is being written.

    with Verifier(out) as verifier:
        for name in names:
            ...                                  # write out.partial / name
            verifier.submit(name, check)         # check() reads it back and returns its SHA-256
    """

    def __init__(self, out: OutputFolder) -> None:
        self._out = out
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="verify")
        self._pending: tuple[str, Future[str], dict[str, Any]] | None = None

    def submit(self, file: str, check: Callable[[], str], **record: Any) -> None:
        """Verify a closed file. Waits for the one before, so that at most two are unfinished.

        Raises:
            ZedaError: what ``check`` of the file before raised.
        """
        self.wait()
        self._pending = file, self._thread.submit(check), record

    def wait(self) -> None:
        """Wait for everything, and put a verified file into the journal."""
        if self._pending is not None:
            file, future, record = self._pending
            self._out.finish_file(file, sha256=future.result(), **record)
            self._pending = None

    def __enter__(self) -> Self:
        # The threads of a conversion keep the processors busy; more of torch's would only wait for each other.
        self._torch_threads = torch.get_num_threads()
        torch.set_num_threads(1)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.wait()
        finally:
            self._thread.shutdown()
            torch.set_num_threads(self._torch_threads)
        if kind is not None and self._is_verified():
            self.wait()  # the file before the one that could not be written need not be written again

    def _is_verified(self) -> bool:
        return self._pending is None or self._pending[1].exception() is None


class SourceHashes:
    """Hash the files of a source while they are converted, and compare with what is known of them.

    What the conversion reads is hashed as it passes by, so the bytes that were converted are the bytes that were
    hashed, and the disk reads them once. What it does not read, or not in the order of the file, is read here.
    """

    def __init__(self, files: Mapping[str, Path], known: Mapping[str, str] | None = None) -> None:
        """Start.

        Args:
            files: name -> file.
            known: name -> SHA-256 that the file must have.
        """
        self._known = dict(known or {})
        self._hashes = {name: _FileHash(path) for name, path in files.items()}
        self._by_path = {hashed.path: (name, hashed) for name, hashed in self._hashes.items()}
        self._queue: queue.Queue[tuple[Path, int, memoryview] | None] = queue.Queue(_QUEUE_LENGTH)
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="hash")
        self._future = self._thread.submit(self._work)

    def passed(self, path: Path, offset: int, data: memoryview) -> None:
        """Note what was read of a file; the bytes must not change any more.

        Raises:
            InputError: if a file was found to be another one than its origin says.
        """
        if self._error is not None:
            raise self._error
        if path in self._by_path:
            self._queue.put((path, offset, data))

    def result(self) -> dict[str, dict[str, Any]]:
        """Hash what is left; name -> bytes and SHA-256.

        Raises:
            InputError: if a file cannot be read, changed meanwhile, or is not the one that its origin says.
        """
        self._queue.put(None)
        self._future.result()
        if self._error is not None:
            raise self._error
        for hashed in self._hashes.values():
            hashed.require_unchanged()
        return {name: hashed.record() for name, hashed in self._hashes.items()}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if not self._future.done():
            self._queue.put(None)
        self._thread.shutdown()

    def _work(self) -> None:
        while (item := self._queue.get()) is not None:
            if self._error is None and not self._stop.is_set():
                path, offset, data = item
                name, hashed = self._by_path[path]
                with self._errors():
                    hashed.take(offset, data)
                    self._compare(name, hashed)
        for name, hashed in self._hashes.items():
            if self._error is None and not self._stop.is_set():
                with self._errors():
                    hashed.finish(self._stop)
                    self._compare(name, hashed)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """A failure is kept for the main thread, and the queue goes on being emptied."""
        try:
            yield
        except Exception as error:
            self._error = error

    def _compare(self, name: str, hashed: _FileHash) -> None:
        if not hashed.complete:
            return
        expected = self._known.get(name)
        found = hashed.record()["sha256"]
        if expected is not None and expected != found:
            raise InputError(
                "the file is not the one that was downloaded or written",
                where=hashed.path,
                value=f"sha256 {found}",
                rule=f"sha256 {expected} by {record_of(hashed.path)}",
                fix="download or convert it again; if it was changed on purpose, remove that record",
            )


class _FileHash:
    """The hash of one file, whose parts come in any order."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._state = self._look()
        self._size = self._state[0]
        self._digest, self._position = hashlib.sha256(), 0
        self._waiting: dict[int, memoryview] = {}

    @property
    def complete(self) -> bool:
        return self._position == self._size

    def record(self) -> dict[str, Any]:
        return {"bytes": self._size, "sha256": self._digest.hexdigest()}

    def require_unchanged(self) -> None:
        """Refuse a file that somebody has changed since the conversion began."""
        if self._look() != self._state:
            raise InputError(
                "the file changed while it was converted",
                where=self.path,
                fix="run the command again when it is complete",
            )

    def _look(self) -> tuple[int, ...]:
        with read_errors(self.path):
            found = self.path.stat()
        return found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino

    def take(self, offset: int, data: memoryview) -> None:
        """Hash a part, as soon as all before it are."""
        if offset < self._position:
            return  # it was read here, because it came too late
        self._waiting[offset] = data
        self._drain()
        if sum(map(len, self._waiting.values())) > _WAITING_BYTES:
            self._read_to(min(self._waiting))
            self._drain()

    def finish(self, stop: threading.Event) -> None:
        """Read what never came."""
        while not self.complete and not stop.is_set():
            self._drain()
            self._read_to(min([self._size, self._position + _STEP_BYTES, *self._waiting]))

    def _drain(self) -> None:
        while (data := self._waiting.pop(self._position, None)) is not None:
            self._digest.update(data)
            self._position += len(data)

    def _read_to(self, end: int) -> None:
        buffer = memoryview(bytearray(min(_CHUNK_BYTES, end - self._position)))
        with read_errors(self.path), self.path.open("rb", buffering=0) as file:
            file.seek(self._position)
            while self._position < end:
                count = file.readinto(buffer[: end - self._position])
                if not count:
                    raise InputError("the file became shorter", where=self.path, fix="run the command again")
                self._digest.update(buffer[:count])
                self._position += count
