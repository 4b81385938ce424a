"""The torch_dist writer and reader: the same bytes every time, every flipped bit found, no hole and no overlap."""

from __future__ import annotations

import io
import itertools
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

from megatron_zeda.conversion.disk_file import DiskFile
from megatron_zeda.conversion.torch_archive import open_archive
from megatron_zeda.conversion.torch_dist import TorchDistReader
from megatron_zeda.conversion.torch_dist_writer import TorchDistWriter, write_torch_dist
from megatron_zeda.errors import InputError, ZedaError
from megatron_zeda.models import HfPiece, WeightRow

LAYERS, EXPERTS = 3, 4
DTYPES = {"embedding": torch.bfloat16, "norm": torch.float32, "experts": torch.float32}
ROWS = [WeightRow("embedding", (HfPiece("e", (10, 6)),))]
for layer in range(LAYERS):
    ROWS.append(WeightRow("norm", (HfPiece(f"n{layer}", (6,)),), (layer,), (LAYERS,)))
    for expert in range(EXPERTS):
        piece = HfPiece(f"x{layer}.{expert}", (5, 6))
        ROWS.append(WeightRow("experts", (piece,), (layer, expert), (LAYERS, EXPERTS)))


def _value(row: WeightRow) -> torch.Tensor:
    generator = torch.Generator().manual_seed(ROWS.index(row))
    return torch.randn(row.shape, generator=generator).to(DTYPES[row.key])


def _write(folder: Path, **options: Any) -> Path:
    write_torch_dist(folder, ROWS, DTYPES, _value, {"iteration": 7}, **options)
    return folder


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def _edit_metadata(folder: Path, edit: Callable[[Any], None]) -> None:
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    edit(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def _equal(folder: Path) -> bool:
    reader = TorchDistReader(folder)
    return all(reader.read(row).equal(_value(row)) for row in ROWS)


def test_the_bytes_depend_on_the_weights_only(tmp_path: Path) -> None:
    """Another folder and another process, with other hashes of strings: the same files, ``.metadata`` included."""
    one = _write(tmp_path / "one", file_bytes=400)
    assert len(list(one.glob("*.distcp"))) > 4
    script = f"import sys; sys.path[:0] = {sys.path!r}\nfrom pathlib import Path\nimport {__name__} as test\n"
    script += f"test._write(Path({str(tmp_path / 'two')!r}), file_bytes=400)"
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment)
    assert _files(one) == _files(tmp_path / "two")
    assert str(tmp_path).encode() not in (one / ".metadata").read_bytes()


def test_an_interrupted_writer_is_continued_to_the_same_bytes(tmp_path: Path) -> None:
    whole = _write(tmp_path / "whole", file_bytes=400)
    first = TorchDistWriter(tmp_path / "cut", ROWS, DTYPES, {"iteration": 7}, file_bytes=400)
    spans = {file.name: first.write(file, _value) for file in first.files[:3]}
    with pytest.raises(ZedaError, match="never written"):
        first.finish(spans)
    (tmp_path / "cut" / first.files[3].name).write_bytes(b"half a file")
    second = TorchDistWriter(tmp_path / "cut", ROWS, DTYPES, {"iteration": 7}, file_bytes=400)
    for file in reversed(second.files):
        if file.name in spans:
            second.skip(file)
        else:
            spans[file.name] = second.write(file, _value)
    second.finish(spans)
    assert _files(tmp_path / "cut") == _files(whole)
    with pytest.raises(ZedaError, match="twice"):
        second.write(second.files[0], _value)


def test_stock_pytorch_reads_every_tensor(tmp_path: Path) -> None:
    """The independent oracle: ``torch.distributed.checkpoint`` itself."""
    from torch.distributed.checkpoint import FileSystemReader, load

    folder = _write(tmp_path / "a", file_bytes=400)
    shapes = {row.key: row.global_shape for row in ROWS}
    state = {key: torch.full(shape, torch.nan, dtype=DTYPES[key]) for key, shape in shapes.items()}
    load(state, storage_reader=FileSystemReader(folder), no_dist=True)
    for row in ROWS:
        assert state[row.key][row.index].equal(_value(row))


