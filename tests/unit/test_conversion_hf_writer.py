"""The writer of Hugging Face weights: shards, index, order, and each piece read exactly once."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from checkpoints import assert_same_bits, make_hf, nothing_beside, read_tensors
from safetensors import safe_open

from megatron_zeda.conversion.folders import OutputFolder
from megatron_zeda.conversion.hf_folder import HfFolder, pieces_of
from megatron_zeda.conversion.hf_writer import file_sizes, plan_files, write_hf
from megatron_zeda.errors import ZedaError
from megatron_zeda.models import HfPiece, WeightRow

FORMS = [("qwen3_moe", False), ("qwen3_moe", True), ("glm4_moe_lite", False)]


class _Counting:
    """A view of a folder that counts what is read."""

    def __init__(self, folder: HfFolder) -> None:
        self.rows, self.carried = folder.rows, folder.carried
        self.dtype, self.where, self._folder = folder.dtype, folder.where, folder
        self.reads: Counter[str] = Counter()

    def read(self, piece: HfPiece) -> torch.Tensor:
        self.reads[str(piece)] += 1
        return self._folder.read(piece)


@pytest.mark.parametrize(("family", "fused"), FORMS)
@pytest.mark.parametrize("shard_bytes", [None, 20_000, 1])
def test_the_safetensors_library_reads_what_was_written(
    tmp_path: Path, family: str, fused: bool, shard_bytes: int | None
) -> None:
    source = make_hf(tmp_path / "hf", family=family, fused=fused, mtp=family != "qwen3_moe", dtype=torch.bfloat16)
    with HfFolder(source) as folder, OutputFolder(tmp_path / "out", plan={}) as out:
        view = _Counting(folder)
        planned = file_sizes(plan_files(view, shard_bytes))
        result = write_hf(view, out, shard_bytes=shard_bytes)
        assert view.reads == Counter(str(piece) for piece in pieces_of(folder.rows + folder.carried))
        assert set(view.reads.values()) == {1}
    expected, written = read_tensors(source), read_tensors(tmp_path / "out")
    assert_same_bits(expected, written)
    size = sum(tensor.nbytes for tensor in expected.values())
    assert result == {"num_tensors": len(expected), "num_carried": len(folder.carried), "num_bytes": size}
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert {path.name: path.stat().st_size for path in files} == planned
    index_path = tmp_path / "out/model.safetensors.index.json"
    if shard_bytes is None:
        assert [path.name for path in files] == ["model.safetensors"] and not index_path.exists()
        return
    index = json.loads(index_path.read_text())
    assert index["metadata"]["total_size"] == size
    held = {}
    for path in files:
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt"}
            names = list(file.keys())
        held |= dict.fromkeys(names, path.name)
        sizes = [written[name].nbytes for name in names]
        assert sum(sizes) <= shard_bytes or len(sizes) == 1
    assert index["weight_map"] == held
    assert [path.name for path in files] == [
        f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, 1 + len(files))
    ]


def test_a_piece_that_is_listed_twice_is_a_fault_of_the_view(tmp_path: Path, static: Path) -> None:
    with pytest.raises(ZedaError, match="planned to be read twice"), HfFolder(static) as folder:
        view = _Counting(folder)
        view.rows = [*view.rows, WeightRow("again", view.rows[0].pieces)]
        with OutputFolder(tmp_path / "out", plan={}) as out:
            write_hf(view, out)
    assert nothing_beside(tmp_path / "out")


def test_a_file_that_lost_a_tensor_is_not_finished(tmp_path: Path, static: Path) -> None:
    """A stacked tensor of which the view lists one slot too few."""
    fused = make_hf(tmp_path / "hf", fused=True)
    with pytest.raises(ZedaError, match="never written"), HfFolder(fused) as folder:
        view = _Counting(folder)
        view.rows = [row for row in view.rows if row.pieces[0].slot != 1]
        with OutputFolder(tmp_path / "out", plan={}) as out:
            write_hf(view, out)
    assert nothing_beside(tmp_path / "out")
