"""The output folder: complete, or visibly absent and continued by the same plan."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import megatron_zeda.conversion.folders as folders
from megatron_zeda.conversion.folders import MANIFEST_FILE, NotEnoughSpaceError, OutputFolder, read_errors
from megatron_zeda.errors import InputError, ZedaError

PLAN = {"tool": "test", "files": {"a": [1, 2]}}


def _write(out: OutputFolder, name: str, text: str = "text", **record: object) -> bool:
    """Write a file unless it is there; whether it was written."""
    if out.done(name) is not None:
        return False
    (out.partial / name).parent.mkdir(exist_ok=True)
    (out.partial / name).write_text(text)
    out.finish_file(name, **record)
    return True


def _interrupted(path: Path, *names: str, plan: dict[str, object] | None = None) -> Path:
    """A run that finished ``names``, half-wrote another file and was interrupted; its partial folder."""
    with pytest.raises(KeyboardInterrupt) as caught, OutputFolder(path, plan=plan or PLAN) as out:
        for name in names:
            _write(out, name, f"text of {name}", note=name)
        (out.partial / "half").write_text("hal")
        raise KeyboardInterrupt
    assert not path.exists()
    if names:
        (note,) = caught.value.__notes__
        assert str(out.partial) in note and "same command continues" in note
    return out.partial


def test_complete_with_a_manifest_of_every_file(tmp_path: Path) -> None:
    with OutputFolder(tmp_path / "new/out", plan=PLAN) as out:
        assert not out.resumed
        assert out.done("sub/a") is None
        _write(out, "sub/a", "letters")
        assert out.done("sub/a") == {"bytes": 7, "sha256": hashlib.sha256(b"letters").hexdigest()}
        out.write_json("config.json", {"x": 1})
        out.manifest = {"format": 1}
        assert not (tmp_path / "new/out").exists()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out"]
    manifest = json.loads((tmp_path / "new/out" / MANIFEST_FILE).read_text())
    assert manifest == out.manifest
    assert manifest["format"] == 1
    assert manifest["files"].keys() == {"config.json", "sub/a"}
    for name, record in manifest["files"].items():
        data = (tmp_path / "new/out" / name).read_bytes()
        assert record == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def test_an_interrupted_run_is_continued(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    partial = _interrupted(tmp_path / "out", "a", "b")
    assert sorted(path.name for path in partial.iterdir()) == ["a", "b", "half"]
    with caplog.at_level(logging.WARNING), OutputFolder(tmp_path / "out", plan=dict(PLAN)) as out:
        assert out.resumed
        assert "continuing an unfinished run, 2 files" in caplog.text
        assert not (out.partial / "half").exists()
        record = out.done("a")
        assert record is not None and record["note"] == "a"
        assert [_write(out, name, f"text of {name}") for name in "abc"] == [False, False, True]
    assert {path.name: path.read_text() for path in (tmp_path / "out").iterdir()} == {
        name: f"text of {name}" for name in "abc"
    }
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("journal", ["gone", "torn"])
def test_a_left_over_without_its_journal_is_discarded(
    tmp_path: Path, journal: str, caplog: pytest.LogCaptureFixture
) -> None:
    partial = _interrupted(tmp_path / "out", "a")
    path = partial.with_name(partial.name + ".journal")
    if journal == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:10])
    with OutputFolder(tmp_path / "out", plan=PLAN) as out:
        assert "left no journal, so it is discarded" in caplog.text
        assert _write(out, "a")


def test_a_run_that_finished_nothing_leaves_nothing(tmp_path: Path) -> None:
    _interrupted(tmp_path / "new/parents/out")
    assert list(tmp_path.iterdir()) == []


def test_another_plan_starts_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _interrupted(tmp_path / "out", "a")
    with caplog.at_level(logging.WARNING), OutputFolder(tmp_path / "out", plan={**PLAN, "seed": 1}) as out:
        assert len(caplog.records) == 1 and "discarded" in caplog.text
        assert not out.resumed and out.done("a") is None
        assert list(out.partial.iterdir()) == []
        _write(out, "b")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["b"]


@pytest.mark.parametrize("cut", [1, 5, 30])
def test_a_torn_journal_line_is_a_file_that_is_not_finished(tmp_path: Path, cut: int) -> None:
    partial = _interrupted(tmp_path / "out", "a", "b")
    journal = partial.with_name(partial.name + ".journal")
    journal.write_bytes(journal.read_bytes()[:-cut])
    with OutputFolder(tmp_path / "out", plan=PLAN) as out:
        assert [_write(out, name, f"text of {name}") for name in "ab"] == [False, True]
        raise_after = journal.read_text().splitlines()
    assert [json.loads(line).get("file") for line in raise_after] == [None, "a", "b"]


@pytest.mark.parametrize("how", ["changed", "shorter", "gone"])
def test_a_finished_file_that_changed_is_written_again(tmp_path: Path, how: str) -> None:
    partial = _interrupted(tmp_path / "out", "a", "b")
    if how == "gone":
        (partial / "a").unlink()
    else:
        (partial / "a").write_text("text of A" if how == "changed" else "")
    with OutputFolder(tmp_path / "out", plan=PLAN) as out:
        assert [_write(out, name, f"text of {name}") for name in "ab"] == [True, False]
    assert (tmp_path / "out/a").read_text() == "text of a"


def test_wrong_input_and_failed_verification_remove_everything(tmp_path: Path) -> None:
    for error in (InputError("wrong"), ZedaError("verification failed")):
        with pytest.raises(type(error)), OutputFolder(tmp_path / "new/out", plan=PLAN) as out:
            _write(out, "a")
            raise error
        assert list(tmp_path.iterdir()) == []


def _stale(path: Path) -> None:
    with read_errors(path):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))


def _without_memory(path: Path) -> None:
    torch.empty(2**60, dtype=torch.uint8)


def _bad_archive(path: Path) -> None:
    try:
        _without_memory(path)
    except RuntimeError as error:
        raise InputError("the archive cannot be read", where=path) from error


def _bug(path: Path) -> None:
    raise ValueError("a bug")


def _file_is_gone(path: Path) -> None:
    (path.parent / "gone").read_text()


def _output_appears(path: Path) -> None:
    path.mkdir()
    (path / "log").write_text("of somebody else")


@pytest.mark.parametrize("trouble", [_stale, _without_memory, _bad_archive, _bug, _file_is_gone, _output_appears])
def test_what_is_not_the_fault_of_the_data_keeps_what_is_finished(
    tmp_path: Path, trouble: Callable[[Path], None]
) -> None:
    path = tmp_path / "out"
    with pytest.raises((InputError, RuntimeError, ValueError)) as caught, OutputFolder(path, plan=PLAN) as out:
        _write(out, "a")
        trouble(path)
    (note,) = caught.value.__notes__
    assert "1 finished files stay in" in note and "same command continues" in note
    if path.exists():
        assert "the output exists" in str(caught.value)
        path.rename(tmp_path / "elsewhere")
    with OutputFolder(path, plan=PLAN) as out:
        assert not _write(out, "a")


@pytest.mark.parametrize("trouble", [_stale, _without_memory, _bug])
def test_trouble_before_anything_is_finished_leaves_nothing(tmp_path: Path, trouble: Callable[[Path], None]) -> None:
    with pytest.raises(Exception) as caught, OutputFolder(tmp_path / "new/out", plan=PLAN) as out:
        (out.partial / "a").write_text("a")
        trouble(tmp_path / "out")
    assert not hasattr(caught.value, "__notes__")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_keeps_what_is_finished(tmp_path: Path) -> None:
    message = r"the disk is full; .*1 finished files stay in .*\.out\.partial, and the same command continues"
    with pytest.raises(ZedaError, match=message), OutputFolder(tmp_path / "out", plan=PLAN) as out:
        _write(out, "a")
        raise OSError(28, "No space left on device")
    with pytest.raises(NotEnoughSpaceError, match="1 finished"), OutputFolder(tmp_path / "out", plan=PLAN) as out:
        assert out.done("a")
        out.need_space(10**18)
    assert out.partial.is_dir()


def test_a_second_process_is_refused_and_a_killed_one_is_not_in_the_way(tmp_path: Path) -> None:
    """The lock goes with its process, SIGKILL included."""
    code = (
        "import sys, time\n"
        "from megatron_zeda.conversion.folders import OutputFolder\n"
        f"with OutputFolder(sys.argv[1], plan={PLAN!r}) as out:\n"
        "    (out.partial / 'a').write_text('text of a')\n"
        "    out.finish_file('a')\n"
        "    print('ready', flush=True)\n"
        "    time.sleep(600)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "out")], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        with pytest.raises(ZedaError, match="another process"), OutputFolder(tmp_path / "out", plan=PLAN):
            pass
        assert (tmp_path / ".out.partial/a").exists()
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    with OutputFolder(tmp_path / "out", plan=PLAN) as out:
        assert out.resumed and out.done("a")


def test_a_run_killed_after_the_rename_leaves_only_a_journal_that_goes(tmp_path: Path) -> None:
    partial = _interrupted(tmp_path / "out", "a")
    partial.rename(tmp_path / "out")
    with pytest.raises(InputError, match="exists"), OutputFolder(tmp_path / "out", plan=PLAN):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_second_start_while_the_first_one_ends_is_in_nobodys_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flush_folder = folders._flush_folder

    def second_start(path: Path) -> None:
        flush_folder(path)
        if (tmp_path / "out").exists():
            code = (
                "import sys\n"
                "from megatron_zeda.conversion.folders import OutputFolder\n"
                "OutputFolder(sys.argv[1], plan={}).__enter__()\n"
            )
            command = [sys.executable, "-c", code, str(tmp_path / "out")]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert "the output exists" in done.stderr
            assert (tmp_path / ".out.partial.journal").exists()

    monkeypatch.setattr(folders, "_flush_folder", second_start)
    with OutputFolder(tmp_path / "out", plan=PLAN) as out:
        _write(out, "a")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_long_names_do_not_share_a_partial_folder(tmp_path: Path) -> None:
    one, two = (OutputFolder(tmp_path / ("n" * 254 + end), plan=PLAN) for end in "ab")
    assert one.partial != two.partial


def test_a_finished_file_that_nobody_asked_for_is_not_shown(tmp_path: Path) -> None:
    """A continued run whose list of files differs from its plan's is a fault of this program."""
    _interrupted(tmp_path / "out", "a")
    with pytest.raises(ZedaError, match="never asked for"), OutputFolder(tmp_path / "out", plan=PLAN):
        pass
    assert not (tmp_path / "out").exists()


def test_an_interruption_after_the_rename_does_not_speak_of_a_partial_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = os.replace

    def interrupted(*args: object) -> None:
        monkeypatch.setattr(folders, "_flush_folder", _interrupt)
        replace(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt) as caught, OutputFolder(tmp_path / "out", plan=PLAN) as out:
        _write(out, "a")
    assert caught.value.__notes__ == [f"the output is complete: {tmp_path / 'out'}"]
    assert (tmp_path / "out/a").read_text() == "text"


def _interrupt(path: Path) -> None:
    raise KeyboardInterrupt
