"""Megatron checkpoint -> Hugging Face checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_zeda.conversion.background import SourceHashes
from megatron_zeda.conversion.folders import OutputFolder, files_in
from megatron_zeda.conversion.hf_folder import CARRIED_FILE, HfFolder, copy_side_files, write_config
from megatron_zeda.conversion.hf_writer import DEFAULT_SHARD_BYTES, write_hf
from megatron_zeda.conversion.manifest import make_plan
from megatron_zeda.conversion.megatron_io import HF_FOLDER, MegatronFolder
from megatron_zeda.conversion.origins import known_hashes
from megatron_zeda.models import HfConfig


def megatron_to_hf(
    megatron: str | Path,
    hf: str | Path,
    *,
    iteration: int | None = None,
    hf_config: str | Path | None = None,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> dict[str, Any]:
    """Export one iteration, saved at any parallel layout, with or without optimizer state.

    Experts are written in the layout that was imported, one file or shards likewise. Dynamic exports carry their
    modelling code: ``AutoModelForCausalLM.from_pretrained(hf, trust_remote_code=True)`` loads them on stock
    transformers. Every weight is read back from the disk and compared with what the source gave before the folder
    becomes visible. An interrupted run is continued by the same call.

    Args:
        megatron: Megatron checkpoint folder, or one of its ``iter_*`` or ``release`` folders.
        hf: folder to create.
        iteration: which iteration; the newest by default.
        hf_config: folder with ``config.json`` and tokenizer, for a checkpoint that no import of ours made.
        shard_bytes: largest weight file, if the source had several.

    Returns:
        A summary: iteration, number of tensors, of those carried beside the model, and bytes, zero experts.

    Raises:
        InputError: for an input that is not a complete Megatron checkpoint of a known family, or an output that exists.
        ZedaError: for pickles that are not only data, or a full disk.
    """
    source = MegatronFolder(megatron, iteration=iteration, hf_config=hf_config)
    limit = shard_bytes if source.manifest.get("sharded", True) else None
    files = _source_files(source)
    plan = make_plan("export", files, shard_bytes=limit)
    known = known_hashes(source.path)
    with (
        OutputFolder(hf, plan=plan) as out,
        SourceHashes({name: path for name, path in files.items() if name in known}, known) as hashes,
    ):
        written = write_hf(source, out, shard_bytes=limit, what="export")
        write_config(out.partial, _config(source), source.family)
        copy_side_files(source.hf, out.partial)
        HfFolder(out.partial).close()  # configuration, table, index and headers agree
        summary = {
            "iteration": source.iteration,
            **written,
            "num_experts": source.family.num_experts(source.config),
            "num_zero_experts": source.family.num_zero_experts(source.config),
        }
        if source.manifest:
            out.manifest = {**source.manifest, "exported": {**summary, "files_checked": hashes.result()}}
    return summary


def _source_files(source: MegatronFolder) -> dict[str, Path]:
    """Name -> file of all that the export reads, with names as in the manifest of an import."""
    weights = {f"{source.tensors.folder.name}/{path.name}": path for path in files_in(source.tensors.folder)}
    beside = {f"{HF_FOLDER}/{name}": source.hf / name for name in ("config.json", CARRIED_FILE)}
    return weights | {name: path for name, path in beside.items() if path.is_file()}


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
