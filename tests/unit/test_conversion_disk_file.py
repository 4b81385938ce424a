"""Files past the page cache: the same bytes as the ordinary way, wherever they begin and end."""

from __future__ import annotations

import errno
import hashlib
import os
import random
from pathlib import Path
from typing import Any

import pytest

from megatron_zeda.conversion import disk_file
from megatron_zeda.conversion.disk_file import DiskFile, DiskFiles, DiskWriter
from megatron_zeda.errors import InputError

BUFFER = 1 << 14


@pytest.fixture(autouse=True, params=["direct", "ordinary"])
def file_system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With and without direct access; buffers small enough that a small file fills several."""
    monkeypatch.setattr(disk_file, "_BUFFER_BYTES", BUFFER)
    monkeypatch.setattr(disk_file, "_PART_BYTES", BUFFER // 4)
    if request.param == "ordinary":
        system_open = os.open

        def without_direct(path: Any, flags: int, *args: Any, **options: Any) -> int:
            if flags & os.O_DIRECT:
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
            return system_open(path, flags, *args, **options)

        monkeypatch.setattr(os, "open", without_direct)


def _data(size: int) -> bytes:
    return random.Random(size).randbytes(size)


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4097, BUFFER - 1, BUFFER, BUFFER + 1, 3 * BUFFER, 5 * BUFFER + 777])
@pytest.mark.parametrize("step", [1 << 20, 5_003])
def test_a_file_holds_what_was_written(tmp_path: Path, size: int, step: int) -> None:
    data, path = _data(size), tmp_path / "file"
    path.write_bytes(b"what was there before" * 10_000)
    with DiskWriter(path) as writer:
        for begin in range(0, size, step):
            assert writer.tell() == begin
            writer.write(data[begin : begin + step])
    assert path.read_bytes() == data
    assert writer.sha256() == hashlib.sha256(data).hexdigest()


def test_reading_any_part(tmp_path: Path) -> None:
    data, path = _data(5 * BUFFER + 777), tmp_path / "file"
    path.write_bytes(data)
    files, passed = DiskFiles(), bytearray(len(data))

    def note(name: Path, offset: int, part: memoryview) -> None:
        assert name == path
        passed[offset : offset + len(part)] = part

    files.passed = note
    with DiskFile(path) as file:
        for begin, length in [(0, 1), (1, 4096), (4095, 2), (4096, 4096), (777, 3 * BUFFER), (len(data) - 5, 5)]:
            assert bytes(file.read(begin, length)) == data[begin : begin + length]
            assert b"".join(map(bytes, file.parts(begin, length))) == data[begin : begin + length]
            assert files.read(path, begin, length).numpy().tobytes() == data[begin : begin + length]
            assert passed[begin : begin + length] == data[begin : begin + length]
        with pytest.raises(InputError, match=f"{path}: the file ended early"):
            file.read(len(data) - 5, 6)
    files.close()


def test_few_files_are_open(tmp_path: Path) -> None:
    files, before = DiskFiles(), len(os.listdir("/proc/self/fd"))
    for number in range(50):
        path = tmp_path / str(number)
        path.write_bytes(bytes([number]) * 10)
        assert files.read(path, 3, 4).tolist() == [number] * 4
    assert len(os.listdir("/proc/self/fd")) - before <= 8
    files.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"{tmp_path / 'gone'}: cannot be read"):
        DiskFiles().read(tmp_path / "gone", 0, 1)


@pytest.mark.parametrize("call", ["pwrite", "fsync"])
def test_an_error_of_the_disk_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    """The thread that writes meets it; the caller hears of it at the latest when the file is closed."""

    def full(*args: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(os, call, full)
    with pytest.raises(OSError, match="No space"), DiskWriter(tmp_path / "file") as writer:
        writer.write(_data(BUFFER))
    assert writer.closed
    assert len(os.listdir("/proc/self/fd")) == before
