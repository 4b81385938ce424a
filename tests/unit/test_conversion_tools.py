"""The four command-line tools: output for people and programs, one line per error, exit codes."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

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
    assert out[0] == "different: 2 tensors"
    assert "model.layers.0.mlp.gate.weight" in out[1]


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


def test_failure_is_exit_1(
    tools: dict[str, ModuleType], tmp_path: Path, static: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    usage = shutil.disk_usage(tmp_path)._replace(free=0)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert tools["hf_to_megatron"].main(["--hf", str(static), "--megatron", str(tmp_path / "out")]) == 1


def test_a_terminated_run_leaves_nothing(
    tools: dict[str, ModuleType], tmp_path: Path, static: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What ``kill`` or a Slurm time limit does, in the middle of writing."""
    from megatron_zeda.conversion.safetensors_io import SafetensorsWriter

    written = []

    def write(self: Any, name: str, *args: Any) -> None:
        written.append(name)
        if len(written) == 5:
            assert any(".partial" in path.name for path in tmp_path.iterdir())
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(SafetensorsWriter, "write", write)
    assert tools["inject_zero_experts"].main(["--input", str(static), "--output", str(tmp_path / "out")]) == 130
    assert list(tmp_path.iterdir()) == []


def test_runs_as_a_plain_script_from_anywhere(tmp_path: Path, static: Path) -> None:
    """Without installation: no PYTHONPATH, another working folder."""
    command = [sys.executable, str(TOOLS / "verify_checkpoint.py"), str(static), str(static)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stdout) == (0, "equal: names, shapes, types and bits\n")
