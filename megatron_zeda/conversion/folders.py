"""Output folders that are either complete or visibly absent, and that a killed conversion can continue.

While it is written, an output NAME is two hidden siblings: the folder ``.NAME.partial`` and the file
``.NAME.partial.journal``. The journal is both the lock against a second process and the list of finished files: its
first line is the plan (what is converted, how, by which versions), every further line one file that is on the disk and
verified. When everything is there the folder is renamed into place and the journal removed.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from megatron_zeda.errors import FULL, InputError, ZedaError, disk_errors, is_out_of_memory

MANIFEST_FILE = "zeda_manifest.json"
_log = logging.getLogger(__name__)


class NotEnoughSpaceError(ZedaError):
    """The disk will not hold what is still to be written. Finished files stay, so the same command continues."""


class OutputExistsError(InputError):
    """Something has the name of the output. Nothing is wrong with what was finished, so it stays."""


class OutputFolder:
    """A folder that appears under its name when every file in it is written, and is continued after a kill.

        with OutputFolder(path, plan=plan) as out:
            for name in names:
                if out.done(name) is None:
                    ...                      # write and verify out.partial / name
                    out.finish_file(name)
            out.manifest = {...}

    Files that were never announced with :meth:`finish_file` (small ones, made the same way by every run) may be
    written to :attr:`partial` at any time; a run that continues finds them removed.

    When the block ends without an error, every file is flushed to the disk, the manifest is written with the size and
    SHA-256 of each, and the folder is renamed into place. What says that the content of the input or of the output is
    wrong (a :class:`ZedaError`: a bad tensor, a failed verification) removes everything, parents that were created for
    it included. After anything else (killed, interrupted, out of space or memory, a file server that does not answer,
    an output of this name that somebody else made) finished files stay, and the same plan continues with them; the
    error has a note that says so.

    Attributes:
        path: where the folder will appear.
        partial: where to write.
        resumed: whether finished files of an earlier run were found.
        manifest: set it before the block ends; :data:`MANIFEST_FILE` is written from it, with ``"files"`` added.

    Raises:
        InputError: if ``path`` exists or cannot be a folder, or if a file elsewhere cannot be read.
        ZedaError: if another process writes the same output, or the disk is full or not writable.
    """

    def __init__(self, path: str | Path, *, plan: Mapping[str, Any]) -> None:
        """Name the output.

        Args:
            path: folder to create.
            plan: all that the result depends on, as JSON values. A left-over of another plan is discarded.
        """
        self.path = Path(os.path.abspath(path))
        self.partial = _partial_of(self.path)
        self.resumed = False
        self.manifest: dict[str, Any] | None = None
        self._journal = self.partial.with_name(self.partial.name + ".journal")
        self._plan = json.loads(json.dumps(plan))
        self._records: dict[str, dict[str, Any]] = {}
        self._checked: set[str] = set()
        self._created: list[Path] = []
        self._lock = -1
        self._fresh = self._renaming = self._complete = False

    def __enter__(self) -> Self:
        with disk_errors(self.path):
            if self.path.exists() and not self.partial.exists():
                self._remove_stale_journal()
            _refuse_existing(self.path)
            self._created = [parent for parent in self.path.parents if not parent.exists()]
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._acquire()
                _refuse_existing(self.path)  # another process may just have finished it
                self._continue_or_start()
            except BaseException:
                if self._fresh or (self._lock >= 0 and not self.partial.exists()):
                    self._remove()
                self._release()
                self._remove_parents()
                raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                try:
                    self._finish()
                except BaseException as failure:
                    self._fail(failure)
                    raise
            else:
                self._fail(error)
        finally:
            self._release()

    def done(self, file: str) -> dict[str, Any] | None:
        """The record of a finished file, or None if it has to be written.

        A file of an earlier run is hashed again: what changed since then is written anew.
        """
        record = self._records.get(file)
        if record is None or file in self._checked:
            return record
        path = self.partial / file
        if path.is_file() and path.stat().st_size == record["bytes"] and sha256(path) == record["sha256"]:
            self._checked.add(file)
            return record
        _log.warning("%s: is not what the interrupted run wrote, so it is written again", path)
        path.unlink(missing_ok=True)
        del self._records[file]
        return None

    def finish_file(self, file: str, *, sha256: str | None = None, **record: Any) -> dict[str, Any]:
        """Note that a file is written and verified; it is flushed to the disk first.

        Args:
            file: its name, relative to the folder, with ``/``.
            sha256: its hash if it is known already; computed otherwise.
            record: more JSON values that a continued run needs to know.

        Returns:
            The record, ``bytes`` and ``sha256`` included.
        """
        path = self.partial / file
        flush(path)
        entry = {"bytes": path.stat().st_size, "sha256": sha256 or _hash_of(path), **record}
        entry = json.loads(json.dumps(entry))  # what a continued run will see
        self._append({"file": file, **entry})
        self._records[file] = entry
        self._checked.add(file)
        return entry

    def write_json(self, file: str, values: dict[str, Any]) -> None:
        """Write a small file that every run makes the same way."""
        (self.partial / file).parent.mkdir(parents=True, exist_ok=True)
        write_json(self.partial / file, values)

    def need_space(self, num_bytes: int) -> None:
        """Refuse at the start what cannot fit in the end; ``num_bytes`` counts finished files too."""
        missing = num_bytes - sum(record["bytes"] for record in self._records.values())
        free = shutil.disk_usage(self.partial).free
        if missing > free:
            raise NotEnoughSpaceError(
                "not enough space on the disk",
                where=self.path.parent,
                value=f"{free / 1e9:.1f} GB free",
                rule=f"{missing / 1e9:.1f} GB needed",
                fix="free space or choose another folder" + self._what_stays(),
            )

    # ---- journal ----------------------------------------------------------------------------------------------------

    def _acquire(self) -> None:
        while True:
            descriptor = os.open(self._journal, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
                raise ZedaError(
                    "another process is writing this output", where=self.path, fix="wait for it or stop it"
                ) from None
            except OSError as error:
                if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                    os.close(descriptor)
                    raise
                _log.warning("%s: the file system has no locks: start no second run of this output", self._journal)
            # The process that held the lock before may have finished and removed the file.
            with suppress(FileNotFoundError):
                if os.path.samestat(os.stat(self._journal), os.fstat(descriptor)):
                    self._lock = descriptor
                    return
            os.close(descriptor)

    def _remove_stale_journal(self) -> None:
        """Of a run that was killed when all was done. One that is just ending removes its journal itself."""
        with suppress(FileNotFoundError):
            descriptor = os.open(self._journal, os.O_RDWR)
            try:
                with suppress(OSError):
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    self._journal.unlink()
            finally:
                os.close(descriptor)

    def _release(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _continue_or_start(self) -> None:
        entries, length = _read_journal(self._journal)
        if entries and entries[0] == {"plan": self._plan} and self.partial.is_dir():
            os.ftruncate(self._lock, length)  # a line that was cut off by a kill
            os.lseek(self._lock, 0, os.SEEK_END)
            self._records = {entry.pop("file"): entry for entry in entries[1:]}
            self.resumed = bool(self._records)
            for path in files_in(self.partial):
                if path.relative_to(self.partial).as_posix() not in self._records:
                    path.unlink()
            if self.resumed:
                _log.warning("%s: continuing an unfinished run, %d files are there", self.path, len(self._records))
            return
        if self.partial.exists():
            which = "was another one" if entries else "left no journal"
            _log.warning("%s: the unfinished run that left this %s, so it is discarded", self.partial, which)
            shutil.rmtree(self.partial)
        self._fresh = True
        os.ftruncate(self._lock, 0)
        os.lseek(self._lock, 0, os.SEEK_SET)
        self.partial.mkdir()
        self._append({"plan": self._plan})
        _flush_folder(self.partial.parent)

    def _append(self, entry: dict[str, Any]) -> None:
        _write_all(self._lock, json.dumps(entry).encode() + b"\n")
        os.fsync(self._lock)

    # ---- the end ----------------------------------------------------------------------------------------------------

    def _finish(self) -> None:
        names = [path.relative_to(self.partial).as_posix() for path in files_in(self.partial)]
        lost = sorted(self._records.keys() - set(names))
        if lost:
            raise ZedaError(f"{lost[0]} was written and is gone", where=self.partial, fix="run the command again")
        files = {}
        for name in names:
            if name not in self._checked:
                if name in self._records:
                    raise ZedaError(f"{name} of an earlier run was never asked for", where=self.partial)
                flush(self.partial / name)
            record = self._records.get(name) or {
                "bytes": (self.partial / name).stat().st_size,
                "sha256": sha256(self.partial / name),
            }
            files[name] = {key: record[key] for key in ("bytes", "sha256")}
        if self.manifest is not None:
            self.manifest = {**self.manifest, "files": files}
            write_json(self.partial / MANIFEST_FILE, self.manifest)
            flush(self.partial / MANIFEST_FILE)
        for folder in (self.partial, *(path for path in self.partial.rglob("*") if path.is_dir())):
            _flush_folder(folder)
        _refuse_existing(self.path)
        self._renaming = True  # an interruption may come between the next two lines
        os.replace(self.partial, self.path)
        self._complete = True
        _flush_folder(self.path.parent)
        self._journal.unlink(missing_ok=True)

    def _fail(self, error: BaseException) -> None:
        """Keep what can be continued, remove everything else, and say which."""
        if self._complete or (self._renaming and not self.partial.exists()):
            self._journal.unlink(missing_ok=True)
            error.add_note(f"the output is complete: {self.path}")
            return
        keep = bool(self._records) and not _is_about_content(error)
        if not keep:
            self._remove()
            self._remove_parents()
            if isinstance(error, KeyboardInterrupt):
                error.add_note("nothing was written")
        blamed = _blamed_input(error, self.path, self.partial, self._journal)
        if blamed is not None:
            if keep:
                blamed.add_note(self._what_stays().removeprefix("; "))
            raise blamed from error
        if isinstance(error, OSError):
            with disk_errors(self.path, more=self._what_stays() if keep else ""):
                raise error
        if keep and not isinstance(error, NotEnoughSpaceError):
            error.add_note(self._what_stays().removeprefix("; "))

    def _what_stays(self) -> str:
        if not self._records:
            return ""
        return f"; {len(self._records)} finished files stay in {self.partial}, and the same command continues with them"

    def _remove(self) -> None:
        shutil.rmtree(self.partial, ignore_errors=True)
        self._journal.unlink(missing_ok=True)

    def _remove_parents(self) -> None:
        for parent in self._created:  # nearest first
            if parent.is_dir() and not any(parent.iterdir()):
                parent.rmdir()


def look_for_unfinished(path: str | Path) -> dict[str, Any] | None:
    """What a run that was not finished left of an output: ``folder``, ``num_files`` (finished ones) and ``num_bytes``.

    Raises:
        InputError: if the output exists.
    """
    with disk_errors(path):
        out = OutputFolder(path, plan={})
        _refuse_existing(out.path)
        if not out.partial.is_dir():
            return None
        entries, _ = _read_journal(out._journal) if out._journal.exists() else ([], 0)
        num_bytes = sum(file.stat().st_size for file in files_in(out.partial))
        return {"folder": str(out.partial), "num_files": max(len(entries) - 1, 0), "num_bytes": num_bytes}


def _read_journal(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The whole lines of a journal, and how many bytes they are."""
    entries: list[dict[str, Any]] = []
    length = 0
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            entry = json.loads(line)
        except ValueError:
            break
        if not line.endswith(b"\n") or not isinstance(entry, dict) or (entries and "file" not in entry):
            break
        entries.append(entry)
        length += len(line)
    return entries, length


