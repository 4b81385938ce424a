"""Bad checkpoints: one clear error that names the place, and nothing left behind, whichever command reads them."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import make_hf, nothing_beside, read_tensors
from safetensors.torch import save_file

from megatron_zeda.conversion import (
    hf_to_megatron,
    inject_zero_experts,
    megatron_to_hf,
    verify_checkpoint,
)
from megatron_zeda.errors import InputError, ZedaError

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_hf(tmp_path_factory.mktemp("sharded") / "hf", shards=True)


def _refused(source: Path, match: str, *, where: str | None = None) -> None:
    """Injection, import and verification all refuse ``source`` with the same words, and leave nothing."""
    out = source.parent / "out"
    actions: list[Callable[[], Any]] = [
        lambda: inject_zero_experts(source, out),
        lambda: hf_to_megatron(source, out),
        lambda: verify_checkpoint(source, source),
    ]
    for action in actions:
        with pytest.raises(InputError, match=match) as caught:
            action()
        assert "\n" not in str(caught.value)
        assert (where or str(source)) in str(caught.value)
        assert nothing_beside(out)


def _shard(folder: Path) -> Path:
    return sorted(folder.glob("model-*.safetensors"))[1]


def _edit_index(folder: Path, edit: Callable[[dict[str, str]], None]) -> None:
    index = json.loads((folder / INDEX).read_text())
    edit(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


# ---- files ----------------------------------------------------------------------------------------------------------


def test_no_folder_no_config_no_weights(tmp_path: Path, static: Path) -> None:
    _refused(tmp_path / "nowhere", "no such folder")
    (tmp_path / "empty").mkdir()
    _refused(tmp_path / "empty", "no such file", where="config.json")
    shutil.copyfile(static / "config.json", tmp_path / "empty/config.json")
    _refused(tmp_path / "empty", r"neither model\.safetensors nor")
    torch.save({}, tmp_path / "empty/pytorch_model.bin")
    _refused(tmp_path / "empty", "convert the pickled weights")


def test_missing_shard(tmp_path: Path, sharded: Path) -> None:
    source = shutil.copytree(sharded, tmp_path / "hf")
    _shard(source).unlink()
    _refused(source, "a shard is missing", where=_shard(sharded).name)


@pytest.mark.parametrize("keep", [-1, 1000, 8, 4, 0])
def test_truncated_shard(tmp_path: Path, sharded: Path, keep: int) -> None:
    source = shutil.copytree(sharded, tmp_path / "hf")
    _shard(source).write_bytes(_shard(source).read_bytes()[:keep])
    _refused(source, "truncated", where=_shard(source).name)


def test_trailing_bytes(tmp_path: Path, static: Path) -> None:
    source = shutil.copytree(static, tmp_path / "hf")
    with (source / "model.safetensors").open("ab") as file:
        file.write(b"x")
    _refused(source, "truncated or not safetensors")


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "", 3, "x.bin"])
def test_index_naming_a_file_outside_the_folder(tmp_path: Path, sharded: Path, name: Any) -> None:
    source = shutil.copytree(sharded, tmp_path / "hf")
    shutil.copyfile(_shard(source), tmp_path / "outside.safetensors")
    _edit_index(source, lambda weight_map: weight_map.update({"lm_head.weight": name}))
    _refused(source, "cannot be a shard", where=INDEX)


def test_links_out_of_the_folder(tmp_path: Path, static: Path, sharded: Path) -> None:
    source = shutil.copytree(sharded, tmp_path / "hf")
    shutil.move(_shard(source), tmp_path / "elsewhere.safetensors")
    (source / _shard(sharded).name).symlink_to("../elsewhere.safetensors")
    _refused(source, "leads out of the folder", where=_shard(sharded).name)
    secret = tmp_path / "secret"
    secret.write_text("secret")
    tokenizer = shutil.copytree(static, tmp_path / "tokenizer")
    (tokenizer / "tokenizer.json").symlink_to(secret)
    with pytest.raises(InputError, match="leads out of the folder"):
        inject_zero_experts(tokenizer, tmp_path / "out")
    assert nothing_beside(tmp_path / "out")


def test_the_hub_cache_s_links_are_fine(tmp_path: Path, static: Path) -> None:
    blobs, snapshot = tmp_path / "models--x/blobs", tmp_path / "models--x/snapshots/abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(static.iterdir())):
        shutil.copyfile(path, blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    inject_zero_experts(snapshot, tmp_path / "out")
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())


def test_index_and_shards_that_disagree(tmp_path: Path, sharded: Path) -> None:
    source = shutil.copytree(sharded, tmp_path / "a")
    _edit_index(source, lambda weight_map: weight_map.pop("lm_head.weight"))
    _refused(source, "is in the shard only")
    source = shutil.copytree(sharded, tmp_path / "b")
    _edit_index(source, lambda weight_map: weight_map.update({"ghost": weight_map["lm_head.weight"]}))
    _refused(source, "ghost is in the index only")
    source = shutil.copytree(sharded, tmp_path / "c")
    shutil.copyfile(_shard(source), source / "model.safetensors")
    _refused(source, "both")


def test_duplicate_names(tmp_path: Path, sharded: Path, static: Path) -> None:
    source = shutil.copytree(sharded, tmp_path / "a")
    text = (source / INDEX).read_text()
    (source / INDEX).write_text(text.replace('"weight_map": {', '"weight_map": {"lm_head.weight": "x.safetensors",'))
    _refused(source, r"lm_head\.weight is there twice")
    source = shutil.copytree(static, tmp_path / "b")
    data = (source / "model.safetensors").read_bytes()
    assert data.count(b"mlp.experts.0.gate_proj") == data.count(b"mlp.experts.1.gate_proj")
    (source / "model.safetensors").write_bytes(data.replace(b"mlp.experts.0.gate_proj", b"mlp.experts.1.gate_proj"))
    _refused(source, "is there twice")


@pytest.mark.parametrize("offsets", [[0, 1], [-4, 0], "x", [8]])
def test_wrong_byte_ranges(tmp_path: Path, static: Path, offsets: Any) -> None:
    source = shutil.copytree(static, tmp_path / "hf")
    data = (source / "model.safetensors").read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header["lm_head.weight"]["data_offsets"] = offsets
    text = json.dumps(header).encode()
    (source / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])
    _refused(source, "byte range|offsets", where="model.safetensors")


def _with_tensors(static: Path, folder: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    shutil.copytree(static, folder)
    tensors = read_tensors(folder)
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_wrong_tensors(tmp_path: Path, static: Path) -> None:
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    _refused(_with_tensors(static, tmp_path / "a", lambda t: t.pop(name)), f"1 tensors are missing.*{name}")
    extra = {"model.layers.2.x": torch.zeros(1)}
    _refused(_with_tensors(static, tmp_path / "b", lambda t: t.update(extra)), "1 tensors are unexpected.*layers.2.x")
    flat = {name: torch.zeros(5)}
    _refused(_with_tensors(static, tmp_path / "c", lambda t: t.update(flat)), f"{name} has the wrong shape")
    whole = {name: torch.zeros(16, 32, dtype=torch.int64)}
    _refused(_with_tensors(static, tmp_path / "d", lambda t: t.update(whole)), "type that is not supported.*I64")


def test_a_gate_that_was_not_widened(tmp_path: Path, static: Path, dynamic: Path) -> None:
    source = shutil.copytree(static, tmp_path / "hf")
    shutil.copyfile(dynamic / "config.json", source / "config.json")
    with pytest.raises(InputError, match=r"was not widened.*2 zero experts.*inject_zero_experts"):
        hf_to_megatron(source, tmp_path / "out")
    assert nothing_beside(tmp_path / "out")


def test_layers_of_different_types(tmp_path: Path, static: Path) -> None:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.gate.weight"] = tensors["model.layers.1.mlp.gate.weight"].double()

    source = _with_tensors(static, tmp_path / "hf", edit)
    with pytest.raises(InputError, match="another type than its siblings"):
        hf_to_megatron(source, tmp_path / "out")
    assert nothing_beside(tmp_path / "out")


# ---- outputs --------------------------------------------------------------------------------------------------------


def test_an_output_that_exists_is_never_touched(tmp_path: Path, static: Path) -> None:
    hf_to_megatron(static, tmp_path / "megatron")
    for kind in ("folder", "file", "dangling"):
        out = tmp_path / kind
        if kind == "folder":
            out.mkdir()
        elif kind == "file":
            out.write_text("mine")
        else:
            out.symlink_to("nowhere")
        for action in (
            lambda out=out: inject_zero_experts(static, out),
            lambda out=out: hf_to_megatron(static, out),
            lambda out=out: megatron_to_hf(tmp_path / "megatron", out),
        ):
            with pytest.raises(InputError, match="exists"):
                action()
    assert list((tmp_path / "folder").iterdir()) == []
    assert (tmp_path / "file").read_text() == "mine"


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """The disk takes some bytes and is full then, in ``os.pwrite`` and in Python's files."""

    def fill(budget: int) -> None:
        left = [budget]

        def take(size: int) -> None:
            left[0] -= size
            if left[0] < 0:
                raise OSError(errno.ENOSPC, "No space left on device")

        real_pwrite, real_fsync = os.pwrite, os.fsync
        monkeypatch.setattr(os, "pwrite", lambda fd, data, at: (take(len(data)), real_pwrite(fd, data, at))[1])
        monkeypatch.setattr(os, "fsync", lambda fd: (take(os.fstat(fd).st_size), real_fsync(fd))[1])

    return fill


