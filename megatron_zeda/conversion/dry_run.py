"""What a conversion would do: files, tensors, disk, memory and time. Only a probe without a name is written."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from megatron_zeda.conversion.folders import look_for_unfinished, read_errors
from megatron_zeda.conversion.hf_folder import pieces_of
from megatron_zeda.conversion.verification import Source
from megatron_zeda.errors import disk_errors

_PROBE_BYTES = 1 << 27
_PROBE_SECONDS = 2.0
_CHUNK_BYTES = 1 << 23
_MEMORY_BYTES = 10**9
_FILES_SHOWN = 8


def dry_run(view: Source, output: str | Path, sources: Iterable[Path], files: Mapping[str, int]) -> dict[str, Any]:
    """Plan a conversion without doing it.

    Args:
        view: what the output would hold.
        output: the folder that would be created.
        sources: the files that would be read.
        files: name -> bytes of the weight files that would be written.

    Returns:
        JSON values: ``files``, ``num_tensors``, ``num_carried`` (of them), ``num_bytes``, ``free_bytes``, ``fits``,
        ``unfinished`` (what an interrupted run left, ``folder``, ``num_files``, ``num_bytes``, or None: it is continued
        or discarded, so its bytes count as free), ``memory_bytes`` (a bound), ``read_rate`` and ``write_rate`` (bytes
        per second, measured now) and ``expected_seconds``.

    Raises:
        InputError: if a source cannot be read, or the output exists.
        ZedaError: if nothing can be written where the output would be.
    """
    unfinished = look_for_unfinished(output)
    folder = next(path for path in Path(os.path.abspath(output)).parents if path.is_dir())
    total, free = sum(files.values()), shutil.disk_usage(folder).free
    rows = [*view.rows, *view.carried]
    largest = max(row.numel * view.dtype(row.pieces[0]).itemsize for row in rows)
    read_rate = _read_rate(max(sources, key=lambda path: path.stat().st_size))
    write_rate = _write_rate(folder, min(_PROBE_BYTES, free // 2))
    free += unfinished["num_bytes"] if unfinished else 0
    return {
        "files": dict(files),
        "num_tensors": len({piece.name for piece in pieces_of(rows)}),
        "num_carried": len({piece.name for piece in pieces_of(view.carried)}),
        "num_bytes": total,
        "free_bytes": free,
        "fits": total <= free,
        "unfinished": unfinished,
        "memory_bytes": 2 * largest + _MEMORY_BYTES,
        "read_rate": read_rate,
        "write_rate": write_rate,
        "expected_seconds": total * (2 / read_rate + 1 / write_rate),  # the source, the result, and reading it back
    }


def report_lines(report: Mapping[str, Any]) -> list[str]:
    """The plan for people."""
    sizes = list(report["files"].items())
    lines = [f"{name}: {_size(nbytes)}" for name, nbytes in sizes[:_FILES_SHOWN]]
    if len(sizes) > _FILES_SHOWN:
        lines.append(f"... and {len(sizes) - _FILES_SHOWN} more files")
    unfinished = report["unfinished"]
    if unfinished is not None:
        lines.append(
            f"{unfinished['folder']}: {unfinished['num_files']} finished files of a run that was interrupted; they are "
            "kept if it was this conversion, otherwise discarded"
        )
    enough = "enough" if report["fits"] else "NOT ENOUGH"
    return [
        *lines,
        f"{report['num_tensors']} tensors, {report['num_carried']} of them carried beside the model",
        f"disk: {_size(report['num_bytes'])} needed, {_size(report['free_bytes'])} free: {enough}",
        f"memory: at most {_size(report['memory_bytes'])}",
        f"time: about {_duration(report['expected_seconds'])} "
        f"(reading {_size(report['read_rate'])}/s, writing {_size(report['write_rate'])}/s), verification included",
    ]


def _read_rate(path: Path) -> float:
    """Bytes per second of reading a file that is not in memory."""
    with read_errors(path), path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, _PROBE_BYTES, os.POSIX_FADV_DONTNEED)
        buffer, done, start = bytearray(_CHUNK_BYTES), 0, time.perf_counter()
        while done < _PROBE_BYTES and time.perf_counter() - start < _PROBE_SECONDS:
            count = file.readinto(buffer)
            if not count:
                break
            done += count
        return max(done, 1) / max(time.perf_counter() - start, 1e-6)


def _write_rate(folder: Path, num_bytes: int) -> float:
    """Bytes per second of writing and flushing a file that has no name, so that nothing can leave it behind."""
    data = os.urandom(_CHUNK_BYTES)
    with disk_errors(folder), tempfile.TemporaryFile(dir=folder, prefix=".zeda-probe-", buffering=0) as file:
        done, start = 0, time.perf_counter()
        while done == 0 or (done < num_bytes and time.perf_counter() - start < _PROBE_SECONDS):
            done += file.write(data)
        os.fsync(file.fileno())
        return done / max(time.perf_counter() - start, 1e-6)


def _size(nbytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 999.5:
            return f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.3g} TB"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
