"""A torch_dist folder with a malicious pickle is refused before anything in it runs."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import nothing_beside

from megatron_zeda.conversion import hf_to_megatron, megatron_to_hf
from megatron_zeda.conversion.megatron_io import check_pickles
from megatron_zeda.conversion.torch_dist import TorchDistReader
from megatron_zeda.conversion.torch_dist_writer import write_torch_dist
from megatron_zeda.errors import InputError, ZedaError
from megatron_zeda.models import HfPiece, WeightRow

ROWS = [WeightRow("a.weight", (HfPiece("a", (2, 3)),)), WeightRow("b.weight", (HfPiece("b", (4,)),), (1,), (3,))]
ROWS += [WeightRow("b.weight", (HfPiece("b", (4,)),), (layer,), (3,)) for layer in (0, 2)]


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return open, (str(self.path), "w")


@pytest.fixture
def fuse(tmp_path: Path) -> Path:
    return tmp_path / "executed"


def _write(folder: Path, state: dict[str, Any]) -> Path:
    folder.mkdir()
    dtypes = {"a.weight": torch.float32, "b.weight": torch.bfloat16}
    write_torch_dist(folder, ROWS, dtypes, lambda row: torch.ones(row.shape, dtype=dtypes[row.key]), state)
    return folder


def test_a_plain_checkpoint_passes(tmp_path: Path) -> None:
    state = {"iteration": 3, "rng": [np.random.RandomState(0).get_state(), torch.zeros(2)], "names": {"x", "y"}}
    reader = TorchDistReader(_write(tmp_path / "a", state))
    assert all(reader.read(row).equal(torch.ones(row.shape, dtype=reader.dtype(row.key))) for row in ROWS)


def test_the_bomb_works(tmp_path: Path, fuse: Path) -> None:
    """Otherwise the tests below prove nothing: PyTorch's own loader executes it."""
    folder = _write(tmp_path / "a", {"x": Bomb(fuse)})
    from megatron.core.dist_checkpointing.serialization import load_common_state_dict

    with pytest.raises(ZedaError):
        check_pickles(folder)
    assert not fuse.exists()
    (folder / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    load_common_state_dict(str(folder))
    assert fuse.exists()


def test_malicious_metadata_is_refused(tmp_path: Path, fuse: Path) -> None:
    folder = _write(tmp_path / "a", {})
    (folder / ".metadata").write_bytes(pickle.dumps(Bomb(fuse)))
    with pytest.raises(ZedaError, match="open"):
        check_pickles(folder)
    assert not fuse.exists()


def test_a_bomb_inside_real_metadata_is_refused(tmp_path: Path, fuse: Path) -> None:
    folder = _write(tmp_path / "a", {})
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    metadata.planner_data = {"x": [Bomb(fuse)]}
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ZedaError, match="open"):
        check_pickles(folder)
    assert not fuse.exists()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("torch.distributed.checkpoint.metadata", "os.system"),  # reached through an attribute of an allowed module
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo.__init__.__globals__"),
        ("torch", "load"),
        ("builtins", "getattr"),
    ],
)
def test_names_are_compared_exactly(tmp_path: Path, module: str, name: str) -> None:
    folder = _write(tmp_path / "a", {})
    strings = b"".join(b"\x8c" + bytes([len(text)]) + text.encode() for text in (module, name))
    (folder / ".metadata").write_bytes(b"\x80\x04" + strings + b"\x93.")
    with pytest.raises(ZedaError, match="nothing was executed"):
        check_pickles(folder)


@pytest.mark.parametrize("legacy", [False, True])
def test_malicious_common_pt_is_refused(tmp_path: Path, fuse: Path, legacy: bool) -> None:
    folder = _write(tmp_path / "a", {})
    torch.save({"args": Bomb(fuse)}, folder / "common.pt", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ZedaError):
        check_pickles(folder)
    assert not fuse.exists()


