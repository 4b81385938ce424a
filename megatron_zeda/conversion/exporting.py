"""Megatron checkpoint -> Hugging Face checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from megatron_zeda.conversion.background import SourceHashes
from megatron_zeda.conversion.dry_run import dry_run
from megatron_zeda.conversion.folders import OutputFolder, files_in
from megatron_zeda.conversion.formats import SAVES, FormatView, as_zeda, view_as
from megatron_zeda.conversion.fp8 import fp8_view, is_fp8_layout
from megatron_zeda.conversion.hf_folder import CARRIED_FILE, HfFolder, copy_side_files, side_files, write_config
from megatron_zeda.conversion.hf_writer import DEFAULT_SHARD_BYTES, file_sizes, plan_files, write_hf
from megatron_zeda.conversion.manifest import make_plan, read_manifest, versions
from megatron_zeda.conversion.megatron_io import HF_FOLDER, MegatronFolder
from megatron_zeda.conversion.model_card import CARD_FILE, CardMetrics, model_card, read_card_metrics
from megatron_zeda.conversion.origins import known_hashes
from megatron_zeda.errors import InputError
from megatron_zeda.models import ExpertLayout

QUANTIZATIONS = ("fp8",)
"""What ``quantize`` may be, see :mod:`megatron_zeda.conversion.fp8`."""


def megatron_to_hf(
    megatron: str | Path,
    hf: str | Path,
    *,
    iteration: int | None = None,
    hf_config: str | Path | None = None,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    format: str = "zeda",
    interleave: bool = False,
    quantize: str | None = None,
    base_model: str | None = None,
    card_metrics: str | Path | None = None,
    plan_only: bool = False,
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
        format: ``zeda``, ``dense-zeros`` or ``vllm-mone``, see :mod:`megatron_zeda.conversion.formats`.
        interleave: spread the zero experts of ``dense-zeros`` among the real ones.
        quantize: ``fp8``: experts and attention of the ``zeda`` form in FP8, see :mod:`megatron_zeda.conversion.fp8`.
            Needs nvidia-modelopt.
        base_model: hub id of the static model, for the model card; by default what the manifest knows.
        card_metrics: JSON file with what was measured, see :mod:`megatron_zeda.conversion.model_card`.
        plan_only: write nothing, and return what :func:`megatron_zeda.conversion.dry_run.dry_run` does.

    Returns:
        A summary: iteration, format, number of tensors, of those carried beside the model, and bytes, zero experts,
        ``quantization``, ``extra_bytes`` (more than the ``zeda`` form has; fewer if negative), ``saves`` (what serving
        this form saves) and ``notes`` (what stock implementations compute otherwise than the model).

    Raises:
        InputError: for an input that is not a complete Megatron checkpoint of a known family, an output that exists,
            a dial that the form cannot carry, and what cannot be quantised.
        ZedaError: for pickles that are not only data, or a full disk.
    """
    if quantize not in (None, *QUANTIZATIONS):
        raise InputError("unknown quantisation", where="--quantize", value=quantize, rule=", ".join(QUANTIZATIONS))
    metrics = CardMetrics() if card_metrics is None else read_card_metrics(card_metrics)
    layout: ExpertLayout | None = "per_expert" if quantize or format == "vllm-mone" else None  # engines want it so
    source = MegatronFolder(megatron, iteration=iteration, hf_config=hf_config, layout=layout)
    view = view_as(source, format, interleave=interleave)
    if quantize:
        view = fp8_view(view, source)
    _set_dtype(view)
    metrics = metrics.complete(base_model or source.manifest.get("base_model"), _trained_weight(source))
    limit = shard_bytes if source.manifest.get("sharded", True) else None
    files = _source_files(source)
    if plan_only:
        return dry_run(view, hf, files.values(), file_sizes(plan_files(view, limit)))
    plan = make_plan("export", files, shard_bytes=limit, format=format, interleave=interleave, quantize=quantize)
    known = known_hashes(source.path)
    with (
        OutputFolder(hf, plan=plan) as out,
        SourceHashes({name: path for name, path in files.items() if name in known}, known) as hashes,
    ):
        source.watch(hashes.passed)
        written = write_hf(view, out, shard_bytes=limit, what="export")
        write_config(out.partial, view.config, source.family)
        for name, values in view.files.items():
            out.write_json(name, values)
        copy_side_files(source.hf, out.partial)
        HfFolder(out.partial).close()  # configuration, table, index and headers agree
        summary = _summary(source, view, written)
        (out.partial / CARD_FILE).write_text(_card(source, view, summary, metrics), encoding="utf-8")
        out.manifest = _manifest(source, view, {**summary, "versions": versions(), "files_checked": hashes.result()})
    return summary


