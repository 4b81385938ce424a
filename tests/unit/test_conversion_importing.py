"""Imports: interrupted and continued to the same bytes, tensors beside the model, and the plan before it."""

from __future__ import annotations

import hashlib
import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from checkpoints import assert_same_bits, make_hf, nothing_beside, read_tensors
from safetensors.torch import load_file, save_file

from megatron_zeda.conversion import hf_to_megatron, inject_zero_experts, megatron_to_hf
from megatron_zeda.conversion.hf_folder import HfFolder
from megatron_zeda.conversion.megatron_io import MegatronFolder, latest_checkpoint_dir, read_manifest
from megatron_zeda.conversion.torch_dist_writer import TorchDistWriter
from megatron_zeda.errors import InputError

FILE_BYTES = 30_000


def _hashes(folder: Path) -> dict[str, str]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


@pytest.fixture(scope="module")
def glm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dynamic GLM folder with a layer of multi-token prediction."""
    folder = tmp_path_factory.mktemp("glm")
    inject_zero_experts(make_hf(folder / "static", family="glm4_moe_lite", mtp=True), folder / "dynamic")
    return folder / "dynamic"


@pytest.fixture(scope="module")
def imported(glm: Path) -> Path:
    """It in Megatron's form, in one go."""
    hf_to_megatron(glm, glm.parent / "megatron", file_bytes=FILE_BYTES)
    return glm.parent / "megatron"


def test_carried_tensors_come_along_and_back(tmp_path: Path, glm: Path, imported: Path) -> None:
    everything = read_tensors(glm)
    carried = load_file(imported / "hf/carried.safetensors")
    last = f"model.layers.{json.loads((glm / 'config.json').read_text())['num_hidden_layers']}."
    assert_same_bits(carried, {name: tensor for name, tensor in everything.items() if name.startswith(last)})
    assert carried
    manifest = read_manifest(imported)
    assert (manifest["num_tensors"], manifest["num_carried"]) == (len(everything), len(carried))
    assert {"release/.metadata", "hf/carried.safetensors", "hf/config.json"} <= manifest["files"].keys()
    megatron_to_hf(imported, tmp_path / "back")
    assert_same_bits(everything, read_tensors(tmp_path / "back"))


