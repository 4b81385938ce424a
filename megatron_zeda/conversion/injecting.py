"""Static Hugging Face checkpoint -> dynamic one: every router grows by Z rows, nothing else changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megatron_zeda.conversion.folders import need_space, new_folder, write_json
from megatron_zeda.conversion.hf_folder import HfFolder, copy_side_files, pieces_of, write_config
from megatron_zeda.conversion.manifest import MANIFEST_FILE, make_manifest
from megatron_zeda.conversion.progress import progress
from megatron_zeda.conversion.safetensors_io import DEFAULT_SHARD_BYTES, SafetensorsWriter, total_bytes
from megatron_zeda.conversion.verification import require_equal
from megatron_zeda.errors import InputError
from megatron_zeda.models import HfPiece, load_hf_config
from megatron_zeda.models.registry import family_for


def inject_zero_experts(
    input: str | Path,
    output: str | Path,
    *,
    num_zero_experts: int | None = None,
    seed: int = 0,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> dict[str, Any]:
    """Write a dynamic copy of a static checkpoint, complete with configuration, modelling code and tokenizer.

    The result is read back and compared with the source before it becomes visible.

    Args:
        input: static Hugging Face folder.
        output: folder to create.
        num_zero_experts: Z; by default half the number of experts.
        seed: seed of the new router rows.
        shard_bytes: largest weight file to write.

    Returns:
        The manifest that was written.

    Raises:
        InputError: for an input that is not a good static checkpoint, or an output that exists.
        ZedaError: if the disk is full.
    """
    config = load_hf_config(input)
    if family_for(config).is_dynamic(config):
        raise InputError(
            "zero experts were injected already", where=input, fix="start from the static checkpoint it was made from"
        )
    with HfFolder(input) as source, new_folder(output) as folder:
        family, real = source.family, source.family.num_experts(config)
        zero = real // 2 if num_zero_experts is None else num_zero_experts
        if type(zero) is not int or zero < 1:
            raise InputError(
                "the number of zero experts is wrong", where="--num-zero-experts", value=zero, rule="positive"
            )
        dynamic = family.make_dynamic(config, zero)
        family.validate(dynamic)
        injected = _Injected(source, dynamic, seed)
        plan = {}
        for name, info in sorted(source.reader.tensors.items()):
            rows = (info.shape[0] + zero, *info.shape[1:]) if name in injected.grown else info.shape
            plan[name] = (info.dtype, rows)
        shard_bytes = shard_bytes if source.reader.sharded else 2**62
        with SafetensorsWriter(folder, plan, shard_bytes=shard_bytes) as writer:
            need_space(folder, total_bytes(writer.tensors.values()))
            for name in progress(plan, "inject"):
                writer.write(name, injected.tensor(name))
        write_config(folder, dynamic, family)
        copy_side_files(source.path, folder)
        manifest = make_manifest(source, num_zero_experts=zero, injection_seed=seed, expert_layout=source.layout)
        write_json(folder / MANIFEST_FILE, manifest)
        with HfFolder(folder) as written:
            require_equal(injected, written, Path(output))
    return manifest


class _Injected:
    """What the result must hold, computed from the source whenever it is asked for.

    Attributes:
        rows: the weight table of the dynamic model.
        grown: tensors that grow -> what draws their new rows.
    """

    def __init__(self, source: HfFolder, dynamic: dict[str, Any], seed: int) -> None:
        self.rows = source.family.weight_table(dynamic, source.layout)
        names = {piece.name for piece in pieces_of(source.carried)}
        carried = source.family.carried_rows(dynamic, source.layout)
        self.carried = [row for row in carried if row.pieces[0].name in names]
        rows = source.rows + source.carried
        self.grown = {piece.name: row.grow for row in rows for piece in row.pieces if row.grow is not None}
        self._source, self._seed = source, seed
        self._zero = source.family.num_zero_experts(dynamic)

    def tensor(self, name: str, slot: int | None = None) -> torch.Tensor:
        """A tensor of the result, or one slot of a stacked one."""
        tensor = self._source.reader.read(name, slot)
        grow = self.grown.get(name)
        if grow is None:
            return tensor
        try:
            return torch.cat([tensor, grow(tensor, self._zero, seed=self._seed, name=name)])
        except ValueError as error:
            raise InputError(str(error), where=self._source.reader.tensors[name].file) from error

    def read(self, piece: HfPiece) -> torch.Tensor:
        """One piece of the table."""
        return self.tensor(piece.name, piece.slot)

    def dtype(self, piece: HfPiece) -> torch.dtype:
        """Its type."""
        return self._source.dtype(piece)