def test_every_flipped_bit_is_found_or_harmless(tmp_path: Path) -> None:
    """``torch.load`` gives back other weights for most of these; the checksums are there, it does not look at them."""
    folder = _write(tmp_path / "a")
    path = folder / "__1_0.distcp"
    data = path.read_bytes()
    assert _equal(folder)
    caught = missed_by_torch = 0
    for position in range(0, len(data), 37):
        flipped = bytearray(data)
        flipped[position] ^= 1 << position % 8
        path.write_bytes(flipped)
        try:
            assert _equal(folder), position  # a byte that nothing depends on, such as padding
        except (InputError, ZedaError) as error:
            assert "__1_0.distcp" in str(error) or "its pickle refers to" in str(error)
            caught += 1
            missed_by_torch += _torch_takes(bytes(flipped))
    assert caught > 100
    assert missed_by_torch > 10


def _torch_takes(data: bytes) -> bool:
    """Whether stock PyTorch reads all archives of the file without a word."""
    starts = [place for place in range(len(data)) if data.startswith(b"PK\x03\x04", place)]
    archives = [place for place in starts if b"data.pkl" in data[place : place + 64]]
    try:
        for begin, end in itertools.pairwise([*archives, len(data)]):
            torch.load(io.BytesIO(data[begin:end]), weights_only=True)
    except Exception:
        return False
    return True


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_archives_of_every_form(dtype: torch.dtype) -> None:
    grid = torch.arange(24).to(dtype).reshape(4, 6)
    for tensor in (
        grid,
        grid.T.clone(memory_format=torch.preserve_format),
        grid[:0],
        grid[1, 2],
        grid[None, None],
        grid[1:, ::2],
    ):
        stream = io.BytesIO()
        torch.save(tensor, stream)
        data = bytearray(stream.getvalue())
        found = open_archive(data, "x")
        assert found.view(data).equal(tensor)
        assert found.view(data).dtype == dtype
        assert found.contiguous == tensor.is_contiguous()


@pytest.mark.parametrize("content", [{"weight": torch.ones(2)}, [1, 2], torch.nn.Parameter(torch.ones(2)), "text"])
def test_archives_of_other_things_are_refused(content: Any) -> None:
    stream = io.BytesIO()
    torch.save(content, stream)
    with pytest.raises(ZedaError, match=r"not a plain tensor|not on the list"):
        open_archive(bytearray(stream.getvalue()), "x")


