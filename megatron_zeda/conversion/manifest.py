"""``zeda_manifest.json``: where a checkpoint came from and how it is laid out."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

from megatron_zeda import __version__
from megatron_zeda.conversion.folders import MANIFEST_FILE
from megatron_zeda.conversion.hf_folder import HfFolder
from megatron_zeda.models.hf_config import read_json_object

__all__ = ["KEY_STYLE", "MANIFEST_FILE", "make_manifest", "read_manifest"]

KEY_STYLE = "transformer_engine, stacked layers"


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of a Megatron checkpoint or of a dynamic Hugging Face folder; empty if it has none."""
    path = Path(folder) / MANIFEST_FILE
    return read_json_object(path) if path.exists() else {}


def make_manifest(source: HfFolder, **more: Any) -> dict[str, Any]:
    """Describe what was made from ``source``."""
    return {
        "format": 1,
        "versions": {
            "megatron_zeda": __version__,
            **{name: importlib.metadata.version(name) for name in ("megatron-core", "torch", "transformers")},
        },
        "family": source.family.name,
        "num_experts": source.family.num_experts(source.config),
        "num_zero_experts": source.num_zero_experts,
        "injection_seed": read_manifest(source.path).get("injection_seed"),
        "source": {"folder": str(source.path), "files": source.file_hashes()},
        **more,
    }
