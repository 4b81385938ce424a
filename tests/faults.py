"""Faults for the conversion tests: what is done to which file of a checkpoint, and what the error must name.

A fault damages a copy of a good checkpoint and returns the words that the message of whoever finds it must contain:
the tensor, the file, or both. The stages say what is known of the checkpoint that is damaged.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

INDEX = "model.safetensors.index.json"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
Words = tuple[str, ...]
Hurt = Callable[[Path, str], Words]
"""Damages a folder at a tensor; returns what the error must name."""

EXPERT, OTHER_EXPERT = (f"model.layers.1.mlp.experts.{n}.up_proj.weight" for n in (2, 3))
GATE = "model.layers.1.mlp.gate.weight"
NORM = "model.layers.0.input_layernorm.weight"
HEAD = "lm_head.weight"
BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"
SQUARE = "model.layers.0.self_attn.o_proj.weight"
TARGETS: dict[str, Words] = {
    "qwen3_moe": (EXPERT, GATE, NORM, HEAD),
    "glm4_moe_lite": (
        EXPERT,
        BIAS,
        "model.layers.0.mlp.down_proj.weight",
        "model.layers.0.self_attn.kv_a_layernorm.weight",
        "model.layers.1.mlp.shared_experts.up_proj.weight",
        "model.layers.2.eh_proj.weight",  # beside the model: the layer that drafts tokens
    ),
}
"""One tensor of every kind."""


@dataclass(frozen=True)
class Fault:
    """One way to damage a checkpoint.

    Attributes:
        name: what is done.
        hurt: does it.
        tools: who must refuse the checkpoint.
        every_target: whether it is tried at every kind of tensor, or at an expert's only.
        families: where it can happen.
    """

    name: str
    hurt: Hurt
    tools: Words
    every_target: bool = False
    families: Words = ("qwen3_moe", "glm4_moe_lite")

    def targets(self, family: str) -> Words:
        return TARGETS[family] if self.every_target else (EXPERT,)


# ---- Hugging Face folders -------------------------------------------------------------------------------------------


def _index(folder: Path) -> dict[str, Any]:
    return json.loads((folder / INDEX).read_text())


def file_of(folder: Path, name: str) -> Path:
    """The shard that holds a tensor."""
    return folder / _index(folder)["weight_map"][name]


@contextmanager
def shard(folder: Path, name: str) -> Iterator[dict[str, torch.Tensor]]:
    """The tensors of the shard that holds ``name``, written back by the safetensors library afterwards."""
    path = file_of(folder, name)
    tensors = load_file(path)
    yield tensors
    save_file(tensors, path, metadata={"format": "pt"})


@contextmanager
def index(folder: Path) -> Iterator[dict[str, str]]:
    """The map from tensors to files, written back afterwards."""
    values = _index(folder)
    yield values["weight_map"]
    (folder / INDEX).write_text(json.dumps(values))


def _words(folder: Path, name: str) -> Words:
    return name, file_of(folder, name).name


def _drop(folder: Path, name: str) -> Words:
    with shard(folder, name) as tensors:
        del tensors[name]
    with index(folder) as weight_map:
        del weight_map[name]
    return name, str(folder)


def _drop_from_shard(folder: Path, name: str) -> Words:
    with shard(folder, name) as tensors:
        del tensors[name]
    return _words(folder, name)


def _drop_from_index(folder: Path, name: str) -> Words:
    words = _words(folder, name)
    with index(folder) as weight_map:
        del weight_map[name]
    return words


def _duplicate_in_another_shard(folder: Path, name: str) -> Words:
    other = next(path for path in sorted(folder.glob("*.safetensors")) if path != file_of(folder, name))
    tensors = load_file(other) | {name: load_file(file_of(folder, name))[name]}
    save_file(tensors, other, metadata={"format": "pt"})
    return name, other.name


def _duplicate_in_a_header(folder: Path, name: str) -> Words:
    path = file_of(folder, name)
    head, data = _header(path)
    twin = next(key for key in head if key not in (name, "__metadata__"))
    text = json.dumps(head).replace(json.dumps(twin) + ":", json.dumps(name) + ":", 1)
    _write_header(path, text, data)
    return name, path.name


def _duplicate_in_the_index(folder: Path, name: str) -> Words:
    entry = f'"{name}": "model.safetensors"'
    text = (folder / INDEX).read_text()
    (folder / INDEX).write_text(text.replace('"weight_map": {', f'"weight_map": {{{entry}, ', 1))
    return name, INDEX


def _reshape(change: Callable[[torch.Tensor], torch.Tensor], folder: Path, name: str) -> Words:
    with shard(folder, name) as tensors:
        tensors[name] = change(tensors[name]).contiguous()
    return _words(folder, name)


def _transpose(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.mT if tensor.dim() > 1 and tensor.shape[0] != tensor.shape[1] else tensor[None]


def _poison(value: float, folder: Path, name: str) -> Words:
    with shard(folder, name) as tensors:
        tensors[name].view(-1)[-1] = value
    return _words(folder, name)


def _truncate(keep: Callable[[int], int], folder: Path, name: str) -> Words:
    path = file_of(folder, name)
    data = path.read_bytes()
    path.write_bytes(data[: keep(len(data))])
    return (path.name,)


def _append(folder: Path, name: str) -> Words:
    with file_of(folder, name).open("ab") as file:
        file.write(b"\0")
    return (file_of(folder, name).name,)


def _remove(folder: Path, name: str) -> Words:
    words = (file_of(folder, name).name,)
    file_of(folder, name).unlink()
    return words


def _another_shard_s_bytes(folder: Path, name: str) -> Words:
    path = file_of(folder, name)
    other = next(other for other in sorted(folder.glob("*.safetensors")) if other != path)
    path.write_bytes(other.read_bytes())
    return (path.name,)


def _lie(target: str, folder: Path, name: str) -> Words:
    path = file_of(folder, name)
    other = next(other for other in sorted(folder.glob("*.safetensors")) if other != path)
    with index(folder) as weight_map:
        weight_map[name] = {"another": other.name}.get(target, target)
    return (name,) if target == "another" else (Path(target).name or INDEX,)


def _ghost(folder: Path, name: str) -> Words:
    with index(folder) as weight_map:
        weight_map[name + ".ghost"] = weight_map[name]
    return name + ".ghost", file_of(folder, name).name


def _extra(folder: Path, name: str) -> Words:
    with index(folder) as weight_map, shard(folder, name) as tensors:
        weight_map[name + ".extra"] = weight_map[name]
        tensors[name + ".extra"] = torch.ones(3)
    return name + ".extra", str(folder)


def _swap_in_the_index(folder: Path, name: str) -> Words:
    """Exchange the entries of an expert with those of a tensor in another file."""
    with index(folder) as weight_map:
        other = next(key for key, file in weight_map.items() if file != weight_map[name] and "experts" in key)
        weight_map[name], weight_map[other] = weight_map[other], weight_map[name]
    return ("is in the",)


def _header(path: Path) -> tuple[dict[str, Any], bytes]:
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def _write_header(path: Path, text: str, data: bytes) -> None:
    encoded = text.encode()
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data)


def _offsets(folder: Path, name: str) -> Words:
    """Two tensors that claim the same bytes."""
    path = file_of(folder, name)
    head, data = _header(path)
    other = next(key for key in head if key not in (name, "__metadata__"))
    head[name]["data_offsets"] = head[other]["data_offsets"]
    _write_header(path, json.dumps(head), data)
    return (path.name,)


def _dtype_in_the_header(folder: Path, name: str) -> Words:
    """The same number of bytes under another type: FP8 of twice the width."""
    path = file_of(folder, name)
    head, data = _header(path)
    head[name]["dtype"] = "F8_E4M3"
    _write_header(path, json.dumps(head), data)
    return name, path.name


def _config(change: dict[str, Any], words: Words, folder: Path, name: str) -> Words:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    return words


ALL = ("inject", "import", "verify")

PLAIN_FAULTS = [
    Fault("drop a tensor", _drop, ALL, every_target=True),
    Fault("drop it from the shard", _drop_from_shard, ALL, every_target=True),
    Fault("drop it from the index", _drop_from_index, ALL),
    Fault("duplicate it in another shard", _duplicate_in_another_shard, ALL, every_target=True),
    Fault("duplicate it in a header", _duplicate_in_a_header, ALL),
    Fault("duplicate it in the index", _duplicate_in_the_index, ALL),
    Fault("transpose it", partial(_reshape, _transpose), ALL, every_target=True),
    Fault("cut off a row", partial(_reshape, lambda tensor: tensor[1:]), ALL, every_target=True),
    Fault("cast it to integers", partial(_reshape, lambda tensor: tensor.to(torch.int32)), ALL, every_target=True),
    Fault("cast it to another float", partial(_reshape, lambda tensor: tensor.double()), ALL),
    Fault("another type in the header", _dtype_in_the_header, ALL),
    Fault("a NaN", partial(_poison, float("nan")), ("inject", "import"), every_target=True),
    Fault("an infinity", partial(_poison, float("inf")), ("inject", "import"), every_target=True),
    Fault("a negative infinity", partial(_poison, float("-inf")), ("inject", "import")),
    Fault("cut off a shard's last byte", partial(_truncate, lambda size: size - 1), ALL),
    Fault("cut off half of a shard", partial(_truncate, lambda size: size // 2), ALL),
    Fault("cut a shard inside its header", partial(_truncate, lambda size: 40), ALL),
    Fault("empty a shard", partial(_truncate, lambda size: 0), ALL),
    Fault("append to a shard", _append, ALL),
    Fault("remove a shard", _remove, ALL),
    Fault("another shard's bytes", _another_shard_s_bytes, ALL),
    Fault("index: another shard", partial(_lie, "another"), ALL, every_target=True),
    Fault("index: a shard that is not there", partial(_lie, "nowhere.safetensors"), ALL),
    Fault("index: a file outside", partial(_lie, "../x.safetensors"), ALL),
    Fault("index: a tensor that is not there", _ghost, ALL),
    Fault("a tensor that no model has", _extra, ALL),
    Fault("index: two experts exchanged", _swap_in_the_index, ALL),
    Fault("two tensors at the same bytes", _offsets, ALL),
    Fault("config: another vocabulary", partial(_config, {"vocab_size": 60}, ("weight has the wrong shape",)), ALL),
    Fault("config: another width", partial(_config, {"moe_intermediate_size": 8}, ("experts",)), ALL),
    Fault("config: zero experts", partial(_config, {"zce_nums": [2]}, ("zce_types",)), ALL),
]
"""In a folder of which nothing is known but itself. All values of the right shape are right, for all one knows."""


# Faults that only a record of the right bytes, or a comparison, can tell.


def _flip(folder: Path, name: str) -> Words:
    with shard(folder, name) as tensors:
        tensors[name] = tensors[name].clone()
        tensors[name].view(torch.uint8).view(-1)[-1] ^= 1
    return _words(folder, name)


def _swap_experts(folder: Path, name: str) -> Words:
    other = OTHER_EXPERT
    values = load_file(file_of(folder, name))[name], load_file(file_of(folder, other))[other]
    with shard(folder, name) as tensors:
        tensors[name] = values[1]
    with shard(folder, other) as tensors:
        tensors[other] = values[0]
    return _words(folder, name)


def _swap_names(folder: Path, name: str) -> Words:
    """Two tensors of one file exchange their names in its header."""
    path = file_of(folder, name)
    head, data = _header(path)
    shape = head[name]["shape"]
    other = next(key for key, entry in head.items() if key != name and entry.get("shape") == shape)
    head[name], head[other] = head[other], head[name]
    _write_header(path, json.dumps(head), data)
    return name, path.name


def _transpose_square(folder: Path, name: str) -> Words:
    with shard(folder, SQUARE) as tensors:
        assert tensors[SQUARE].shape[0] == tensors[SQUARE].shape[1]
        tensors[SQUARE] = tensors[SQUARE].mT.contiguous()
    return _words(folder, SQUARE)


def _cast_and_back(folder: Path, name: str) -> Words:
    with shard(folder, name) as tensors:
        tensors[name] = tensors[name].to(torch.float8_e4m3fn).to(tensors[name].dtype)
    return _words(folder, name)


def _zero(folder: Path, name: str) -> Words:
    with shard(folder, name) as tensors:
        tensors[name].zero_()
    return _words(folder, name)


def value_faults(tools: Words, *, square: bool = True) -> list[Fault]:
    """Other values of the right shape and type."""
    faults = [
        Fault("flip one bit", _flip, tools, every_target=True),
        Fault("swap two experts", _swap_experts, tools),
        Fault("swap two names in a header", _swap_names, tools, families=("qwen3_moe",)),
        Fault("cast it down and back", _cast_and_back, tools),
        Fault("zeros", _zero, tools),
    ]
    transposed = Fault("transpose a square matrix", _transpose_square, tools, families=("qwen3_moe",))
    return [*faults, transposed] if square else faults


KNOWN_FAULTS = [*value_faults(("inject", "import")), *[fault for fault in PLAIN_FAULTS if "shard's" in fault.name]]
"""In a folder whose files have known hashes: a download, a snapshot in the hub's cache, or our own output."""