def _chunked(folder: Path, whole: torch.Tensor, boxes: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> None:
    """Any boxes of one tensor, as a job with another layout would have saved them; holes and overlaps included."""
    rows = [WeightRow(f"x{number}", (HfPiece("x", sizes),)) for number, (_, sizes) in enumerate(boxes)]
    blocks = {
        row.key: whole[tuple(slice(o, o + n) for o, n in zip(offset, sizes, strict=True))]
        for row, (offset, sizes) in zip(rows, boxes, strict=True)
    }
    write_torch_dist(folder, rows, {row.key: whole.dtype for row in rows}, lambda row: blocks[row.key], {})

    def move(metadata: Any) -> None:
        entries = [metadata.state_dict_metadata.pop(row.key) for row in rows]
        entries[0].size = whole.shape
        entries[0].chunks = [ChunkStorageMetadata(torch.Size(offset), torch.Size(sizes)) for offset, sizes in boxes]
        metadata.state_dict_metadata["x"] = entries[0]
        for row, (offset, _) in zip(rows, boxes, strict=True):
            old = MetadataIndex(row.key, torch.Size(row.global_offset))
            metadata.storage_data[MetadataIndex("x", torch.Size(offset))] = metadata.storage_data.pop(old)

    _edit_metadata(folder, move)


GRIDS = {
    "one piece": [((0, 0, 0), (3, 4, 6))],
    "a piece a layer": [((layer, 0, 0), (1, 4, 6)) for layer in range(3)],
    "rows split": [((0, row, 0), (3, 2, 6)) for row in (0, 2)],
    "columns split": [((0, 0, column), (3, 4, 2)) for column in (0, 2, 4)],
    "unequal": [((0, 0, 0), (1, 4, 6)), ((1, 0, 0), (2, 1, 6)), ((1, 1, 0), (2, 3, 5)), ((1, 1, 5), (2, 3, 1))],
}


@pytest.mark.parametrize("boxes", GRIDS.values(), ids=GRIDS)
def test_any_layout_gives_the_same_blocks(tmp_path: Path, boxes: list[Any]) -> None:
    whole = torch.randn(3, 4, 6)
    _chunked(tmp_path, whole, boxes)
    reader = TorchDistReader(tmp_path)
    reader.require_complete("x")
    for order in (range(3), (2, 0, 1)):  # the second time from what is known of the archives
        assert all(reader.read_block("x", (layer,), (4, 6)).equal(whole[layer]) for layer in order)
    assert reader.read_block("x", (), (3, 4, 6)).equal(whole)
    assert reader.read_block("x", (), (2, 4, 6)).equal(whole[:2])  # a padded axis is cut


def test_a_hole_hidden_by_an_overlap_is_found(tmp_path: Path) -> None:
    """As many values as the tensor has, one row twice and one row never."""
    _chunked(tmp_path, torch.randn(1, 4, 6), [((0, 0, 0), (1, 3, 6)), ((0, 2, 0), (1, 1, 6))])
    reader = TorchDistReader(tmp_path)
    reader.require_complete("x")
    with pytest.raises(InputError, match="stored twice"):
        reader.read_block("x", (0,), (4, 6))


def test_a_missing_piece_is_found(tmp_path: Path) -> None:
    folder = _write(tmp_path / "a")

    def forget(metadata: Any) -> None:
        del metadata.state_dict_metadata["experts"].chunks[5]

    _edit_metadata(folder, forget)
    reader = TorchDistReader(folder)
    with pytest.raises(InputError, match=r"experts is not complete .*330 of 360"):
        reader.require_complete("experts")
    with pytest.raises(InputError, match=r"experts\[1, 1\] is not complete"):
        reader.read_block("experts", (1, 1), (5, 6))


def test_metadata_that_does_not_agree_with_the_files_is_found(tmp_path: Path) -> None:
    index = MetadataIndex("norm", torch.Size((1, 0)))
    good = _write(tmp_path / "good")

    def lost(metadata: Any) -> None:
        del metadata.storage_data[index]

    def swapped(metadata: Any) -> None:
        metadata.storage_data[index] = metadata.storage_data[MetadataIndex("embedding", torch.Size((0, 0)))]

    def cast(metadata: Any) -> None:
        old = metadata.state_dict_metadata["norm"]
        old.properties = metadata.state_dict_metadata["embedding"].properties

    for edit, message in (
        (lost, "not in any file"),
        (swapped, "not what the metadata"),
        (cast, "not what the metadata"),
    ):
        folder = shutil.copytree(good, tmp_path / edit.__name__)
        _edit_metadata(folder, edit)
        with pytest.raises(InputError, match=message):
            TorchDistReader(folder).read_block("norm", (1,), (6,))


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4097, 3 << 20, (9 << 20) + 5])
@pytest.mark.parametrize("direct", [True, False])
def test_a_file_is_read_back_from_the_disk(
    tmp_path: Path, size: int, direct: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not direct:  # as on a file system that does not know it
        real = os.open

        def refuse(path: Any, flags: int, *rest: Any) -> int:
            if flags & os.O_DIRECT:
                raise OSError(22, "Invalid argument")
            return real(path, flags, *rest)

        monkeypatch.setattr(os, "open", refuse)
    data = os.urandom(size)
    (tmp_path / "a").write_bytes(data)
    with DiskFile(tmp_path / "a") as file:
        assert file.size == size
        for begin, length in (
            (0, size),
            (size // 3, size // 2),
            (max(size - 1, 0), min(size, 1)),
            (min(size, 1), max(size - 2, 0)),
        ):
            assert bytes(file.read(begin, length)) == data[begin : begin + length]
        with pytest.raises(InputError, match="ended early"):
            file.read(size, 1)
