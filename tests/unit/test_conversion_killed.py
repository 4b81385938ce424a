"""Law 9 under SIGKILL and a full disk: absent or complete, continued by the same command, the same to the byte."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from checkpoints import make_hf
from killing import MANNERS, POINTS, SHARES, SIZES, SMALL_FILES, TOOLS, convert, in_child

from megatron_zeda.conversion import hf_to_megatron, inject_zero_experts
from megatron_zeda.conversion.folders import sha256
from megatron_zeda.errors import InputError, ZedaError


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What every tool reads: GLM with the layer that drafts tokens, in small files."""
    folder = tmp_path_factory.mktemp("sources")
    make_hf(folder / "static", family="glm4_moe_lite", mtp=True, shards=True)
    inject_zero_experts(folder / "static", folder / "dynamic", shard_bytes=SMALL_FILES)
    hf_to_megatron(folder / "dynamic", folder / "megatron", file_bytes=SMALL_FILES)
    return {"inject": folder / "static", "import": folder / "dynamic", "export": folder / "megatron"}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, sources: dict[str, Path]) -> dict[str, Any]:
    """Of every tool: the files of an undisturbed run, its number of points, and its largest file."""
    folder, found = tmp_path_factory.mktemp("undisturbed"), {}
    for tool, source in sources.items():
        count = in_child(tool, source, folder / tool)
        assert count > 3 * POINTS, count
        size = max(path.stat().st_size for path in (folder / tool).rglob("*"))
        found[tool] = (_contents(folder / tool), count, size)
    return found


def _contents(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): sha256(path) for path in files}


def _finished(out: Path) -> dict[str, int]:
    """Files that the journal of an unfinished run lists -> their inodes."""
    partial = out.with_name(f".{out.name}.partial")
    journal = partial.with_name(partial.name + ".journal")
    if not journal.exists() or not partial.exists():
        return {}
    lines = [line for line in journal.read_text().splitlines(keepends=True) if line.endswith("\n")]
    names = [json.loads(line)["file"] for line in lines[1:]]
    return {name: (partial / name).stat().st_ino for name in names}


