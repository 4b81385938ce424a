"""The token dispatcher that moves real selections and nothing else."""

from __future__ import annotations

import torch
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher


class ZeroExpertAlltoAllTokenDispatcher(MoEAlltoAllTokenDispatcher):
    """``MoEAlltoAllTokenDispatcher`` for a routing map with any number of selections per token.

    Upstream fixes the number of permuted rows at tokens x K for dropless routing, which is wrong as soon as one slot is
    skipped: the unfused permute fails on it and the fused kernel returns rows nobody wrote.
    """

    def preprocess(self, routing_map: torch.Tensor) -> torch.Tensor:
        """Compute split sizes and counts from ``routing_map [T, E]``; see the base class."""
        tokens_per_expert = super().preprocess(routing_map)
        self.num_out_tokens = routing_map.sum()
        # The count is data: it must have reached the host before the first permutation, as with a capacity factor.
        self._maybe_update_cuda_sync_point("before_permutation_1")
        return tokens_per_expert