COMPARED_FAULTS = value_faults(("verify",))
"""Found by comparing with a good checkpoint."""


def note_downloads(folder: Path) -> None:
    """What ``hf download --local-dir`` leaves beside the files: commit, ETag and time of each."""
    notes = folder / ".cache/huggingface/download"
    notes.mkdir(parents=True)
    for path in sorted(folder.glob("*.*")):
        if path.is_file():
            data = path.read_bytes()
            git = hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()
            etag = hashlib.sha256(data).hexdigest() if path.suffix == ".safetensors" else git
            (notes / f"{path.name}.metadata").write_text(f"{COMMIT}\n{etag}\n1750000000.0\n")


# ---- Megatron folders -----------------------------------------------------------------------------------------------

FC1 = "decoder.layers.mlp.experts.experts.linear_fc1.weight"


def checkpoint_of(folder: Path) -> Path:
    """The folder with the weights in it."""
    text = (folder / "latest_checkpointed_iteration.txt").read_text().strip()
    return folder / (text if text == "release" else f"iter_{int(text):07d}")


def metadata_of(folder: Path) -> Any:
    """``.metadata`` as PyTorch reads it."""
    return pickle.loads((checkpoint_of(folder) / ".metadata").read_bytes())


@contextmanager
def metadata(folder: Path) -> Iterator[Any]:
    """``.metadata``, written back afterwards."""
    values = metadata_of(folder)
    yield values
    (checkpoint_of(folder) / ".metadata").write_bytes(pickle.dumps(values))


