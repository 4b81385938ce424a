"""The four command-line tools: output for people and programs, one line per error, exit codes."""

from __future__ import annotations

import builtins
import errno
import importlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

TOOLS = Path(__file__).resolve().parents[2] / "checkpoint_tools"
NAMES = ("inject_zero_experts", "hf_to_megatron", "megatron_to_hf", "verify_checkpoint")


@pytest.fixture
def tools(monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    monkeypatch.syspath_prepend(str(TOOLS))
    before = signal.getsignal(signal.SIGTERM)
    yield {name: importlib.import_module(name) for name in NAMES}
    signal.signal(signal.SIGTERM, before)


def _result(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    captured = capsys.readouterr()
    assert captured.err == ""  # no bar, no noise: this is not a terminal
    (line,) = captured.out.splitlines()
    return dict(json.loads(line))


def test_the_whole_way_and_back(
    tools: dict[str, ModuleType], tmp_path: Path, static: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dynamic, megatron, back = (str(tmp_path / name) for name in ("dynamic", "megatron", "back"))
    inject = ["--input", str(static), "--output", dynamic, "--num-zero-experts", "3", "--seed", "7", "--json"]
    assert tools["inject_zero_experts"].main(inject) == 0
    result = _result(capsys)
    assert (result["num_zero_experts"], result["injection_seed"]) == (3, 7)
    assert tools["hf_to_megatron"].main(["--hf", dynamic, "--megatron", megatron, "--json"]) == 0
    assert _result(capsys)["injection_seed"] == 7
    assert tools["megatron_to_hf"].main(["--megatron", megatron, "--hf", back, "--json"]) == 0
    assert _result(capsys)["iteration"] == 0
    assert tools["verify_checkpoint"].main([dynamic, back, "--json"]) == 0
    assert _result(capsys) == {"equal": True, "differences": []}
    assert tools["verify_checkpoint"].main([str(static), back]) == 1
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "different: 5 lines"
    assert out[1:4] == [
        "config.json: use_zce_mask is missing and False",
        "config.json: zce_nums is missing and [3]",
        "config.json: zce_types is missing and ['zero']",
    ]
    assert "model.layers.0.mlp.gate.weight" in out[4]


@pytest.mark.parametrize("name", NAMES)
def test_bad_input_is_one_line_and_exit_2(
    tools: dict[str, ModuleType], tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    nowhere, out = str(tmp_path / "nowhere"), str(tmp_path / "out")
    arguments = {
        "inject_zero_experts": ["--input", nowhere, "--output", out],
        "hf_to_megatron": ["--hf", nowhere, "--megatron", out],
        "megatron_to_hf": ["--megatron", nowhere, "--hf", out],
        "verify_checkpoint": [nowhere, nowhere],
    }[name]
    assert tools[name].main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith(f"error: {nowhere}")
    assert tools[name].main([*arguments, "--json"]) == 2
    assert nowhere in json.loads(capsys.readouterr().out)["error"]
    assert not Path(out).exists()


def _arguments(name: str, source: str, out: str) -> list[str]:
    return {
        "inject_zero_experts": ["--input", source, "--output", out],
        "hf_to_megatron": ["--hf", source, "--megatron", out],
        "megatron_to_hf": ["--megatron", source, "--hf", out],
        "verify_checkpoint": [source, source],
    }[name]


def _error(tool: ModuleType, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of a refused command."""
    assert tool.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("error: ")
    return line


@pytest.mark.parametrize("name", NAMES[:3])
def test_outputs_that_cannot_be_folders(
    tools: dict[str, ModuleType], tmp_path: Path, static: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = static
    if name == "megatron_to_hf":
        source = tmp_path / "megatron"
        tools["hf_to_megatron"].main(["--hf", str(static), "--megatron", str(source)])
        capsys.readouterr()
    (tmp_path / "afile").write_text("mine")
    before = sorted(tmp_path.iterdir())
    for out in ("afile/out", "afile/new/out", "n" * 256, f"{'n' * 256}/out", f"new/{'n' * 256}"):
        line = _error(tools[name], _arguments(name, str(source), str(tmp_path / out)), capsys)
        assert line.startswith(f"error: {tmp_path / out}: not a usable path")
        assert sorted(tmp_path.iterdir()) == before
    assert (tmp_path / "afile").read_text() == "mine"
    # The longest name there is: the hidden folder beside it must not be longer.
    assert tools[name].main(_arguments(name, str(source), str(tmp_path / ("n" * 255)))) == 0
    assert sorted({*tmp_path.iterdir()} - {*before}) == [tmp_path / ("n" * 255)]


@pytest.mark.parametrize("name", NAMES)
def test_inputs_that_cannot_be_read(
    tools: dict[str, ModuleType], tmp_path: Path, static: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    source = tmp_path / "source"
    folder = source / "hf" if name == "megatron_to_hf" else source
    if name == "megatron_to_hf":
        tools["hf_to_megatron"].main(["--hf", str(static), "--megatron", str(source)])
    else:
        shutil.copytree(static, source)
    capsys.readouterr()
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()
    line = _error(tools[name], _arguments(name, str(source), str(out)), capsys)
    assert line == f"error: {folder}/config.json: cannot be read (Is a directory)"
    for nowhere in ("n" * 256, f"{folder}/config.json/x/y", f"{static}/config.json/x"):
        assert "no such folder" in _error(tools[name], _arguments(name, nowhere, str(out)), capsys)
    assert not out.exists()


@pytest.mark.parametrize("name", NAMES[:2])
def test_an_unreadable_input_is_named_while_the_output_is_being_written(
    tools: dict[str, ModuleType],
    tmp_path: Path,
    static: Path,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = shutil.copytree(static, tmp_path / "in/hf")
    (source / "tokenizer.json").write_text("{}")

    def denied(path: Any, target: Any) -> None:
        if Path(path).name == "tokenizer.json":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(shutil, "copyfile", denied)
    line = _error(tools[name], _arguments(name, str(source), str(tmp_path / "out")), capsys)
    assert line.startswith(f"error: {source}/tokenizer.json: cannot be read (Permission denied); ")
    assert line.endswith("and the same command continues with them")
    monkeypatch.setattr(os, "preadv", _broken_disk)
    line = _error(tools[name], _arguments(name, str(source), str(tmp_path / "other")), capsys)
    assert line.startswith(f"error: {source}/model.safetensors: cannot be read (Input/output error)")
    assert not (tmp_path / "out").exists() and not (tmp_path / "other").exists()


def _broken_disk(*args: Any) -> int:
    raise OSError(errno.EIO, "Input/output error")


def _denied(path: Path, real: Callable[..., Any], name: Any, *args: Any, **options: Any) -> Any:
    if isinstance(name, (str, Path)) and Path(name) == path:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))
    return real(name, *args, **options)


@pytest.mark.parametrize("file", ["latest_checkpointed_iteration.txt", ".metadata", "__1_0.distcp", "__0_0.distcp"])
def test_a_megatron_file_that_cannot_be_read_is_named(
    tools: dict[str, ModuleType],
    tmp_path: Path,
    static: Path,
    file: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = tmp_path / "megatron"
    assert tools["hf_to_megatron"].main(["--hf", str(static), "--megatron", str(source)]) == 0
    capsys.readouterr()
    (path,) = source.rglob(file)
    for module, real in ((io, io.open), (builtins, io.open), (os, os.open)):
        monkeypatch.setattr(module, "open", partial(_denied, path, real))
    line = _error(tools["megatron_to_hf"], _arguments("megatron_to_hf", str(source), str(tmp_path / "out")), capsys)
    assert line.startswith(f"error: {path}: cannot be read (Permission denied)")
    assert not any("out" in path.name for path in tmp_path.iterdir())


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENXIO])
def test_an_output_that_cannot_be_written_is_one_line(
    tools: dict[str, ModuleType],
    tmp_path: Path,
    static: Path,
    number: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def broken(*args: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", broken)
    assert tools["inject_zero_experts"].main(_arguments("inject_zero_experts", str(static), str(tmp_path / "out"))) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "the system failed" in line and os.strerror(number) in line
    assert list(tmp_path.iterdir()) == []


def test_not_enough_memory_is_one_line(
    tools: dict[str, ModuleType],
    tmp_path: Path,
    static: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from megatron_zeda.conversion.safetensors_io import SafetensorsWriter

    def too_much(*args: Any, **options: Any) -> None:
        torch.empty(2**60, dtype=torch.uint8)

    monkeypatch.setattr(SafetensorsWriter, "write", too_much)
    assert tools["inject_zero_experts"].main(_arguments("inject_zero_experts", str(static), str(tmp_path / "out"))) == 1
    assert capsys.readouterr().err == "error: not enough memory\n"


def test_failure_is_exit_1(
    tools: dict[str, ModuleType], tmp_path: Path, static: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=0)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert tools["hf_to_megatron"].main(["--hf", str(static), "--megatron", str(tmp_path / "out")]) == 1


def test_a_terminated_run_leaves_nothing(
    tools: dict[str, ModuleType],
    tmp_path: Path,
    static: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What ``kill`` or a Slurm time limit does, in the middle of writing."""
    from megatron_zeda.conversion.safetensors_io import SafetensorsWriter

    written = []

    def write(self: Any, name: str, *args: Any, **options: Any) -> None:
        written.append(name)
        if len(written) == 5:
            assert any(".partial" in path.name for path in tmp_path.iterdir())
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(SafetensorsWriter, "write", write)
    assert tools["inject_zero_experts"].main(["--input", str(static), "--output", str(tmp_path / "out")]) == 143
    assert capsys.readouterr().err.splitlines()[-1] == "error: interrupted; nothing was written"
    assert list(tmp_path.iterdir()) == []


def test_a_terminated_run_says_what_stays_and_continues(
    tools: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from checkpoints import make_hf

    from megatron_zeda.conversion.safetensors_io import SafetensorsWriter

    source, out = make_hf(tmp_path / "hf", shards=True), tmp_path / "out"
    arguments = ["--input", str(source), "--output", str(out), "--shard-gb", "0.00002"]
    write, calls = SafetensorsWriter.write, []

    def terminated(*args: Any, **options: Any) -> None:
        calls.append(args)
        if len(calls) == 30:
            os.kill(os.getpid(), signal.SIGTERM)
        write(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(SafetensorsWriter, "write", terminated)
        assert tools["inject_zero_experts"].main(arguments) == 143
    line = capsys.readouterr().err.splitlines()[-1]  # importing PyTorch may have warned before
    assert line.startswith("error: interrupted; ") and line.endswith("and the same command continues with them")
    assert tools["inject_zero_experts"].main([*arguments, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert re.search(rf"{tmp_path}/\.out\.partial: [1-9] finished files of a run that was interrupted", shown)
    # What is there already needs no more space.
    usage = shutil.disk_usage(tmp_path)
    for free, code in ((usage.free, 0), (0, 1)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: usage._replace(free=free))
        assert tools["inject_zero_experts"].main([*arguments, "--dry-run", "--json"]) == code
        plan = json.loads(capsys.readouterr().out)
        assert plan["free_bytes"] == free + plan["unfinished"]["num_bytes"]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert tools["inject_zero_experts"].main(arguments) == 0
    assert "verified" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"hf", "out"}


@pytest.mark.parametrize("name", NAMES[:2])
@pytest.mark.parametrize("after", ["the rename", "the flush"])
def test_a_run_terminated_when_all_is_done_says_that_it_is(
    tools: dict[str, ModuleType],
    tmp_path: Path,
    static: Path,
    name: str,
    after: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A script that believed otherwise would start again, or delete a good checkpoint."""
    from megatron_zeda.conversion import folders

    out = tmp_path / "out"
    module, call = (os, "replace") if after == "the rename" else (folders, "_flush_folder")
    real = getattr(module, call)

    def terminated(*args: Any) -> None:
        real(*args)
        if out.exists():
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(module, call, terminated)
        assert tools[name].main(_arguments(name, str(static), str(out))) == 143
    assert capsys.readouterr().err.splitlines()[-1] == f"error: interrupted; the output is complete: {out}"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert tools["verify_checkpoint"].main([str(out), str(out)]) == 0


@pytest.mark.parametrize("side", ["hf", "megatron"])
@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("zeda_zero_logit_bias", 3.0, "is 0.0 and 3.0"),
        ("rms_norm_eps", 0.5, "is 1e-06 and 0.5"),
        ("num_experts_per_tok", 1, "is 2 and 1"),
        ("rope_theta", 10.0, None),
        ("transformers_version", "9", None),
        ("dtype", "float64", None),
    ],
)
def test_another_configuration_is_another_model(
    tools: dict[str, ModuleType],
    tmp_path: Path,
    dynamic: Path,
    side: str,
    key: str,
    value: object,
    said: str | None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    other, config = tmp_path / "other", tmp_path / "other/config.json"
    if side == "megatron":
        tools["hf_to_megatron"].main(["--hf", str(dynamic), "--megatron", str(other)])
        config = other / "hf/config.json"
    else:
        shutil.copytree(dynamic, other)
    values = json.loads(config.read_text())
    if key == "rope_theta":  # transformers 4 spells it so
        values["rope_theta"] = values.pop("rope_parameters")["rope_theta"]
    else:
        values[key] = value
    config.write_text(json.dumps(values))
    capsys.readouterr()
    assert tools["verify_checkpoint"].main([str(dynamic), str(other)]) == int(said is not None)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:] == ([] if said is None else [f"config.json: {key} {said}"])


def test_a_copy_is_checked_alone(
    tools: dict[str, ModuleType], tmp_path: Path, dynamic: Path, static: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(dynamic, tmp_path / "copy")
    verify = tools["verify_checkpoint"].main
    assert verify([str(copy)]) == 0
    assert "every file" in capsys.readouterr().out
    data = bytearray((copy / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (copy / "model.safetensors").write_bytes(data)
    (copy / "config.json").write_text("{}")
    (copy / "modeling_zeda_base.py").unlink()
    assert verify([str(copy)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "different: 3 files"
    assert lines[1].startswith("config.json: 2 bytes, and ")
    assert lines[2:] == [
        "model.safetensors: another SHA-256 than when it was written",
        "modeling_zeda_base.py: missing",
    ]
    assert verify([str(static)]) == 2
    assert "no zeda_manifest.json that lists its files" in capsys.readouterr().err
    assert verify([str(copy), "--logits"]) == 2
    assert "needs two checkpoints" in capsys.readouterr().err


def test_an_id_of_the_hub_is_not_a_folder(
    tools: dict[str, ModuleType], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in NAMES[:2]:
        line = _error(tools[name], _arguments(name, "Qwen/Qwen3-30B-A3B", str(tmp_path / "out")), capsys)
        assert line.endswith("run `hf download Qwen/Qwen3-30B-A3B --local-dir FOLDER` first")


def test_the_size_of_an_import_s_files(tools: dict[str, ModuleType], tmp_path: Path, static: Path) -> None:
    for size, several in (("2", False), ("0.00002", True)):
        out = tmp_path / size
        assert tools["hf_to_megatron"].main(["--hf", str(static), "--megatron", str(out), "--file-gb", size]) == 0
        assert (len(list(out.glob("release/*.distcp"))) > 3) == several


@pytest.mark.parametrize("name", ["release", "iter_0000100"])
def test_a_hugging_face_folder_may_have_any_name(
    tools: dict[str, ModuleType], tmp_path: Path, static: Path, name: str
) -> None:
    named = shutil.copytree(static, tmp_path / name)
    assert tools["verify_checkpoint"].main([str(named), str(static)]) == 0


def test_a_manifest_with_an_unknown_layout_is_refused(
    tools: dict[str, ModuleType], tmp_path: Path, static: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, manifest = tmp_path / "megatron", tmp_path / "megatron/zeda_manifest.json"
    tools["hf_to_megatron"].main(["--hf", str(static), "--megatron", str(source)])
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "expert_layout": "bogus"}))
    capsys.readouterr()
    line = _error(tools["megatron_to_hf"], _arguments("megatron_to_hf", str(source), str(tmp_path / "out")), capsys)
    assert line.startswith(f"error: {manifest}: `expert_layout` is wrong (got 'bogus')")


def test_two_expert_layouts_are_not_compared_without_saying_so(tmp_path: Path) -> None:
    from checkpoints import make_hf

    from megatron_zeda.conversion import verify_checkpoint

    one, two = make_hf(tmp_path / "one"), make_hf(tmp_path / "two", fused=True)
    first, *_ = verify_checkpoint(one, two)
    assert first == "experts lie per_expert in the first and fused in the second; compare with --logits"


def test_runs_as_a_plain_script_from_anywhere(tmp_path: Path, static: Path) -> None:
    """Without installation: no PYTHONPATH, another working folder."""
    command = [sys.executable, str(TOOLS / "verify_checkpoint.py"), str(static), str(static)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "equal: configuration, names, shapes, types and bits\n")


@pytest.mark.parametrize("name", NAMES[:3])
def test_a_dry_run_says_what_would_be_written_and_writes_nothing(
    tools: dict[str, ModuleType], tmp_path: Path, static: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = static
    if name == "megatron_to_hf":
        source = tmp_path / "megatron"
        tools["hf_to_megatron"].main(["--hf", str(static), "--megatron", str(source)])
        capsys.readouterr()
    before = sorted(tmp_path.iterdir())
    arguments = _arguments(name, str(source), str(tmp_path / "new/out"))
    assert tools[name].main([*arguments, "--dry-run", "--json"]) == 0
    planned = _result(capsys)
    assert sorted(tmp_path.iterdir()) == before
    assert tools[name].main([*arguments, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert f"{planned['num_tensors']} tensors, 0 of them carried" in shown and "time: about" in shown
    assert tools[name].main([*arguments, "--json"]) == 0
    done = _result(capsys)
    assert "output exists" in _error(tools[name], [*arguments, "--dry-run"], capsys)
    assert done["num_tensors"] == planned["num_tensors"]
    for file, size in planned["files"].items():
        assert 0 <= (tmp_path / "new/out" / file).stat().st_size - size < 60_000  # torch_dist counts weights only
        if file.endswith(".safetensors"):
            assert (tmp_path / "new/out" / file).stat().st_size == size
