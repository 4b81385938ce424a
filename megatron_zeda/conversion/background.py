"""What runs beside a conversion: verifying finished files, hashing the source. One thread each."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from megatron_zeda.conversion.folders import OutputFolder, read_errors
from megatron_zeda.errors import InputError

_CHUNK_BYTES = 1 << 20


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
    """Hash source files in the background, and compare with what is known of them.

    Reading ahead of the conversion, the thread also brings the files into the page cache, so the disk reads them once.
    """

    def __init__(self, files: Mapping[str, Path], known: Mapping[str, str] | None = None) -> None:
        """Start.

        Args:
            files: name -> file, in the order in which the conversion will read them.
            known: name -> SHA-256 that the file must have.
        """
        self._files, self._known = dict(files), dict(known or {})
        self._stop = threading.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="hash")
        self._future = self._thread.submit(self._work)

    def check(self) -> None:
        """Raise at once if a file was found wrong already."""
        if self._future.done():
            self._future.result()

    def result(self) -> dict[str, dict[str, Any]]:
        """Wait; name -> bytes and SHA-256.

        Raises:
            InputError: if a file cannot be read, or is not the one that its origin says.
        """
        return self._future.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.shutdown()

    def _work(self) -> dict[str, dict[str, Any]]:
        hashes: dict[str, dict[str, Any]] = {}
        for name, path in self._files.items():
            hashes[name] = self._hash(path)
            found, expected = hashes[name]["sha256"], self._known.get(name)
            if expected is not None and expected != found and not self._stop.is_set():
                raise InputError(
                    "the file is not the one that was downloaded or written",
                    where=path,
                    value=f"sha256 {found}",
                    rule=f"sha256 {expected} by the records beside it",
                    fix="download or convert it again",
                )
        return hashes

    def _hash(self, path: Path) -> dict[str, Any]:
        digest, size = hashlib.sha256(), 0
        buffer = memoryview(bytearray(_CHUNK_BYTES))  # used again and again: fresh memory costs more than hashing
        with read_errors(path), path.open("rb", buffering=0) as file:
            while not self._stop.is_set() and (count := file.readinto(buffer)):
                digest.update(buffer[:count])
                size += count
        return {"bytes": size, "sha256": digest.hexdigest()}
