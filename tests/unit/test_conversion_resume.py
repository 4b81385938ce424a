"""A conversion that was interrupted at any file and started again gives the bytes of one that was not."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import make_hf, nothing_beside

from megatron_zeda.conversion import hf_to_megatron, inject_zero_experts, megatron_to_hf
from megatron_zeda.conversion.folders import OutputFolder
from megatron_zeda.conversion.hf_folder import HfFolder, pieces_of
from megatron_zeda.conversion.safetensors_io import SafetensorsWriter
from megatron_zeda.errors import InputError, ZedaError

SHARD_BYTES = 20_000
STEP = 30  # tensors that a run writes before it is interrupted; no file has more


def _hashes(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """For each tool: a sharded input, GLM with its carried layer for the injection."""
    root = tmp_path_factory.mktemp("resume")
    make_hf(root / "glm", family="glm4_moe_lite", mtp=True, shards=True)
    make_hf(root / "qwen", shards=True)
    hf_to_megatron(root / "qwen", root / "megatron")
    return {"inject": root / "glm", "export": root / "megatron"}


def _convert(tool: str, source: Path, out: Path) -> None:
    if tool == "inject":
        inject_zero_experts(source, out, shard_bytes=SHARD_BYTES)
    else:
        megatron_to_hf(source, out, shard_bytes=SHARD_BYTES)


def _failing(monkeypatch: pytest.MonkeyPatch, after: int, error: BaseException) -> Callable[[], int]:
    """Every write from a number on fails; gives how many there were."""
    write, calls = SafetensorsWriter.write, [0]

    def failing(*args: Any, **options: Any) -> None:
        calls[0] += 1
        if calls[0] > after:
            raise error
        write(*args, **options)

    monkeypatch.setattr(SafetensorsWriter, "write", failing)
    return lambda: calls[0]


@pytest.mark.parametrize("tool", ["inject", "export"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
def test_interrupted_again_and_again(
    tmp_path: Path, sources: dict[str, Path], tool: str, error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    """Each run gets a few tensors further, and none of them writes a finished file again."""
    _convert(tool, sources[tool], tmp_path / "reference")
    with pytest.MonkeyPatch.context() as patch:
        count = _failing(patch, 10**9, error)
        _convert(tool, sources[tool], tmp_path / "count")
        total = count()
    runs = 0
    while not (tmp_path / "out").exists():
        runs += 1
        assert runs < 50
        with pytest.MonkeyPatch.context() as patch:
            _failing(patch, STEP, error)
            try:
                _convert(tool, sources[tool], tmp_path / "out")
            except (KeyboardInterrupt, ZedaError) as failure:
                said = str(failure) + "".join(getattr(failure, "__notes__", []))
                assert "same command continues" in said or not (tmp_path / ".out.partial").exists()
    assert total / STEP <= runs
    assert "continuing an unfinished run" in caplog.text
    assert _hashes(tmp_path / "out") == _hashes(tmp_path / "reference") == _hashes(tmp_path / "count")
    assert {path.name for path in tmp_path.iterdir()} == {"reference", "count", "out"}


def test_a_finished_file_is_not_read_or_written_again(
    tmp_path: Path, sources: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        _failing(patch, 60, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            _convert("inject", sources["inject"], tmp_path / "out")
    there = list((tmp_path / ".out.partial").glob("*.safetensors"))
    journal = (tmp_path / ".out.partial.journal").read_text().splitlines()[1:]
    names = [json.loads(line)["file"] for line in journal]
    assert 1 <= len(names) < len(there)
    stamps = {name: (tmp_path / ".out.partial" / name).stat().st_mtime_ns for name in names}
    count = _failing(monkeypatch, 10**9, KeyboardInterrupt())
    _convert("inject", sources["inject"], tmp_path / "out")
    continued = count()
    assert {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in names} == stamps
    _convert("inject", sources["inject"], tmp_path / "whole")
    with HfFolder(tmp_path / "out") as out:
        there = sum(out.where(piece).name in names for piece in pieces_of(out.rows + out.carried))
    assert continued == (count() - continued) - there


@pytest.mark.parametrize("change", ["source", "seed", "touched", "same size and time", "replaced"])
def test_another_source_or_option_starts_again(
    tmp_path: Path, sources: dict[str, Path], change: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing of the old run may get into the new one."""
    source = shutil.copytree(sources["inject"], tmp_path / "source")
    with pytest.MonkeyPatch.context() as patch:
        _failing(patch, 60, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            _convert("inject", source, tmp_path / "out")
    seed = 1 if change == "seed" else 0
    if change == "source":
        shutil.rmtree(source)
        make_hf(source, family="glm4_moe_lite", mtp=True, shards=True, seed=5)
    elif change == "touched":
        path = sorted(source.glob("*.safetensors"))[0]
        os.utime(path, ns=(1, 1))
    elif change in ("same size and time", "replaced"):
        path = sorted(source.glob("*.safetensors"))[0]
        stat, data = path.stat(), bytearray(path.read_bytes())
        data[-1] ^= 1
        if change == "replaced":
            path.rename(tmp_path / "old")
        path.write_bytes(data)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with caplog.at_level(logging.WARNING):
        inject_zero_experts(source, tmp_path / "out", seed=seed, shard_bytes=SHARD_BYTES)
    assert "so it is discarded" in caplog.text
    inject_zero_experts(source, tmp_path / "fresh", seed=seed, shard_bytes=SHARD_BYTES)
    assert _hashes(tmp_path / "out") == _hashes(tmp_path / "fresh")


def test_a_failed_verification_removes_what_was_finished(
    tmp_path: Path, sources: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    write = SafetensorsWriter.write

    def corrupt(self: Any, name: str, tensor: torch.Tensor, *args: Any, **options: Any) -> None:
        write(self, name, -tensor if name == "model.norm.weight" else tensor, *args, **options)

    monkeypatch.setattr(SafetensorsWriter, "write", corrupt)
    for tool in ("inject", "export"):
        with pytest.raises(ZedaError, match=r"\.safetensors: verification failed: model\.norm\.weight"):
            _convert(tool, sources[tool], tmp_path / "out")
        assert nothing_beside(tmp_path / "out")


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_not_finite_are_refused(tmp_path: Path, value: float) -> None:
    from safetensors.torch import load_file, save_file

    source = make_hf(tmp_path / "hf", shards=True)
    path = sorted(source.glob("*.safetensors"))[2]
    tensors = load_file(path)
    name = sorted(tensors)[0]
    tensors[name].reshape(-1)[-1] = value
    save_file(tensors, path)
    with pytest.raises(InputError, match=f"{path.name}: {name} has values that are not finite.*1 of"):
        inject_zero_experts(source, tmp_path / "out")
    assert nothing_beside(tmp_path / "out")


@pytest.mark.parametrize("tool", ["inject", "import", "export"])
def test_a_tokenizer_that_leads_out_is_refused_before_a_weight_is_written(
    tmp_path: Path, sources: dict[str, Path], tool: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = shutil.copytree(sources["export" if tool == "export" else "inject"], tmp_path / "source")
    (tmp_path / "tokenizer.json").write_text("{}")
    (source / ("hf" if tool == "export" else "") / "tokenizer.json").symlink_to(tmp_path / "tokenizer.json")

    def refuse(*args: Any, **options: Any) -> None:
        raise AssertionError("a conversion was started")

    monkeypatch.setattr(OutputFolder, "__enter__", refuse)
    with pytest.raises(InputError, match=r"tokenizer\.json: the file is a link that leads out"):
        if tool == "import":
            hf_to_megatron(source, tmp_path / "out")
        else:
            _convert(tool, source, tmp_path / "out")
