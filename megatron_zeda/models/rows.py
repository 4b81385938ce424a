"""Rows that several families have: gated experts, and what injection appends to a router."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from megatron_zeda.models.base import ExpertLayout, Grow, HfPiece, WeightRow

NEVER_SELECTED = -1e4
"""Selection bias of zero experts that shall never be chosen: scores are between 0 and 1."""


def grow_gate(
    gate: torch.Tensor, num_zero_experts: int, *, seed: int, name: str, init: Any = "gaussian"
) -> torch.Tensor:
    """``[Z, H]``: router rows drawn from the statistics of the old ones."""
    from megatron_zeda.zero_experts.injection import draw_zero_rows

    return draw_zero_rows(gate, num_zero_experts, seed=seed, name=name, init=init)


def grow_selection_bias(
    bias: torch.Tensor, num_zero_experts: int, *, seed: int, name: str, init: Any = "gaussian"
) -> torch.Tensor:
    """``[Z]``: selection biases drawn from the statistics of the old ones."""
    from megatron_zeda.zero_experts.injection import draw_zero_entries

    return draw_zero_entries(bias, num_zero_experts, seed=seed, name=name, init=init)


def grow_zeros(
    tensor: torch.Tensor, num_zero_experts: int, *, seed: int, name: str, init: Any = "gaussian"
) -> torch.Tensor:
    """``[Z, ...]`` zeros: router rows that nothing depends on."""
    return tensor.new_zeros(num_zero_experts, *tensor.shape[1:])


def grow_never_selected(
    bias: torch.Tensor, num_zero_experts: int, *, seed: int, name: str, init: Any = "gaussian"
) -> torch.Tensor:
    """``[Z]``: a selection bias that keeps the layer static."""
    return bias.new_full((num_zero_experts,), NEVER_SELECTED)


def row(key: str, name: str, *shape: int, grow: Grow | None = None) -> WeightRow:
    """A Megatron tensor that is one Hugging Face tensor."""
    return WeightRow(key, (HfPiece(name, shape),), grow=grow)


def gated_pieces(prefix: str, ffn: int, hidden: int) -> tuple[HfPiece, HfPiece, HfPiece]:
    """The gate, up and down projections of one SwiGLU block, without bias."""
    return (
        HfPiece(f"{prefix}gate_proj.weight", (ffn, hidden)),
        HfPiece(f"{prefix}up_proj.weight", (ffn, hidden)),
        HfPiece(f"{prefix}down_proj.weight", (hidden, ffn)),
    )


def gated_rows(
    key: str, hf: str, ffn: int, hidden: int, index: tuple[int, ...] = (), extent: tuple[int, ...] = ()
) -> list[WeightRow]:
    """A SwiGLU block as Megatron keeps it: gate over up in one matrix, and the way down.

    Args:
        key: what ``linear_fc1.weight`` and ``linear_fc2.weight`` are appended to.
        hf: what ``gate_proj.weight`` and so on are appended to.
        ffn: width of the block.
        hidden: width of the model.
        index: as in :class:`~megatron_zeda.models.base.WeightRow`.
        extent: likewise.
    """
    gate, up, down = gated_pieces(hf, ffn, hidden)
    return [
        WeightRow(f"{key}linear_fc1.weight", (gate, up), index, extent),
        WeightRow(f"{key}linear_fc2.weight", (down,), index, extent),
    ]


def expert_rows(
    key: str,
    hf: str,
    ffn: int,
    hidden: int,
    experts: int,
    layout: ExpertLayout,
    *,
    layer: tuple[int, int] | None = None,
) -> list[WeightRow]:
    """The experts of one layer, in either layout on disk.

    Args:
        key: what ``linear_fc1.weight`` and ``linear_fc2.weight`` are appended to.
        hf: what ``<expert>.gate_proj.weight``, or ``gate_up_proj`` of the fused layout, are appended to.
        ffn: width of an expert.
        hidden: width of the model.
        experts: how many.
        layout: how they lie on disk.
        layer: ``(layer, number of layers)`` where Megatron stacks the layers of a model in one tensor.
    """
    index, extent = ((), ()) if layer is None else ((layer[0],), (layer[1],))
    rows = []
    for expert in range(experts):
        place, size = (*index, expert), (*extent, experts)
        if layout == "per_expert":
            rows += gated_rows(key, f"{hf}{expert}.", ffn, hidden, place, size)
            continue
        both = HfPiece(f"{hf}gate_up_proj", (2 * ffn, hidden), expert, experts)
        down = HfPiece(f"{hf}down_proj", (hidden, ffn), expert, experts)
        rows.append(WeightRow(f"{key}linear_fc1.weight", (both,), place, size))
        rows.append(WeightRow(f"{key}linear_fc2.weight", (down,), place, size))
    return rows


def whole_tensors(rows: Iterable[WeightRow]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor on disk that these rows are made of, in their order."""
    return {piece.name: piece.tensor_shape for row in rows for piece in row.pieces}


def tied(hf_config: dict[str, Any]) -> bool:
    """Whether the output layer is the embedding."""
    return bool(hf_config.get("tie_word_embeddings", False))
