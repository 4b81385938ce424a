"""A source that is not what its origin says is refused; what is known of the origin is recorded."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from checkpoints import make_hf, nothing_beside

from megatron_zeda.conversion import hf_to_megatron, inject_zero_experts, megatron_to_hf
from megatron_zeda.errors import InputError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _flip(path: Path) -> Path:
    """Flip the lowest bit of a weight in the middle of a file: still a good safetensors file, still finite."""
    data = bytearray(path.read_bytes())
    data[(len(data) // 2) & ~3] ^= 1
    path.write_bytes(data)
    return path


def _refused(source: Path, path: Path, record: Path) -> None:
    said = f"{path.name}: the file is not the one that was downloaded or written.*by {record};"
    for convert in (inject_zero_experts, hf_to_megatron):
        with pytest.raises(InputError, match=said):
            convert(source, source.parent / "out")
        assert nothing_beside(source.parent / "out")


def _downloaded(folder: Path, static: Path) -> Path:
    """A folder as ``hf download --local-dir`` leaves it: notes of commit, ETag and time beside the files."""
    shutil.copytree(static, folder)
    notes = folder / ".cache/huggingface/download"
    notes.mkdir(parents=True)
    for path in [path for path in folder.iterdir() if path.is_file()]:
        etag = _sha256(path) if path.suffix == ".safetensors" else "0" * 40
        (notes / f"{path.name}.metadata").write_text(f"{COMMIT}\n{etag}\n1760000000.0\n")
    return folder


def _cached(root: Path, static: Path) -> Path:
    """A snapshot in the cache of the hub."""
    blobs, snapshot = root / "models--Owner--Some-Model/blobs", root / f"models--Owner--Some-Model/snapshots/{COMMIT}"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in static.iterdir():
        name = _sha256(path) if path.suffix == ".safetensors" else path.name
        shutil.copyfile(path, blobs / name)
        (snapshot / path.name).symlink_to(f"../../blobs/{name}")
    return snapshot


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_hf(tmp_path_factory.mktemp("origins") / "hf", shards=True)


def test_the_manifest_records_every_file_of_source_and_result(tmp_path: Path, sharded: Path) -> None:
    manifest = inject_zero_experts(sharded, tmp_path / "out")
    assert manifest == json.loads((tmp_path / "out/zeda_manifest.json").read_text())
    weights = {path.name for path in sharded.glob("*.safetensors")}
    assert len(weights) > 2
    for folder, files in ((sharded, manifest["source"]["files"]), (tmp_path / "out", manifest["files"])):
        assert {name for name in files if name.endswith(".safetensors")} == {
            path.name for path in folder.glob("*.safetensors")
        }
        for name, record in files.items():
            assert record == {"bytes": (folder / name).stat().st_size, "sha256": _sha256(folder / name)}
    assert manifest["tool"] == "inject_zero_experts"
    assert hf_to_megatron(tmp_path / "out", tmp_path / "megatron")["tool"] == "hf_to_megatron"
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    assert json.loads((tmp_path / "back/zeda_manifest.json").read_text())["tool"] == "megatron_to_hf"
    assert manifest["source"]["name"] == "hf" and manifest["source"]["revision"] is None
    assert manifest["versions"].keys() == {"megatron_zeda", "megatron-core", "torch", "transformers"}
    everything = {path.name for path in (tmp_path / "out").iterdir()}
    assert manifest["files"].keys() == everything - {"zeda_manifest.json"}


def test_a_downloaded_folder_is_checked(tmp_path: Path, sharded: Path) -> None:
    source = _downloaded(tmp_path / "hf", sharded)
    manifest = inject_zero_experts(source, tmp_path / "good")
    assert manifest["source"]["revision"] == COMMIT
    path = _flip(sorted(source.glob("*.safetensors"))[1])
    _refused(source, path, source / f".cache/huggingface/download/{path.name}.metadata")


def test_a_snapshot_in_the_hub_s_cache_is_checked(tmp_path: Path, sharded: Path) -> None:
    snapshot = _cached(tmp_path, sharded)
    manifest = inject_zero_experts(snapshot, tmp_path / "good")
    assert (manifest["source"]["name"], manifest["source"]["revision"]) == ("Owner/Some-Model", COMMIT)
    path = sorted(snapshot.glob("*.safetensors"))[1]
    _flip(path.resolve())
    _refused(snapshot, path, path)


def test_our_own_result_is_checked_but_its_configuration_may_be_edited(tmp_path: Path, sharded: Path) -> None:
    inject_zero_experts(sharded, tmp_path / "hf", shard_bytes=20_000)
    config = json.loads((tmp_path / "hf/config.json").read_text())
    (tmp_path / "hf/config.json").write_text(json.dumps({**config, "zeda_zero_logit_bias": 0.5}))
    hf_to_megatron(tmp_path / "hf", tmp_path / "megatron")
    path = _flip(sorted((tmp_path / "hf").glob("*.safetensors"))[1])
    manifest = tmp_path / "hf/zeda_manifest.json"
    with pytest.raises(InputError, match=f"{path.name}: the file is not the one.*by {manifest};.*on purpose, remove"):
        hf_to_megatron(tmp_path / "hf", tmp_path / "out")
    assert nothing_beside(tmp_path / "out")
    manifest.unlink()  # it was edited on purpose, with another tool
    hf_to_megatron(tmp_path / "hf", tmp_path / "out")


def test_an_imported_checkpoint_is_checked_on_export(tmp_path: Path, sharded: Path) -> None:
    hf_to_megatron(sharded, tmp_path / "megatron")
    megatron_to_hf(tmp_path / "megatron", tmp_path / "good")
    files = sorted(tmp_path.glob("megatron/**/*.distcp"))
    for place in (len(files[0].read_bytes()) // 2, -1):
        data = bytearray(files[0].read_bytes())
        data[place] ^= 1
        files[0].write_bytes(data)
        with pytest.raises(InputError, match=files[0].name):
            megatron_to_hf(tmp_path / "megatron", tmp_path / "out")
        assert nothing_beside(tmp_path / "out")
        data[place] ^= 1
        files[0].write_bytes(data)


def test_notes_that_say_nothing_useful_are_passed_over(tmp_path: Path, sharded: Path) -> None:
    source = _downloaded(tmp_path / "hf", sharded)
    for path in (source / ".cache/huggingface/download").iterdir():
        path.write_text("")
    assert inject_zero_experts(source, tmp_path / "out")["source"]["revision"] is None
