"""Hugging Face checkpoint -> Megatron checkpoint."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from megatron_zeda.conversion.folders import need_space, new_folder, write_json
from megatron_zeda.conversion.hf_folder import HfFolder, copy_side_files, pieces_of
from megatron_zeda.conversion.ledger import Ledger
from megatron_zeda.conversion.manifest import KEY_STYLE, MANIFEST_FILE, make_manifest
from megatron_zeda.conversion.megatron_io import HF_FOLDER, MegatronFolder, iteration_dir, write_latest_iteration
from megatron_zeda.conversion.safetensors_io import total_bytes
from megatron_zeda.conversion.torch_dist_writer import write_torch_dist
from megatron_zeda.conversion.verification import require_equal
from megatron_zeda.errors import InputError
from megatron_zeda.models import WeightRow


def hf_to_megatron(hf: str | Path, megatron: str | Path) -> dict[str, Any]:
    """Convert a static or dynamic Hugging Face checkpoint; loads at any parallel layout.

    Weights keep their bits and their types. No model is built, and one block of weights is in memory at a time. The
    result is read back and compared with the source before it becomes visible.

    Args:
        hf: Hugging Face folder.
        megatron: folder to create, see :mod:`megatron_zeda.conversion.megatron_io`.

    Returns:
        The manifest that was written.

    Raises:
        InputError: for an input that is not a complete checkpoint of a known family, or an output that exists.
        ZedaError: if the disk is full.
    """
    with HfFolder(hf) as source, new_folder(megatron) as folder:
        need_space(folder, total_bytes(source.reader.tensors.values()))
        iteration_dir(folder, 0).mkdir()
        (folder / HF_FOLDER).mkdir()
        ledger = Ledger(map(str, pieces_of(source.rows)), what="read", where=source.path)

        def load(row: WeightRow) -> torch.Tensor:
            for piece in row.pieces:
                ledger.tick(str(piece))
            return row.packing.pack([source.read(piece) for piece in row.pieces])

        state = {"iteration": 0, "checkpoint_version": 3.0}
        write_torch_dist(iteration_dir(folder, 0), source.rows, _dtypes(source), load, state)
        count = ledger.close()
        manifest = make_manifest(
            source,
            key_style=KEY_STYLE,
            expert_layout=source.layout,
            sharded=source.reader.sharded,
            num_tensors=count,
            num_bytes=total_bytes(source.reader.tensors.values()),
        )
        write_json(folder / MANIFEST_FILE, manifest)
        shutil.copyfile(source.path / "config.json", folder / HF_FOLDER / "config.json")
        copy_side_files(source.path, folder / HF_FOLDER)
        write_latest_iteration(folder, 0)
        require_equal(source, MegatronFolder(folder), Path(megatron))
    return manifest


def _dtypes(source: HfFolder) -> dict[str, torch.dtype]:
    """Megatron key -> type. A stacked tensor has one type, so all layers must agree."""
    dtypes: dict[str, torch.dtype] = {}
    for row in source.rows:
        for piece in row.pieces:
            dtype = source.dtype(piece)
            if dtypes.setdefault(row.key, dtype) != dtype:
                raise InputError(
                    f"{piece} has another type than its siblings in other layers",
                    where=source.path,
                    value=str(dtype),
                    rule=str(dtypes[row.key]),
                )
    return dtypes