def test_a_pickle_with_an_archive_behind_it_is_refused(tmp_path: Path, fuse: Path) -> None:
    """Readers that look at the end of a file see a harmless archive, ``torch.load`` sees the pickle at its start."""
    folder = _write(tmp_path / "a", {})
    torch.save({"args": Bomb(fuse)}, tmp_path / "legacy", _use_new_zipfile_serialization=False)
    torch.save({}, tmp_path / "harmless")
    (folder / "common.pt").write_bytes((tmp_path / "legacy").read_bytes() + (tmp_path / "harmless").read_bytes())
    with pytest.raises(ZedaError, match="not a torch archive"):
        check_pickles(folder)
    assert not fuse.exists()


def test_a_stray_pickle_is_refused(tmp_path: Path, fuse: Path) -> None:
    folder = _write(tmp_path / "a", {})
    (folder / "extra.pkl").write_bytes(pickle.dumps(Bomb(fuse)))
    with pytest.raises(ZedaError, match="pickle"):
        check_pickles(folder)


def test_metadata_cannot_point_outside(tmp_path: Path) -> None:
    folder = _write(tmp_path / "a", {})
    shutil.copyfile(folder / "__0_0.distcp", tmp_path / "__0_0.distcp")
    metadata = (folder / ".metadata").read_bytes()
    text, longer = b"\x8c\x0c__0_0.distcp", b"\x8c\x0f../__0_0.distcp"
    assert text in metadata
    # protocol-4 frames carry their length; without the frame opcode the stream is read as it comes
    (folder / ".metadata").write_bytes(metadata[:2] + metadata[11:].replace(text, longer))
    with pytest.raises(InputError, match="outside the folder"):
        check_pickles(folder)


def test_incomplete_checkpoints_are_refused(tmp_path: Path) -> None:
    folder = _write(tmp_path / "a", {})
    data = (folder / "__0_0.distcp").read_bytes()
    (folder / "__0_0.distcp").write_bytes(data[:-1])
    with pytest.raises(InputError, match="truncated"):
        check_pickles(folder)
    (folder / "__0_0.distcp").unlink()
    with pytest.raises(InputError, match="missing"):
        check_pickles(folder)
    (folder / ".metadata").unlink()
    with pytest.raises(InputError, match="no such file"):
        check_pickles(folder)


def test_a_flipped_bit_in_an_object_is_found(tmp_path: Path) -> None:
    """PyTorch reads it without a word: here a random state that is another one."""
    folder = _write(tmp_path / "a", {"rng": torch.arange(1000)})
    path = folder / "__0_0.distcp"
    data = bytearray(path.read_bytes())
    place = data.index(torch.arange(1000).numpy().tobytes()) + 800
    data[place] ^= 1
    path.write_bytes(data)
    (state,) = torch.load(path, weights_only=True)
    assert not state["rng"].equal(torch.arange(1000))
    with pytest.raises(InputError, match="archive cannot be read"):
        check_pickles(folder)


def test_a_block_that_is_not_covered_is_refused(tmp_path: Path) -> None:
    folder = _write(tmp_path / "a", {})
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    del metadata.state_dict_metadata["b.weight"].chunks[1]
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    reader, refused = TorchDistReader(folder), []
    for row in ROWS[1:]:
        try:
            assert reader.read(row).eq(1).all()
        except InputError as error:
            refused.append(str(error))
    (message,) = refused
    assert "0 of 4 values" in message


def test_export_refuses_a_bomb_and_leaves_nothing(tmp_path: Path, static: Path, fuse: Path) -> None:
    hf_to_megatron(static, tmp_path / "megatron")
    torch.save({"args": Bomb(fuse)}, tmp_path / "megatron/release/common.pt")
    with pytest.raises(ZedaError, match="open"):
        megatron_to_hf(tmp_path / "megatron", tmp_path / "out")
    assert not fuse.exists()
    assert nothing_beside(tmp_path / "out")
