"""Writes export views with the safetensors library alone, and runs vLLM's substitution of experts on stock models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file


def save_view(view: Any, folder: Path) -> Path:
    """Write what a view gives into one file, next to its ``config.json`` and its small files."""
    folder.mkdir()
    tensors: dict[str, torch.Tensor] = {}
    for row in [*view.rows, *view.carried]:
        for piece in row.pieces:
            tensor = view.read(piece)
            assert tensor.dtype == view.dtype(piece), piece
            assert tuple(tensor.shape) == piece.shape, piece
            if piece.slot is None:
                assert piece.name not in tensors, piece
                tensors[piece.name] = tensor.contiguous().clone()
            else:
                whole = tensors.setdefault(piece.name, torch.full(piece.tensor_shape, torch.nan, dtype=tensor.dtype))
                whole[piece.slot] = tensor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for name, values in {"config.json": dict(view.config), **view.files}.items():
        (folder / name).write_text(json.dumps(values))
    return folder


def load_as_vllm(folder: Path) -> Any:
    """A stock transformers model of a ``vllm-mone`` folder that substitutes constants for experts as vLLM 0.33 does.

    Written from vLLM's documentation of the format: retained experts under their own ids, a substituted one named by
    ``approximate_experts`` and a tensor ``<its prefix>.approx_value``; routing weights are neither renormalised nor
    redistributed. The weights of substituted experts are NaN, so a single use of one would show.
    """
    from checkpoints import read_tensors
    from transformers import AutoConfig, AutoModelForCausalLM

    tensors, config = read_tensors(folder), json.loads((folder / "config.json").read_text())
    substituted = {int(layer): experts for layer, experts in config["approximate_experts"].items()}
    constants = {}
    for name in [name for name in tensors if name.endswith(".approx_value")]:
        layer, expert = (int(part) for part in name.split(".") if part.isdigit())
        assert expert in substituted[layer]
        constants[layer, expert] = tensors.pop(name)
        like = name.replace(f".experts.{expert}.approx_value", ".experts.0.")
        for original in [key for key in tensors if key.startswith(like)]:
            tensors[original.replace(like, f"{like[:-2]}{expert}.")] = torch.full_like(tensors[original], torch.nan)
    assert len(constants) == sum(map(len, substituted.values()))
    save_file(tensors, folder.parent / f"{folder.name}.padded.safetensors", metadata={"format": "pt"})
    padded = folder.parent / f"{folder.name}.padded"
    padded.mkdir()
    (folder.parent / f"{folder.name}.padded.safetensors").rename(padded / "model.safetensors")
    (padded / "config.json").write_text(json.dumps(config))
    model = AutoModelForCausalLM.from_pretrained(padded, config=AutoConfig.from_pretrained(padded)).eval()
    for layer, module in enumerate(model.model.layers):
        if hasattr(module.mlp, "experts"):
            values = {expert: constants[layer, expert] for expert in substituted[layer]}
            module.mlp.experts.forward = _substitute(module.mlp.experts.forward, values)
    return model


def _substitute(forward: Any, values: dict[int, torch.Tensor]) -> Any:
    def substituted(hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        constant = torch.zeros_like(hidden)
        for expert, value in values.items():
            chosen = ids == expert
            constant += (weights * chosen).sum(-1, keepdim=True) * value
            ids, weights = ids.masked_fill(chosen, 0), weights.masked_fill(chosen, 0.0)
        return forward(hidden, ids, weights) + constant

    return substituted
