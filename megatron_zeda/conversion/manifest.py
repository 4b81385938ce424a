"""``zeda_manifest.json``: where a checkpoint came from and how it is laid out."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_zeda import __version__
from megatron_zeda.conversion.folders import MANIFEST_FILE
from megatron_zeda.conversion.hf_folder import HfFolder
from megatron_zeda.conversion.origins import source_name, source_revision
from megatron_zeda.models.hf_config import read_json_object

__all__ = ["KEY_STYLE", "MANIFEST_FILE", "make_manifest", "make_plan", "read_manifest", "versions"]

KEY_STYLE = "transformer_engine, stacked layers"


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of a Megatron checkpoint or of a dynamic Hugging Face folder; empty if it has none."""
    path = Path(folder) / MANIFEST_FILE
    return read_json_object(path) if path.exists() else {}


def versions() -> dict[str, str]:
    """Of this package and of the libraries that conversions use."""
    libraries = ("megatron-core", "torch", "transformers")
    return {"megatron_zeda": __version__, **{name: importlib.metadata.version(name) for name in libraries}}


def make_plan(tool: str, files: Mapping[str, Path], **options: Any) -> dict[str, Any]:
    """What an output depends on, so that an unfinished one is continued by the same conversion only.

    Args:
        tool: which conversion.
        files: name -> source file. Size, inode and times of change stand for the content: tools that copy keep the time
            of modification (``rsync -t``, ``cp -p``), nothing keeps that of the inode.
        options: everything else, as JSON values.
    """
    stats = {name: path.stat() for name, path in files.items()}
    found = {name: [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino] for name, stat in stats.items()}
    return {"tool": tool, "versions": versions(), "files": found, "options": options}


def make_manifest(source: HfFolder, *, files: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Describe what was made from ``source``.

    Args:
        source: the Hugging Face folder.
        files: name -> bytes and SHA-256 of its files.
        more: further entries.
    """
    earlier, name = read_manifest(source.path), source_name(source.path)
    return {
        "format": 1,
        "versions": versions(),
        "base_model": earlier.get("base_model", None if source.num_zero_experts else name),
        "family": source.family.name,
        "num_experts": source.family.num_experts(source.config),
        "num_zero_experts": source.num_zero_experts,
        "injection_seed": earlier.get("injection_seed"),
        "source": {
            "name": name,
            "revision": source_revision(source.path),
            "files": files,
        },
        **more,
    }