@pytest.mark.parametrize("written", range(1, 6))
def test_interrupted_anywhere_it_continues_to_the_same_bytes(
    tmp_path: Path, glm: Path, imported: Path, written: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Finished files are kept as they are, and nothing of theirs is read from the source again."""
    write, reads = TorchDistWriter.write, list[str]()
    count = 0

    def interrupted(self: Any, file: Any, load: Any) -> Any:
        nonlocal count
        count += 1
        if count <= written:
            return write(self, file, load)
        load(file.rows[0])
        raise KeyboardInterrupt

    out = tmp_path / "megatron"
    with monkeypatch.context() as patch:
        patch.setattr(TorchDistWriter, "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            hf_to_megatron(glm, out, file_bytes=FILE_BYTES)
    partial = tmp_path / ".megatron.partial"
    kept = {path.name: path.stat().st_mtime_ns for path in (partial / "release").glob("*.distcp")}
    assert len(kept) >= written
    assert not out.exists()
    read = HfFolder.read
    monkeypatch.setattr(HfFolder, "read", lambda self, piece: reads.append(str(piece)) or read(self, piece))
    hf_to_megatron(glm, out, file_bytes=FILE_BYTES)
    assert _hashes(out) == _hashes(imported)
    finished = {name for name in kept if (out / "release" / name).stat().st_mtime_ns == kept[name]}
    assert len(finished) >= written
    assert len(reads) == len(set(reads))
    assert (len(reads) < len(read_tensors(glm))) == (written > 1)  # there are no weights in the first file


def test_a_file_that_changed_after_the_interruption_is_written_again(
    tmp_path: Path, glm: Path, imported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish = TorchDistWriter.finish

    def interrupted(self: Any, spans: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(TorchDistWriter, "finish", interrupted)
        with pytest.raises(KeyboardInterrupt):
            hf_to_megatron(glm, tmp_path / "megatron", file_bytes=FILE_BYTES)
    path = tmp_path / ".megatron.partial/release/__2_0.distcp"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    assert TorchDistWriter.finish is finish
    hf_to_megatron(glm, tmp_path / "megatron", file_bytes=FILE_BYTES)
    assert _hashes(tmp_path / "megatron") == _hashes(imported)


@pytest.mark.parametrize("name", ["model.layers.1.mlp.gate.weight", "model.layers.3.eh_proj.weight"])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_weight_that_is_no_number_is_refused(tmp_path: Path, glm: Path, name: str, value: float) -> None:
    tensors = read_tensors(glm)
    name = name if name in tensors else next(key for key in tensors if key.endswith("eh_proj.weight"))
    tensors[name].view(-1)[3] = value
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/config.json").write_text((glm / "config.json").read_text())
    save_file(tensors, tmp_path / "bad/model.safetensors")
    with pytest.raises(InputError, match=rf"model\.safetensors: {name} has values that are not finite \(got '1 of"):
        hf_to_megatron(tmp_path / "bad", tmp_path / "out")
    assert nothing_beside(tmp_path / "out")


def test_carried_tensors_of_another_shape_are_refused(tmp_path: Path, glm: Path) -> None:
    hf_to_megatron(glm, tmp_path / "megatron")
    path = tmp_path / "megatron/hf/carried.safetensors"
    tensors = load_file(path)
    name = next(key for key in tensors if key.endswith("enorm.weight"))
    for edit, message in (
        (lambda found: found | {name: found[name][1:]}, "enorm.weight is not what a checkpoint"),
        (lambda found: found | {"model.layers.9.x": torch.ones(1)}, "model.layers.9.x is not what"),
        (lambda found: {key: value for key, value in found.items() if key != name}, "missing"),
    ):
        save_file(edit(tensors), path)
        with pytest.raises(InputError, match=message):
            MegatronFolder(tmp_path / "megatron")


def test_a_release_is_found_in_every_way(tmp_path: Path, imported: Path) -> None:
    assert latest_checkpoint_dir(imported) == imported / "release"
    for folder in (
        MegatronFolder(imported),
        MegatronFolder(imported / "release"),
        MegatronFolder(imported, iteration=0),
    ):
        assert (folder.folder, folder.iteration) == (imported / "release", 0)
    with pytest.raises(InputError, match="iter_0000003: no such folder"):
        MegatronFolder(imported, iteration=3)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("released")
    with pytest.raises(InputError, match="a number or `release`"):
        MegatronFolder(tmp_path)


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "checkpoint_tools"))
    return importlib.import_module("hf_to_megatron")


def test_the_plan_is_what_is_done(
    tmp_path: Path, glm: Path, tool: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new/megatron"
    command = ["--hf", str(glm), "--megatron", str(out)]
    assert tool.main([*command, "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert list(tmp_path.iterdir()) == []  # neither the output nor its parent nor the probe
    assert tool.main([*command, "--dry-run"]) == 0
    assert "memory: at most" in capsys.readouterr().out
    assert tool.main([*command, "--json"]) == 0
    done = json.loads(capsys.readouterr().out)
    assert {key: plan[key] for key in ("num_tensors", "num_carried", "num_bytes")} == {
        key: done[key] for key in ("num_tensors", "num_carried", "num_bytes")
    }
    assert plan["num_bytes"] == sum(tensor.nbytes for tensor in read_tensors(glm).values())
    for name, nbytes in plan["files"].items():
        assert (out / name).stat().st_size >= nbytes
    assert plan["fits"] is True
    assert plan["expected_seconds"] > 0


def test_a_disk_that_is_too_small_is_seen_in_the_plan(
    tmp_path: Path, glm: Path, tool: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    usage = shutil.disk_usage(tmp_path)._replace(free=100_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert tool.main(["--hf", str(glm), "--megatron", str(tmp_path / "out"), "--dry-run"]) == 1
    assert "100 kB free: NOT ENOUGH" in capsys.readouterr().out
