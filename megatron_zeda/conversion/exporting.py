"""Megatron checkpoint -> Hugging Face checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megatron_zeda.conversion.folders import need_space, new_folder, write_json
from megatron_zeda.conversion.hf_folder import HfFolder, copy_side_files, pieces_of, write_config
from megatron_zeda.conversion.manifest import MANIFEST_FILE
from megatron_zeda.conversion.megatron_io import MegatronFolder
from megatron_zeda.conversion.progress import progress
from megatron_zeda.conversion.safetensors_io import DEFAULT_SHARD_BYTES, SafetensorsWriter, total_bytes
from megatron_zeda.conversion.verification import require_equal
from megatron_zeda.models import HfConfig


def megatron_to_hf(
    megatron: str | Path,
    hf: str | Path,
    *,
    iteration: int | None = None,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> dict[str, Any]:
    """Export one iteration, saved at any parallel layout, with or without optimizer state.

    Experts are written in the layout that was imported, one file or shards likewise. Dynamic exports carry their
    modelling code: ``AutoModelForCausalLM.from_pretrained(hf, trust_remote_code=True)`` loads them on stock
    transformers. The result is read back and compared before it becomes visible.

    Args:
        megatron: Megatron checkpoint folder, or one of its ``iter_*`` folders.
        hf: folder to create.
        iteration: which iteration; the newest by default.
        shard_bytes: largest weight file, if the source had several.

    Returns:
        A summary: iteration, number of tensors and bytes, zero experts.

    Raises:
        InputError: for an input that is not a complete Megatron checkpoint of a known family, or an output that exists.
        ZedaError: for pickles that are not only data, or a full disk.
    """
    source = MegatronFolder(megatron, iteration=iteration)
    plan: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    slots: dict[str, int] = {}
    for piece in pieces_of(source.rows):
        plan[piece.name] = (source.dtype(piece), piece.tensor_shape)
        if piece.slot is not None:
            slots[piece.name] = piece.num_slots
    zero = source.family.num_zero_experts(source.config)
    with new_folder(hf) as folder:
        sharded = source.manifest.get("sharded", True)
        with SafetensorsWriter(folder, plan, shard_bytes=shard_bytes if sharded else 2**62, slots=slots) as writer:
            need_space(folder, total_bytes(writer.tensors.values()))
            for piece in progress(pieces_of(source.rows), "export"):
                writer.write(piece.name, source.read(piece), piece.slot)
        write_config(folder, _config(source), source.family)
        copy_side_files(source.hf, folder)
        summary = {
            "iteration": source.iteration,
            "num_tensors": len(plan),
            "num_bytes": total_bytes(writer.tensors.values()),
            "num_experts": source.family.num_experts(source.config),
            "num_zero_experts": zero,
        }
        if source.manifest:
            write_json(folder / MANIFEST_FILE, {**source.manifest, "exported": summary})
        with HfFolder(folder) as written:
            require_equal(source, written, Path(hf))
    return summary


def _config(source: MegatronFolder) -> dict[str, Any]:
    """``config.json`` of the export: zero-expert keys written out, and the type the weights really have."""
    zero = source.family.num_zero_experts(source.config)
    config = HfConfig(source.config, where=source.config.where)
    if zero:
        config = source.family.make_dynamic(config, zero)
    dtype = str(source.dtype(source.rows[0].pieces[0])).removeprefix("torch.")
    for key in ("dtype", "torch_dtype"):
        if key in config:
            config[key] = dtype
    return config
