"""Under which keys Megatron-Core may have stored a row of the weight table.

The table has the keys that Transformer Engine models write in the layout that the family's models have. The same
weights are found under other keys:

- Stacked or per layer. ``decoder.layers.X`` holds all layers along axis 0, ``decoder.layers.7.X`` one of them. Which of
  the two is written depends on ``moe_layer_freq`` and on the version (``non_homogeneous_layers``).
- Names of norms. Transformer Engine fuses a norm into the matrix behind it. Local layer specs keep it apart, and their
  maps to the fused names (``sharded_state_dict_keys_map`` in ``gpt_layer_specs.py``) are not complete: the norm in
  front of an MoE layer gets the name that it has in a dense layer, those inside multi-latent attention keep their own.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from megatron_zeda.models import WeightRow

_SAME = (
    ("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight"),
    ("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight"),
    ("self_attention.linear_q_up_proj.layer_norm_weight", "self_attention.q_layernorm.weight"),
    ("self_attention.linear_kv_up_proj.layer_norm_weight", "self_attention.kv_layernorm.weight"),
)
_OTHER_NAME = {one: two for pair in _SAME for one, two in (pair, pair[::-1])}
_LAYER = re.compile(r"(?P<block>decoder\.layers\.)(?:(?P<layer>\d+)\.)?(?P<name>.+)")


@dataclass(frozen=True)
class StoredBlock:
    """A block of a stored tensor.

    Attributes:
        key: the tensor.
        index: position on its stacked axes.
        extent: sizes of those axes.
    """

    key: str
    index: tuple[int, ...]
    extent: tuple[int, ...]


def find_block(row: WeightRow, stored: Collection[str], num_layers: int) -> StoredBlock | None:
    """Where a row of the table is, its own key first; None if under none of the keys that it may have."""
    return next((block for block in _candidates(row, num_layers) if block.key in stored), None)


def _candidates(row: WeightRow, num_layers: int) -> Iterator[StoredBlock]:
    yield StoredBlock(row.key, row.index, row.extent)
    match = _LAYER.fullmatch(row.key)
    if match is None:
        return
    block, name, index, extent = match["block"], match["name"], row.index, row.extent
    if match["layer"] is None:
        layer, index, extent = index[0], index[1:], extent[1:]
    else:
        layer = int(match["layer"])
    for same in (name, _OTHER_NAME.get(name)):
        if same is not None:
            yield StoredBlock(f"{block}{layer}.{same}", index, extent)
            yield StoredBlock(f"{block}{same}", (layer, *index), (num_layers, *extent))