def _partial_of(path: Path) -> Path:
    """A hidden sibling, the same in every run, whose name is not too long when that of ``path`` is not."""
    name = path.name
    if len(os.fsencode(name)) > 200:
        digest = hashlib.sha256(os.fsencode(name)).hexdigest()[:16]
        name = os.fsdecode(os.fsencode(name)[:180]) + digest
    return path.with_name(f".{name}.partial")


def _is_about_content(error: BaseException) -> bool:
    """Whether an error says that data are wrong; not that the system did not give or take them, or a name is taken."""
    if not isinstance(error, ZedaError) or isinstance(error, (NotEnoughSpaceError, OutputExistsError)):
        return False
    causes: list[BaseException] = [error]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    return not any(isinstance(cause, (OSError, MemoryError)) or is_out_of_memory(cause) for cause in causes)


def _blamed_input(error: BaseException, path: Path, *ours: Path) -> InputError | None:
    """For an error at a file that is neither the output nor above it: one about that file."""
    if not isinstance(error, OSError) or not isinstance(error.filename, (str, os.PathLike)):
        return None
    if error.errno in FULL:
        return None  # a copy that fills the disk names its source
    place = Path(os.path.abspath(error.filename))
    if place in (path, *path.parents, *ours) or any(folder in place.parents for folder in ours):
        return None
    return InputError(f"cannot be read ({error.strerror})", where=place)


@contextmanager
def read_errors(path: Path) -> Iterator[None]:
    """Turn whatever the system says about reading an input into one :class:`InputError` that names it."""
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot be read ({error.strerror})", where=path, fix="check the file") from error


def _refuse_existing(path: Path) -> None:
    if path.exists() or path.is_symlink():
        raise OutputExistsError("the output exists", where=path, fix="remove it or choose another folder")


def files_in(folder: Path) -> list[Path]:
    """Every file below a folder, sorted."""
    return sorted(path for path in folder.rglob("*") if not path.is_dir())


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write a JSON object for people and programs."""
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def flush(path: Path) -> None:
    """Wait until a file is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def drop_from_cache(path: Path) -> None:
    """Flush a file and forget it in memory, so that reading it back reads the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)  # pages that are not on the disk yet would stay
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """Hash of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


_hash_of = sha256  # for methods that have an argument of this name


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def _flush_folder(path: Path) -> None:
    flush(path)
