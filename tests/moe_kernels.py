"""Stand-ins on the CPU for the kernels that Megatron-Core's dispatchers call on GPUs, with their interfaces and rules.

The flex dispatcher's (DeepEP, HybridEP, NCCL-EP) run over the default gloo groups. As the real ones, they move a token
once to every rank that holds one of its selections, take expert -1 for "no selection" (but weight 0 for one), want
different experts per token, and return zeros for a token without any. Transformer Engine's fused permutations are
here with what they refuse: see the functions. :func:`install` puts all of them in place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core.tensor_parallel import all_to_all
from megatron.core.transformer.moe import moe_utils, token_dispatcher


@dataclass
class Journey:
    """Which tokens went where, so that results find back."""

    group: Any
    num_tokens: int
    sent: torch.Tensor
    send_splits: list[int]
    receive_splits: list[int]

    def there(self, rows: torch.Tensor) -> torch.Tensor:
        """``[tokens, ...]`` of this rank -> ``[received, ...]``."""
        return all_to_all(self.group, rows[self.sent], self.receive_splits, self.send_splits)

    def back(self, rows: torch.Tensor) -> torch.Tensor:
        """``[received, H]`` -> the sums ``[tokens, H]``."""
        home = all_to_all(self.group, rows, self.send_splits, self.receive_splits)
        return home.new_zeros(self.num_tokens, home.shape[1]).index_add(0, self.sent, home)


def _plan(to_rank: torch.Tensor, group: Any) -> Journey:
    """``to_rank [tokens, ranks]`` bool."""
    counts = to_rank.sum(0)
    table = [torch.empty_like(counts) for _ in range(group.size())]
    torch.distributed.all_gather(table, counts, group=group)
    rank = group.rank()
    return Journey(
        group, to_rank.shape[0], to_rank.T.nonzero()[:, 1], counts.tolist(), [int(row[rank]) for row in table]
    )


def _plan_for_indices(indices: torch.Tensor, num_experts: int, group: Any) -> tuple[Journey, int]:
    for row in indices.tolist():
        chosen = [expert for expert in row if expert >= 0]
        assert len(chosen) == len(set(chosen)), f"a token selects an expert twice: {row}"
    per_rank = num_experts // group.size()
    owner = indices.div(per_rank, rounding_mode="floor")  # -1 stays negative
    ranks = torch.arange(group.size())
    return _plan((owner[:, :, None] == ranks).any(1), group), per_rank


def fused_dispatch(
    x: torch.Tensor, token_indices: torch.Tensor, token_probs: torch.Tensor, num_experts: int, group: Any, **_: Any
) -> tuple[Any, ...]:
    """DeepEP's: ``[received, H]``, local indices (-1 elsewhere), weights, counts per local expert, handle."""
    assert token_indices.dtype == torch.int64 and token_probs.dtype == torch.float32
    journey, per_rank = _plan_for_indices(token_indices, num_experts, group)
    indices, probs = journey.there(token_indices), journey.there(token_probs)
    local = indices - group.rank() * per_rank
    mine = (indices >= 0) & (local >= 0) & (local < per_rank)
    local = local.masked_fill(~mine, -1)
    counts = torch.bincount(local[mine], minlength=per_rank)
    return journey.there(x), local, probs.masked_fill(~mine, 0.0), counts, journey


def fused_combine(x: torch.Tensor, group: Any, handle: Journey, **_: Any) -> tuple[torch.Tensor, None]:
    """DeepEP's."""
    return handle.back(x), None


def hybrid_ep_dispatch(
    x: torch.Tensor, routing_map: torch.Tensor, probs: torch.Tensor, group: Any, num_local_experts: int, **_: Any
) -> tuple[Any, ...]:
    """HybridEP's: rows in the order of the local experts, their weights, no scales, counts, handle."""
    assert probs.dtype == torch.float32
    journey = _plan(routing_map.reshape(x.shape[0], group.size(), num_local_experts).any(2), group)
    local = slice(group.rank() * num_local_experts, (group.rank() + 1) * num_local_experts)
    local_map, local_probs = journey.there(routing_map.long())[:, local].bool(), journey.there(probs)[:, local]
    experts, rows = local_map.T.nonzero().unbind(1)
    received = journey.there(x)
    return received[rows], local_probs[rows, experts], None, local_map.sum(0), (journey, rows, received.shape[0])


