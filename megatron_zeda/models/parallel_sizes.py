"""Which parallel sizes a model's shape allows: the one list, for whoever builds a model and for the trainer's rules."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple


class Misfit(NamedTuple):
    """A parallel size that the model does not allow.

    Attributes:
        name: the parallel size's field.
        text: what is wrong, beginning with the size.
    """

    name: str
    text: str


# Field of the shape, what it counts, the parallel size that splits it.
_DIVIDED = (
    ("num_moe_experts", "experts", "expert_model_parallel_size"),
    ("num_attention_heads", "attention heads", "tensor_model_parallel_size"),
    ("vocab_size", "tokens of the vocabulary", "tensor_model_parallel_size"),
    ("moe_ffn_hidden_size", "units of an expert", "expert_tensor_parallel_size"),
    ("moe_shared_expert_intermediate_size", "units of the shared experts", "tensor_model_parallel_size"),
)
_DIVIDED_DENSE = (("ffn_hidden_size", "units of a dense layer", "tensor_model_parallel_size"),)


def not_divided(shape: Mapping[str, Any], sizes: Mapping[str, int]) -> Iterator[Misfit]:
    """Every parallel size that does not divide what it splits.

    Args:
        shape: the family's ``transformer_config_kwargs`` and ``gpt_model_kwargs``.
        sizes: positive sizes by field: tensor, expert and expert-tensor parallel.
    """
    for field, noun, name in _DIVIDED + (_DIVIDED_DENSE if has_dense_layers(shape) else ()):
        if (shape.get(field) or 0) % sizes[name]:
            yield Misfit(name, f"{sizes[name]} does not divide the model's {shape[field]} {noun}")


def uneven_key_value_heads(shape: Mapping[str, Any], tensor: int) -> Iterator[Misfit]:
    """The tensor-parallel size, if ranks would have different shares of the key-value heads; arguments as above."""
    groups = shape.get("num_query_groups")
    if groups and groups % tensor and tensor % groups:  # latent attention has none: there is a key for each head
        text = f"{tensor} is neither a multiple nor a divisor of the model's {groups} key-value heads"
        yield Misfit("tensor_model_parallel_size", text)


def has_dense_layers(shape: Mapping[str, Any]) -> bool:
    """Whether some layers have no experts."""
    pattern = shape.get("moe_layer_freq", 1)
    return 0 in pattern if isinstance(pattern, list) else pattern != 1