@pytest.mark.slow
@pytest.mark.parametrize("tool", TOOLS)
def test_killed_at_random_points(
    tmp_path: Path, sources: dict[str, Path], undisturbed: dict[str, Any], tool: str
) -> None:
    """Every second point is in the last tenth of the run, where files are renamed and journals removed."""
    contents, count, _ = undisturbed[tool]
    generator = random.Random(tool)
    kept = killed = number = 0
    while killed < POINTS:
        point = generator.randrange(*((0, count) if number % 2 else (count - count // 10, count)))
        number += 1
        out = tmp_path / str(number) / "out"
        out.parent.mkdir()
        # Threads make the number of calls vary a little: a run that ended before its point was not killed.
        killed += in_child(tool, sources[tool], out, point, MANNERS[number % len(MANNERS)]) is None
        finished = _finished(out)
        if out.exists():  # killed when all was done: complete, and only the journal may be left
            with pytest.raises(InputError, match="the output exists"):
                convert(tool, sources[tool], out)
        else:
            convert(tool, sources[tool], out)
        assert _contents(out) == contents, f"killed at {point} of {count}"
        assert [path.name for path in out.parent.iterdir()] == ["out"]
        for name, inode in finished.items():
            assert (out / name).stat().st_ino == inode, f"{name} was written again"
        kept += bool(finished)
        shutil.rmtree(out.parent)
        assert number < 2 * POINTS, "most runs are not killed"
    assert kept >= POINTS // 4, kept  # in many runs there was something to continue


@pytest.mark.parametrize("tool", TOOLS)
def test_killed_again_and_again(
    tmp_path: Path, sources: dict[str, Path], undisturbed: dict[str, Any], tool: str
) -> None:
    """Every run gets a little further than the one before."""
    contents, count, _ = undisturbed[tool]
    out, runs = tmp_path / "out", 0
    while in_child(tool, sources[tool], out, count // 3, "half") is None:
        runs += 1
        assert runs < 20, "no run gets further"
        if out.exists():
            break
    assert runs >= 2
    assert _contents(out) == contents


@pytest.mark.parametrize("tool", TOOLS)
def test_a_limit_on_the_size_of_files(
    tmp_path: Path, sources: dict[str, Path], undisturbed: dict[str, Any], tool: str
) -> None:
    """The system itself refuses a write in the middle of a file."""
    contents, _, size = undisturbed[tool]
    error = in_child(tool, sources[tool], tmp_path / "new/out", file_limit=size - 100)
    assert isinstance(error, ZedaError), repr(error)
    assert str(tmp_path / "new/out") in str(error)
    assert not (tmp_path / "new/out").exists()
    convert(tool, sources[tool], tmp_path / "new/out")
    assert _contents(tmp_path / "new/out") == contents


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("tool", TOOLS)
def test_a_disk_that_fills_up(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    sources: dict[str, Path],
    undisturbed: dict[str, Any],
    tool: str,
    share: float,
) -> None:
    """From some sync or write on there is no space; later there is, and the same command goes on."""
    out, calls = tmp_path / "out", [0]
    with monkeypatch.context() as patch:
        _fill_after(10**9, calls, patch)
        convert(tool, sources[tool], tmp_path / "counted")
    number, calls[0] = int(share * calls[0]), 0
    with monkeypatch.context() as patch:
        _fill_after(number, calls, patch)
        with pytest.raises(ZedaError, match=f"{out}: the disk is full"):
            convert(tool, sources[tool], out)
    assert not out.exists()
    kept = _finished(out)
    assert kept or share < 0.5
    convert(tool, sources[tool], out)
    assert _contents(out) == undisturbed[tool][0]
    assert all((out / name).stat().st_ino == inode for name, inode in kept.items())


def _fill_after(number: int, calls: list[int], patch: pytest.MonkeyPatch) -> None:
    def watched(call: Any) -> Any:
        def full(*args: Any) -> Any:
            calls[0] += 1
            if calls[0] > number:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return call(*args)

        return full

    for name in ("fsync", "pwrite"):
        patch.setattr(os, name, watched(getattr(os, name)))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs; needs the right to mount."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = shutil.which("mount")
    if mount is None or os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    done = subprocess.run([mount, "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"mounting is not possible here: {done.stderr.strip()}")
    yield disk
    if subprocess.run(["umount", disk], check=False).returncode:
        subprocess.run(["umount", "--lazy", disk], check=True)
        pytest.fail("a file on the disk is still open")


def _resize(disk: Path, num_bytes: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={num_bytes}", disk], check=True)


@pytest.mark.parametrize("share", SIZES)
@pytest.mark.parametrize("tool", TOOLS)
def test_a_disk_that_is_full(
    monkeypatch: pytest.MonkeyPatch,
    small_disk: Path,
    sources: dict[str, Path],
    undisturbed: dict[str, Any],
    tmp_path: Path,
    tool: str,
    share: float,
) -> None:
    """A real file system that holds a part of the output, behind a check that believes in more."""
    out, contents = small_disk / "out", undisturbed[tool][0]
    convert(tool, sources[tool], tmp_path / "whole")
    size = sum(path.stat().st_size for path in (tmp_path / "whole").rglob("*"))
    _resize(small_disk, int(share * size))
    with pytest.raises(ZedaError, match="not enough space"):
        convert(tool, sources[tool], out)
    assert list(small_disk.iterdir()) == []
    with monkeypatch.context() as patch:
        usage = shutil.disk_usage(tmp_path)._replace(free=10**12)
        patch.setattr(shutil, "disk_usage", lambda path: usage)
        with pytest.raises(ZedaError, match=f"{out}: the disk is full"):
            convert(tool, sources[tool], out)
    assert not out.exists()
    kept = _finished(out)
    assert kept or share < 0.2
    _resize(small_disk, 4 * size)
    convert(tool, sources[tool], out)
    assert _contents(out) == contents
    assert all((out / name).stat().st_ino == inode for name, inode in kept.items())
    assert [path.name for path in small_disk.iterdir()] == ["out"]