def _summary(source: MegatronFolder, view: FormatView, written: dict[str, Any]) -> dict[str, Any]:
    zero = source.family.num_zero_experts(source.config)
    return {
        "iteration": source.iteration,
        "export_format": view.format,
        **written,
        "num_experts": source.family.num_experts(source.config),
        "num_zero_experts": zero,
        "quantization": "fp8" if is_fp8_layout(view.config) else None,
        "extra_bytes": view.num_bytes - view_as(source).num_bytes,
        "saves": SAVES[view.format] if zero else "nothing: the model is static",
        "notes": view.notes,
    }


def _manifest(source: MegatronFolder, view: FormatView, exported: dict[str, Any]) -> dict[str, Any]:
    """What is known of the checkpoint (import, training run, layout, seed), and this export.

    The numbers of experts are those that this ``config.json`` announces; those of the source are in ``exported``.
    """
    known = read_manifest(source.folder) or source.manifest or {"format": 1, "family": source.family.name}
    config, _ = as_zeda(source.family, view.config)
    numbers = {
        "num_experts": source.family.num_experts(config),
        "num_zero_experts": source.family.num_zero_experts(config),
    }
    return {**known, **numbers, "tool": "megatron_to_hf", "exported": {"from": source.folder.name, **exported}}


def _card(source: MegatronFolder, view: FormatView, summary: dict[str, Any], metrics: CardMetrics) -> str:
    return model_card(
        source.family,
        dict(view.config),
        view.format,
        num_experts=summary["num_experts"],
        num_zero_experts=summary["num_zero_experts"],
        num_bytes=summary["num_bytes"],
        num_carried=summary["num_carried"],
        metrics=metrics,
    )


def _trained_weight(source: MegatronFolder) -> float | None:
    """w that this checkpoint was trained with: from its manifest, which training writes (older versions: its
    ``config.yaml``).
    """
    recorded = (read_manifest(source.folder) or {}).get("zero_expert_weight")
    if isinstance(recorded, (int, float)) and not isinstance(recorded, bool):
        return float(recorded)
    path = source.folder / "config.yaml"
    if not path.is_file():
        return None
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        weight = values["zero_experts"]["weight"]
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError):
        return None
    return float(weight) if isinstance(weight, (int, float)) else None


def _source_files(source: MegatronFolder) -> dict[str, Path]:
    """Name -> file of all that the export reads, with names as in the manifest of an import."""
    side_files(source.hf)  # refuses links that lead out of the folder, before anything is written
    weights = {f"{source.tensors.folder.name}/{path.name}": path for path in files_in(source.tensors.folder)}
    beside = {f"{HF_FOLDER}/{name}": source.hf / name for name in ("config.json", CARRIED_FILE)}
    return weights | {name: path for name, path in beside.items() if path.is_file()}


def _set_dtype(view: FormatView) -> None:
    """``config.json`` names the type that the weights really have."""
    row = next(row for row in view.rows if row.grow is None)  # selection biases, and some routers, are in float32
    dtype = str(view.dtype(row.pieces[0])).removeprefix("torch.")
    for key in ("dtype", "torch_dtype"):
        if key in view.config:
            view.config[key] = dtype