def _stored(folder: Path, position: int = 0) -> tuple[Any, Path, int, int]:
    """Index, file, offset and length of a block of an expert's first matrix, whatever its key is in this family."""
    storage = metadata_of(folder).storage_data
    found = [index for index in storage if "experts.linear_fc1.weight" in index.fqn]
    index = sorted(found, key=lambda index: (index.fqn, tuple(index.offset)))[position]
    info = storage[index]
    return index, checkpoint_of(folder) / info.relative_path, info.offset, info.length


def _patch(path: Path, offset: int, change: Callable[[bytes], bytes], length: int = 1) -> None:
    data = bytearray(path.read_bytes())
    data[offset : offset + length] = change(bytes(data[offset : offset + length]))
    path.write_bytes(data)


def _flip_stored(where: float, folder: Path, name: str) -> Words:
    index, path, offset, length = _stored(folder)
    _patch(path, offset + int(where * (length - 1)), lambda byte: bytes([byte[0] ^ 0x40]))
    return (path.name,) if where in (0.0, 1.0) else (index.fqn, path.name)


def _flip_weight(folder: Path, name: str) -> Words:
    """One bit of one value, in the middle of the record that holds the values."""
    index, path, offset, length = _stored(folder)
    with path.open("rb") as file:
        file.seek(offset)
        archive = file.read(length)
    local = Path(path.parent / ".one")
    local.write_bytes(archive)
    with zipfile.ZipFile(local) as opened:
        record = next(entry for entry in opened.infolist() if "/data/" in entry.filename)
    local.unlink()
    begin = record.header_offset + 30 + len(record.filename)
    begin += int.from_bytes(archive[record.header_offset + 28 : record.header_offset + 30], "little")
    _patch(path, offset + begin + record.file_size // 2, lambda byte: bytes([byte[0] ^ 1]))
    return index.fqn, path.name


def _swap_stored_experts(folder: Path, name: str) -> Words:
    """The bytes of two experts change places: both archives are whole, and only a hash tells."""
    (_, path, first, length), (_, other, second, size) = _stored(folder, 0), _stored(folder, 1)
    assert (path, length) == (other, size)
    data = bytearray(path.read_bytes())
    data[first : first + length], data[second : second + size] = (
        data[second : second + size],
        data[first : first + length],
    )
    path.write_bytes(data)
    return (path.name,)


def _swap_in_metadata(folder: Path, name: str) -> Words:
    one, two = _stored(folder, 0)[0], _stored(folder, 1)[0]
    with metadata(folder) as values:
        storage = values.storage_data
        storage[one], storage[two] = storage[two], storage[one]
    return (".metadata",)


def _exchange_files(folder: Path, name: str) -> Words:
    files = sorted(checkpoint_of(folder).glob("*.distcp"), key=lambda path: path.stat().st_size)[-2:]
    contents = [path.read_bytes() for path in files]
    files[0].write_bytes(contents[1])
    files[1].write_bytes(contents[0])
    return (".distcp",)


def _truncate_stored(keep: Callable[[int], int], folder: Path, name: str) -> Words:
    _, path, _, _ = _stored(folder)
    path.write_bytes(path.read_bytes()[: keep(path.stat().st_size)])
    return (path.name,)


def _remove_stored(folder: Path, name: str) -> Words:
    _, path, _, _ = _stored(folder)
    path.unlink()
    return (path.name,)


def _append_stored(folder: Path, name: str) -> Words:
    _, path, _, _ = _stored(folder)
    with path.open("ab") as file:
        file.write(b"\0")
    return (path.name,)


def _metadata_fault(change: Callable[[Any, Any], None], folder: Path, name: str) -> Words:
    index, _, _, _ = _stored(folder)
    with metadata(folder) as values:
        change(values, index)
    return (index.fqn,)


def _drop_chunk(values: Any, index: Any) -> None:
    chunks = values.state_dict_metadata[index.fqn].chunks
    chunks.remove(next(chunk for chunk in chunks if chunk.offsets == index.offset))


def _drop_key(values: Any, index: Any) -> None:
    del values.state_dict_metadata[index.fqn]


def _drop_storage(values: Any, index: Any) -> None:
    del values.storage_data[index]


def _repeat_chunk(values: Any, index: Any) -> None:
    """One block twice, another not at all: the number of values is right."""
    chunks = values.state_dict_metadata[index.fqn].chunks
    position = next(n for n, chunk in enumerate(chunks) if chunk.offsets == index.offset)
    chunks[position] = chunks[position - 1]


def _cast_in_metadata(values: Any, index: Any) -> None:
    entry = values.state_dict_metadata[index.fqn]
    entry.properties.dtype = torch.float64


def _reshape_in_metadata(values: Any, index: Any) -> None:
    entry = values.state_dict_metadata[index.fqn]
    entry.size = torch.Size([*entry.size[:-1], entry.size[-1] + 1])


def _transpose_in_metadata(values: Any, index: Any) -> None:
    entry = values.state_dict_metadata[index.fqn]
    entry.size = torch.Size([*entry.size[:-2], entry.size[-1], entry.size[-2] * 2])


def _move_in_file(values: Any, index: Any) -> None:
    info = values.storage_data[index]
    values.storage_data[index] = type(info)(info.relative_path, info.offset + 1, info.length - 1)


def _tracker(text: str, folder: Path, name: str) -> Words:
    (folder / "latest_checkpointed_iteration.txt").write_text(text)
    return ("latest_checkpointed_iteration.txt",)


def _carried(change: Callable[[bytes], bytes], folder: Path, name: str) -> Words:
    path = folder / "hf/carried.safetensors"
    path.write_bytes(change(path.read_bytes()))
    return (path.name,)


def _carried_tensors(change: Callable[[dict[str, torch.Tensor], str], None], folder: Path, name: str) -> Words:
    path, tensor = folder / "hf/carried.safetensors", "model.layers.2.eh_proj.weight"
    tensors = load_file(path)
    change(tensors, tensor)
    save_file(tensors, path)
    return (tensor,)


def _no_metadata(folder: Path, name: str) -> Words:
    (checkpoint_of(folder) / ".metadata").unlink()
    return (".metadata",)


def _cut_metadata(folder: Path, name: str) -> Words:
    path = checkpoint_of(folder) / ".metadata"
    path.write_bytes(path.read_bytes()[:-20])
    return (".metadata",)


def _megatron_config(folder: Path, name: str) -> Words:
    return _config({"moe_intermediate_size": 8}, ("experts",), folder / "hf", name)


BOTH, GLM = ("export", "verify"), ("glm4_moe_lite",)

MEGATRON_FAULTS = [
    Fault("flip a bit of a weight", _flip_weight, BOTH),
    Fault("flip a bit of an archive's first byte", partial(_flip_stored, 0.0), BOTH),
    Fault("flip a bit in the middle of an archive", partial(_flip_stored, 0.5), BOTH),
    Fault("flip a bit of an archive's directory", partial(_flip_stored, 0.93), BOTH),
    Fault("swap two experts' bytes", _swap_stored_experts, BOTH),
    Fault("swap two experts in .metadata", _swap_in_metadata, BOTH),
    Fault("exchange two files", _exchange_files, BOTH),
    Fault("cut off a file's last byte", partial(_truncate_stored, lambda size: size - 1), BOTH),
    Fault("cut off half of a file", partial(_truncate_stored, lambda size: size // 2), BOTH),
    Fault("empty a file", partial(_truncate_stored, lambda size: 0), BOTH),
    Fault("remove a file", _remove_stored, BOTH),
    Fault("append to a file", _append_stored, ("export",)),
    Fault("drop a block", partial(_metadata_fault, _drop_chunk), BOTH),
    Fault("drop a tensor", partial(_metadata_fault, _drop_key), BOTH),
    Fault("drop where a block is", partial(_metadata_fault, _drop_storage), BOTH),
    Fault("one block twice, another not", partial(_metadata_fault, _repeat_chunk), BOTH),
    Fault("another type in .metadata", partial(_metadata_fault, _cast_in_metadata), BOTH),
    Fault("another shape in .metadata", partial(_metadata_fault, _reshape_in_metadata), BOTH),
    Fault("a transposed shape in .metadata", partial(_metadata_fault, _transpose_in_metadata), BOTH),
    Fault("a block that begins a byte later", partial(_metadata_fault, _move_in_file), BOTH),
    Fault("remove .metadata", _no_metadata, BOTH),
    Fault("cut .metadata", _cut_metadata, BOTH),
    Fault("tracker: another iteration", partial(_tracker, "7"), BOTH),
    Fault("tracker: not a number", partial(_tracker, "latest"), BOTH),
    Fault("config: another width", _megatron_config, BOTH),
    Fault("cut the carried tensors", partial(_carried, lambda data: data[:-1]), BOTH, families=GLM),
    Fault("flip a bit of a carried tensor", partial(_carried, lambda data: data[:-1] + b"\x7e"), BOTH, families=GLM),
    Fault("drop a carried tensor", partial(_carried_tensors, lambda t, name: t.pop(name)), BOTH, families=GLM),
    Fault(
        "transpose a carried tensor",
        partial(_carried_tensors, lambda t, name: t.update({name: t[name].mT.contiguous()})),
        BOTH,
        families=GLM,
    ),
    Fault(
        "a NaN in a carried tensor",
        partial(_carried_tensors, lambda t, name: t[name].view(-1)[0].fill_(float("nan"))),
        ("export",),
        families=GLM,
    ),
]
"""In a Megatron checkpoint that was imported, with our manifest beside it."""


# ---- while a conversion runs ----------------------------------------------------------------------------------------


def _change_bytes(change: Callable[[bytearray], None], path: Path) -> None:
    data = bytearray(path.read_bytes())
    change(data)
    path.write_bytes(data)


def _flip_one(data: bytearray) -> None:
    """One bit of a weight: where bytes differ from each other, unlike in padding."""
    place = next(n for n in range(len(data) * 2 // 3, len(data)) if len(set(data[n - 32 : n + 32])) > 45)
    data[place] ^= 1


def _lose_a_page(data: bytearray) -> None:
    middle = len(data) // 2
    data[middle : middle + 4096] = bytes(4096)


def _move_a_page(data: bytearray) -> None:
    middle = len(data) // 2
    data[middle : middle + 4096] = data[middle - 4096 : middle]


def _lose_the_end(data: bytearray) -> None:
    del data[-100:]


def _lose_all(data: bytearray) -> None:
    data[:] = bytes(len(data))


def _grow(data: bytearray) -> None:
    data.extend(b"x")


DISK_FAULTS: dict[str, Callable[[Path], None]] = {
    "flips a bit": partial(_change_bytes, _flip_one),
    "loses a page": partial(_change_bytes, _lose_a_page),
    "writes a page in another place": partial(_change_bytes, _move_a_page),
    "loses the end": partial(_change_bytes, _lose_the_end),
    "writes zeros": partial(_change_bytes, _lose_all),
}
"""What happens to a file between being written and being read back."""


def _is_expert(row: Any) -> bool:
    return "experts.experts" in row.key


def _forget_a_row(rows: list[Any]) -> None:
    rows.remove(next(row for row in reversed(rows) if _is_expert(row)))


def _repeat_a_row(rows: list[Any]) -> None:
    rows.append(next(row for row in reversed(rows) if _is_expert(row)))


def _repeat_instead(rows: list[Any]) -> None:
    """One expert twice, another not at all."""
    experts = [number for number, row in enumerate(rows) if _is_expert(row)]
    rows[experts[-1]] = rows[experts[-3]]


TABLE_FAULTS: dict[str, Callable[[list[Any]], None]] = {
    "forgets a row": _forget_a_row,
    "repeats a row": _repeat_a_row,
    "repeats one instead of another": _repeat_instead,
}
"""What a faulty program would do with the weight table."""


# ---- between two runs -----------------------------------------------------------------------------------------------


def _cut_journal(journal: Path) -> None:
    journal.write_bytes(journal.read_bytes()[:-7])


LEFT_OVER_FAULTS: dict[str, Callable[[Path, Path, Path], None]] = {
    "nothing": lambda partial, file, journal: None,
    "a bit of a finished file": lambda partial, file, journal: _change_bytes(_flip_one, file),
    "the end of a finished file": lambda partial, file, journal: _change_bytes(_lose_the_end, file),
    "more in a finished file": lambda partial, file, journal: _change_bytes(_grow, file),
    "a finished file": lambda partial, file, journal: file.unlink(),
    "a line of the journal": lambda partial, file, journal: _cut_journal(journal),
    "the journal's plan": lambda partial, file, journal: journal.write_text("{}\n"),
    "the journal's text": lambda partial, file, journal: journal.write_bytes(b"\xff" * 100),
    "the journal": lambda partial, file, journal: journal.unlink(),
    "the files, not the journal": lambda partial, file, journal: shutil.rmtree(partial),
    "a file too many": lambda partial, file, journal: (partial / "model-00099.safetensors").write_text("x") and None,
}
"""What happens to what an interrupted run left: its folder, one of its finished files, its journal."""