def test_full_disk(tmp_path: Path, static: Path, full_disk: Callable[[int], None]) -> None:
    hf_to_megatron(static, tmp_path / "megatron")
    full_disk(50_000)
    for action in (
        lambda: inject_zero_experts(static, tmp_path / "a/b/out"),
        lambda: hf_to_megatron(static, tmp_path / "a/b/out"),
        lambda: megatron_to_hf(tmp_path / "megatron", tmp_path / "a/b/out"),
    ):
        with pytest.raises(ZedaError, match="the disk is full"):
            action()
        assert not (tmp_path / "a").exists()  # not even the parents it had made


def test_not_enough_space_is_said_before_anything_is_written(
    tmp_path: Path, static: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ZedaError, match="not enough space"):
        inject_zero_experts(static, tmp_path / "out")
    assert nothing_beside(tmp_path / "out")


def test_the_space_for_the_new_rows_is_needed_too(
    tmp_path: Path, static: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = sum(tensor.nbytes for tensor in read_tensors(static).values())
    usage = shutil.disk_usage(tmp_path)._replace(free=old + 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ZedaError, match="not enough space"):
        inject_zero_experts(static, tmp_path / "out")


def test_a_run_interrupted_in_its_first_file_leaves_nothing(
    tmp_path: Path, static: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_zeda.conversion.safetensors_io import SafetensorsWriter

    hf_to_megatron(static, tmp_path / "megatron")
    write, calls = SafetensorsWriter.write, []

    def interrupted(*args: Any, **options: Any) -> None:
        calls.append(args)
        if len(calls) == 10:
            raise KeyboardInterrupt
        write(*args, **options)

    monkeypatch.setattr(SafetensorsWriter, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        megatron_to_hf(tmp_path / "megatron", tmp_path / "out")
    assert nothing_beside(tmp_path / "out")


def test_a_conversion_that_does_not_verify_is_not_shown(
    tmp_path: Path, static: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_zeda.models import Packing

    monkeypatch.setattr(Packing, "pack", lambda self, pieces: torch.cat([piece.flip(0) for piece in pieces]))
    with pytest.raises(ZedaError, match="verification failed"):
        hf_to_megatron(static, tmp_path / "out")
    assert nothing_beside(tmp_path / "out")


def _corrupt_writes(monkeypatch: pytest.MonkeyPatch, target: str, row: int) -> None:
    """One flipped sign in one row of one tensor, between the source and the disk."""
    from megatron_zeda.conversion.safetensors_io import SafetensorsWriter

    write = SafetensorsWriter.write

    def corrupt(self: Any, name: str, tensor: torch.Tensor, slot: int | None = None, **options: Any) -> None:
        if name == target:
            tensor = tensor.clone()
            tensor[row, 3] *= -1
        write(self, name, tensor, slot, **options)

    monkeypatch.setattr(SafetensorsWriter, "write", corrupt)


@pytest.mark.parametrize("target", ["model.layers.1.mlp.experts.2.up_proj.weight", "model.layers.1.mlp.gate.weight"])
@pytest.mark.parametrize("row", [0, -1])
def test_an_output_that_does_not_verify_is_not_shown(
    tmp_path: Path, static: Path, monkeypatch: pytest.MonkeyPatch, target: str, row: int
) -> None:
    """In a kept tensor, in a kept row of a gate or in a new one."""
    hf_to_megatron(static, tmp_path / "megatron")
    _corrupt_writes(monkeypatch, target, row)
    for action in (
        lambda: inject_zero_experts(static, tmp_path / "out"),
        lambda: megatron_to_hf(tmp_path / "megatron", tmp_path / "out"),
    ):
        with pytest.raises(ZedaError, match=f"safetensors: verification failed: {target} was not read back"):
            action()
        assert nothing_beside(tmp_path / "out")


@pytest.mark.parametrize("place", [20, -1, -3000])
def test_a_bit_that_flips_on_the_disk_is_found(
    tmp_path: Path, static: Path, monkeypatch: pytest.MonkeyPatch, place: int
) -> None:
    """In the header, at the end, in the middle: after the file was written and before it is read back."""
    import megatron_zeda.conversion.disk_file as disk_file

    flush = disk_file.flush

    def flip(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[place] ^= 1
        path.write_bytes(data)
        flush(path)

    monkeypatch.setattr(disk_file, "flush", flip)
    with pytest.raises(ZedaError, match=r"model\.safetensors"):
        inject_zero_experts(static, tmp_path / "out")
    assert nothing_beside(tmp_path / "out")


def test_an_output_that_appears_meanwhile_is_not_replaced(
    tmp_path: Path, static: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import megatron_zeda.conversion.injecting as injecting

    copy = injecting.copy_side_files
    monkeypatch.setattr(injecting, "copy_side_files", lambda *args: ((tmp_path / "out").mkdir(), copy(*args))[1])
    with pytest.raises(InputError, match="exists"):
        inject_zero_experts(static, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []
    (tmp_path / "out").rmdir()
    monkeypatch.undo()
    inject_zero_experts(static, tmp_path / "out")  # what was finished is still there
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# ---- Megatron folders -----------------------------------------------------------------------------------------------


def test_bad_megatron_folders(tmp_path: Path, static: Path) -> None:
    good, out = tmp_path / "good", tmp_path / "out"
    hf_to_megatron(static, good)
    tracker = "latest_checkpointed_iteration.txt"

    def refused(source: Path, match: str, **options: Any) -> None:
        with pytest.raises(InputError, match=match):
            megatron_to_hf(source, out, **options)
        assert nothing_beside(out)

    refused(tmp_path / "nowhere", "no such folder")
    refused(static, "no such file.*Megatron checkpoint")
    refused(good, "no such folder.*asked for", iteration=7)
    for text, match in (("", "not an iteration"), ("../../x", "not an iteration"), ("5", "no such folder")):
        bad = shutil.copytree(good, tmp_path / f"tracker{text[-1:]}")
        (bad / tracker).write_text(text)
        refused(bad, match)
    bad = shutil.copytree(good, tmp_path / "no_config")
    (bad / "hf/config.json").unlink()
    refused(bad, "no such file")
    bad = shutil.copytree(good, tmp_path / "other_shape")
    config = json.loads((bad / "hf/config.json").read_text())
    for key, value, match in (
        ("moe_intermediate_size", 8, "linear_fc1.weight has the wrong shape"),
        ("num_hidden_layers", 3, "has the wrong shape"),
        ("tie_word_embeddings", True, "unexpected, the first is output_layer.weight"),
    ):
        (bad / "hf/config.json").write_text(json.dumps({**config, key: value}))
        refused(bad, match)
    assert verify_checkpoint(good, static) == []


def test_a_padded_vocabulary_is_cut_back(tmp_path: Path, static: Path) -> None:
    """Megatron-LM pads the vocabulary for tensor parallelism; the surplus rows do not belong to the model."""
    hf_to_megatron(static, tmp_path / "megatron")
    config = json.loads((static / "config.json").read_text())
    (tmp_path / "megatron/hf/config.json").write_text(json.dumps({**config, "vocab_size": 60}))
    megatron_to_hf(tmp_path / "megatron", tmp_path / "out")
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        assert read_tensors(tmp_path / "out")[name].equal(read_tensors(static)[name][:60])
