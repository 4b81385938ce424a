"""Published models at real shapes, on the meta device: what stock transformers and Megatron-Core name and save."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

CONFIGS = Path(__file__).parent / "full_size_configs"


def full_size_config(name: str) -> dict[str, Any]:
    """The ``config.json`` of a published model: name of a file in ``full_size_configs`` without its ending."""
    return dict(json.loads((CONFIGS / f"{name}.json").read_text()))


def stock_shapes(hf_config: dict[str, Any], layout: str = "per_expert") -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor that stock transformers saves for a static configuration.

    ``per_expert`` is what ``save_pretrained`` writes, by transformers' own mapping; ``fused`` is what is in memory.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.core_model_loading import revert_weight_conversion

    config = AutoConfig.for_model(**{key: value for key, value in hf_config.items() if key != "architectures"})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    state = dict(model.state_dict())
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    if layout == "per_expert":
        state = revert_weight_conversion(model, state)
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


Block = tuple[str, tuple[int, ...], tuple[int, ...], tuple[int, ...]]
"""Key, global shape, offset and shape (stacked axes included) of a part of a tensor in a distributed checkpoint."""


def saved_blocks(model: Any) -> list[Block]:
    """What this process writes of a model into a distributed checkpoint: the blocks of which it is the main replica."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories, is_main_replica

    state = model.sharded_state_dict()
    apply_factories(state)
    blocks = []
    for tensor in _leaves(state):
        if isinstance(tensor, ShardedTensor) and is_main_replica(tensor.replica_id):
            shape = (1,) * tensor.prepend_axis_num + tuple(tensor.local_shape)
            blocks.append((tensor.key, tuple(tensor.global_shape), tuple(tensor.global_offset), shape))
    return blocks


def _leaves(entry: Any) -> list[Any]:
    if isinstance(entry, dict | list):
        children = entry.values() if isinstance(entry, dict) else entry
        return [leaf for child in children for leaf in _leaves(child)]
    return [entry]