def hybrid_ep_combine(x: torch.Tensor, handle: Any, **_: Any) -> torch.Tensor:
    """HybridEP's."""
    journey, rows, num_received = handle
    return journey.back(x.new_zeros(num_received, x.shape[1]).index_add(0, rows, x))


_nccl_ep = SimpleNamespace(group=None, num_experts=0)


def ensure_nccl_ep_bootstrapped(group: Any, num_experts: int, **_: Any) -> None:
    """Remember the process-wide context."""
    _nccl_ep.group, _nccl_ep.num_experts = group, num_experts


def nccl_ep_dispatch(
    buffer: Any, tokens: torch.Tensor, topk_idx: torch.Tensor, topk_weights: torch.Tensor, **_: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """NCCL-EP's: the whole receive buffer in the order of the local experts, counts, weights."""
    received, local, probs, counts, journey = fused_dispatch(
        tokens, topk_idx, topk_weights, _nccl_ep.num_experts, _nccl_ep.group
    )
    slots = torch.stack([local == expert for expert in range(buffer.num_local_experts)])  # [experts, received, K]
    _, rows, columns = slots.nonzero().unbind(1)
    buffer.journey, buffer.rows, buffer.num_received = journey, rows, received.shape[0]
    spare = buffer.recv_capacity_per_rank - len(rows)
    assert spare >= 0, "NCCL-EP traps here"
    garbage = torch.full((spare, tokens.shape[1]), float("nan"))
    return torch.cat([received[rows], garbage]), counts, torch.cat([probs[rows, columns], garbage[:, 0]])


def nccl_ep_combine(buffer: Any, expert_out: torch.Tensor, num_local_tokens: int, **_: Any) -> torch.Tensor:
    """NCCL-EP's: reads the rows that dispatch wrote out of the whole buffer."""
    assert expert_out.shape[0] == buffer.recv_capacity_per_rank
    out = expert_out[: len(buffer.rows)]
    sums = out.new_zeros(buffer.num_received, out.shape[1]).index_add(0, buffer.rows, out)
    assert buffer.journey.num_tokens == num_local_tokens
    return buffer.journey.back(sums)


class OnHost(torch.Tensor):
    """Counts that were copied to the host, where no kernel can read them. (On a CPU nothing else tells.)"""


def maybe_move_tensor_to_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """Megatron-Core's, which copies what is on a device."""
    if not isinstance(tensor, torch.Tensor):
        return tensor
    return tensor.numpy() if as_numpy else tensor.as_subclass(OnHost)


DISPATCHER_KERNELS: dict[str, Callable[..., Any]] = {
    "maybe_move_tensor_to_cpu": maybe_move_tensor_to_cpu,
    "fused_dispatch": fused_dispatch,
    "fused_combine": fused_combine,
    "set_deepep_num_sms": lambda num_sms: None,
    "hybrid_ep_dispatch": hybrid_ep_dispatch,
    "hybrid_ep_combine": hybrid_ep_combine,
    "ensure_nccl_ep_bootstrapped": ensure_nccl_ep_bootstrapped,
    "new_nccl_ep_buffer": lambda **sizes: SimpleNamespace(**sizes),
    "nccl_ep_dispatch": nccl_ep_dispatch,
    "nccl_ep_combine": nccl_ep_combine,
}
"""What to put into ``megatron.core.transformer.moe.token_dispatcher``."""


def _row_order(routing_map: torch.Tensor, num_out_tokens: Any) -> torch.Tensor:
    """The expert and the token of every row, ``[2, rows]``."""
    num_rows = int(num_out_tokens)
    assert num_rows > 0, "moe_permute (mask map) requires num_out_tokens > 0"
    places = routing_map.T.nonzero().T
    found = places.shape[1]
    assert found == num_rows, f"{num_rows} rows asked for, {found} selected: the rest nobody would write"
    return places


def _nothing() -> torch.Tensor:
    return torch.empty(2, 0, dtype=torch.long)


def fused_permute(
    tokens: torch.Tensor, routing_map: torch.Tensor, num_out_tokens: Any = -1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Transformer Engine's ``moe_permute``: 0 tokens pass, 0 rows out of some tokens do not."""
    if not tokens.numel():
        return tokens.clone(), _nothing()
    places = _row_order(routing_map, num_out_tokens)
    return tokens[places[1]], places


def fused_permute_with_probs(
    tokens: torch.Tensor, probs: torch.Tensor, routing_map: torch.Tensor, num_out_tokens: Any = -1
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Transformer Engine's ``moe_permute_with_probs``."""
    if not tokens.numel():
        return tokens.clone(), probs.reshape(-1)[:0], _nothing()
    places = _row_order(routing_map, num_out_tokens)
    experts, rows = places
    return tokens[rows], probs[rows, experts], places


def fused_permute_and_pad_with_probs(
    tokens: torch.Tensor,
    probs: torch.Tensor,
    routing_map: torch.Tensor,
    tokens_per_expert: torch.Tensor,
    align_size: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Transformer Engine's ``moe_permute_and_pad_with_probs``: every expert's rows are filled up with zeros.

    Tokens, weights, order, how far down padding moves an expert's rows (None: no padding), counts with padding.
    """
    padded = (torch.ceil(tokens_per_expert / align_size) * align_size).long()
    padding = padded - tokens_per_expert
    offsets = padding.cumsum(0) - padding if padding.any() else None
    if not tokens.numel():
        return tokens.clone(), probs.reshape(-1)[:0], _nothing(), offsets, padded
    places = _row_order(routing_map, tokens_per_expert.sum())
    experts, rows = places
    slots = _slots(places, offsets)
    total = int(padded.sum())
    all_tokens = tokens.new_zeros(total, tokens.shape[1]).index_copy(0, slots, tokens[rows])
    return all_tokens, probs.new_zeros(total).index_copy(0, slots, probs[rows, experts]), places, offsets, padded


def _slots(places: torch.Tensor, offsets: torch.Tensor | None) -> torch.Tensor:
    slots = torch.arange(places.shape[1])
    return slots if offsets is None else slots + offsets[places[0]]


def fused_unpermute(
    tokens: torch.Tensor,
    places: torch.Tensor,
    merging_probs: Any = None,
    restore_shape: Any = None,
    pad_offsets: torch.Tensor | None = None,
) -> torch.Tensor:
    """Transformer Engine's ``moe_unpermute``, which returns nothing for nothing, whatever shape is asked for."""
    assert merging_probs is None
    if not tokens.numel():
        return tokens.clone()
    return tokens.new_zeros(restore_shape).index_add(0, places[1], tokens[_slots(places, pad_offsets)])


def fused_sort_chunks_by_index_with_probs(
    tokens: torch.Tensor, probs: torch.Tensor, split_sizes: torch.Tensor, sorted_indices: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Transformer Engine's ``moe_sort_chunks_by_index_with_probs``."""
    assert not isinstance(split_sizes, OnHost), "a Triton kernel reads the sizes of the chunks on the device"
    both = [torch.split(x, split_sizes.tolist()) for x in (tokens, probs)]
    return tuple(torch.cat([chunks[i] for i in sorted_indices.tolist()]) for chunks in both)


PERMUTE_KERNELS: dict[str, Any] = {
    "HAVE_TE": True,
    "is_te_min_version": lambda version: True,
    "fused_permute": fused_permute,
    "fused_permute_with_probs": fused_permute_with_probs,
    "fused_permute_and_pad_with_probs": fused_permute_and_pad_with_probs,
    "fused_unpermute": fused_unpermute,
    "fused_sort_chunks_by_index": lambda x, sizes, order: fused_sort_chunks_by_index_with_probs(x, x, sizes, order)[0],
    "fused_sort_chunks_by_index_with_probs": fused_sort_chunks_by_index_with_probs,
}
"""What to put into ``megatron.core.transformer.moe.moe_utils``; then ``moe_permute_fusion`` works."""


def install(put: Callable[[Any, str, Any], None] = setattr) -> None:
    """Put every stand-in where Megatron-Core looks for its kernel; ``put`` is ``setattr`` or takes what it takes."""
    for module, kernels in ((token_dispatcher, DISPATCHER_KERNELS), (moe_utils, PERMUTE_KERNELS)):
        for name, kernel in kernels.items():
            put(module, name, kernel)
