"""Hashes of a source that are taken while it is read, whatever the order."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_zeda.conversion import background
from megatron_zeda.conversion.background import SourceHashes
from megatron_zeda.errors import InputError

SIZE = 100_003


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(random.Random(0).randbytes(SIZE))
    return path


@pytest.fixture(autouse=True)
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a small file meets them."""
    monkeypatch.setattr(background, "_WAITING_BYTES", 20_000)
    monkeypatch.setattr(background, "_STEP_BYTES", 7_000)
    monkeypatch.setattr(background, "_CHUNK_BYTES", 1_000)


def _parts(path: Path, step: int = 3_000) -> Iterator[tuple[Path, int, memoryview]]:
    data = path.read_bytes()
    for begin in range(0, SIZE, step):
        yield path, begin, memoryview(data[begin : begin + step])


@pytest.mark.parametrize("order", ["forward", "backward", "shuffled", "some", "none", "twice"])
def test_parts_may_come_in_any_order(file: Path, order: str) -> None:
    parts = list(_parts(file))
    if order == "backward":
        parts.reverse()
    elif order in ("shuffled", "some"):
        random.Random(1).shuffle(parts)
    if order in ("some", "none"):
        parts = parts[: 5 if order == "some" else 0]
    with SourceHashes({"file": file}) as hashes:
        for part in parts * (2 if order == "twice" else 1):
            hashes.passed(*part)
        found = hashes.result()
    assert found == {"file": {"bytes": SIZE, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}}


def test_what_is_hashed_is_what_was_read(file: Path) -> None:
    """Not what the file holds when the hash gets there: the wrong bytes would be in the output."""
    parts = list(_parts(file))
    wrong = bytearray(parts[3][2])
    wrong[0] ^= 1
    parts[3] = (file, parts[3][1], memoryview(wrong))
    known = {"file": hashlib.sha256(file.read_bytes()).hexdigest()}
    with SourceHashes({"file": file}, known) as hashes, pytest.raises(InputError, match=f"{file}: .*not the one"):
        for part in parts:
            hashes.passed(*part)
        hashes.result()


def test_a_wrong_file_is_told_before_the_next_one_is_read(file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_bytes(file.read_bytes())
    with SourceHashes({"file": file, "other": other}, {"file": "0" * 64}) as hashes:
        for part in _parts(file):
            hashes.passed(*part)
        with pytest.raises(InputError, match=f"{file}: "):
            for _ in range(10_000):  # the thread may lag behind by the length of its queue
                for part in _parts(other):
                    hashes.passed(*part)


@pytest.mark.parametrize("change", ["bytes", "length", "gone"])
def test_a_file_that_changes_meanwhile_is_refused(file: Path, change: str) -> None:
    with SourceHashes({"file": file}) as hashes:
        for part in _parts(file):
            hashes.passed(*part)
        if change == "gone":
            file.unlink()
        else:
            file.write_bytes(bytes(SIZE if change == "bytes" else 10))
        with pytest.raises(InputError, match=f"{file}: "):
            hashes.result()


def test_a_conversion_that_fails_does_not_wait(file: Path) -> None:
    """With a full queue and an error on either side, leaving the block ends the thread."""
    with pytest.raises(KeyError), SourceHashes({"file": file}, {"file": "0" * 64}) as hashes:
        for part in _parts(file, step=50_000):
            hashes.passed(*part)
        raise KeyError
