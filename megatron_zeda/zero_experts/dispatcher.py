"""Token dispatchers that move real selections and nothing else, for every dispatcher Megatron-Core has.

A token keeps between 0 and K of its selections, so every count is data. Upstream knows counts that are data from
dropping tokens, and mixes them with two assumptions that zero experts break: that dropless routing keeps tokens x K
selections, and that the K largest weights of a token are its selections.

Shape suffixes: T tokens of this rank, E real experts (inside the flex dispatcher: times the expert-tensor-parallel
size), K selections per token (there: times the same).
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from megatron.core.transformer.moe.token_dispatcher import (
    MoEAllGatherTokenDispatcher,
    MoEAlltoAllTokenDispatcher,
    MoEFlexTokenDispatcher,
    MoETokenDispatcher,
    _DeepepManager,
    _NCCLEPManager,
)
from megatron.core.transformer.transformer_config import TransformerConfig


class _PermutesNothing(MoETokenDispatcher):
    """Mixin for a rank that has no row to permute, because all of its tokens skip or no token chose its experts.

    Transformer Engine's fused permutation refuses to return no rows, and its inverse would return no rows instead of T
    rows of zeros. Such a pass, which moves nothing, takes the unfused functions.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._whole_config: TransformerConfig = self.config

    def dispatch_preprocess(self, *args: Any, **kwargs: Any) -> Any:
        """Begin a pass; see the base class. What the last pass chose must not decide which counts go to the host."""
        self.config: TransformerConfig = self._whole_config
        return super().dispatch_preprocess(*args, **kwargs)

    def _permute_rows(self, num_rows: int) -> None:
        """Choose the permutations for the rest of this pass."""
        if num_rows == 0 and self.config.moe_permute_fusion:
            self.config = copy.copy(self.config)
            self.config.moe_permute_fusion = False


class ZeroExpertAlltoAllTokenDispatcher(_PermutesNothing, MoEAlltoAllTokenDispatcher):
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

    def _maybe_dtoh_and_synchronize(
        self, point: str, tokens_per_expert: torch.Tensor | None = None
    ) -> torch.Tensor | None:
        tokens_per_expert = super()._maybe_dtoh_and_synchronize(point, tokens_per_expert)
        if point == "before_permutation_1":
            self._permute_rows(int(self.num_out_tokens))
        return tokens_per_expert


class ZeroExpertAllGatherTokenDispatcher(_PermutesNothing, MoEAllGatherTokenDispatcher):
    """``MoEAllGatherTokenDispatcher``, which counts by itself. It gathers every token by nature: rows are saved, not
    bytes.
    """

    def dispatch_postprocess(
        self, hidden_states: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Permute the gathered tokens for the local experts; see the base class."""
        if self.config.moe_permute_fusion:
            local = slice(self.local_expert_indices[0], self.local_expert_indices[-1] + 1)
            self._permute_rows(int(self.routing_map[:, local].sum()))
        return super().dispatch_postprocess(hidden_states, probs)


def selected_experts(
    routing_map_TE: torch.Tensor, probs_TE: torch.Tensor, topk: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The index form of a routing map that keeps any number of selections per token.

    The kernels behind the flex dispatcher take K experts per token and read -1 as "no selection": DeepEP documents it,
    NCCL-EP skips negative entries (``count_kernel.cuh``), and both return zeros for a token without any. Which slots
    are selections is read off the map: a selected expert's weight may round to 0 and still has a gradient.

    Args:
        routing_map_TE: ``[T, E]`` bool, at most ``topk`` True per row.
        probs_TE: ``[T, E]`` weights, not negative.
        topk: K.

    Returns:
        ``probs [T, K]``, 0 in empty slots and differentiable in the others, and ``indices [T, K]`` int64, -1 in empty
        slots. Selections come first, by falling weight.
    """
    order_TE = probs_TE.detach().masked_fill(~routing_map_TE, float("-inf"))
    indices_TK = torch.topk(order_TE, topk, dim=-1).indices
    empty_TK = ~routing_map_TE.gather(1, indices_TK)
    return probs_TE.gather(1, indices_TK).masked_fill(empty_TK, 0.0), indices_TK.masked_fill(empty_TK, -1)


class _ZeroExpertDeepepManager(_DeepepManager):
    """Upstream takes the K largest weights for the selections, and would send skipped tokens to arbitrary experts."""

    def setup_metadata(self, routing_map: torch.Tensor, probs: torch.Tensor) -> None:
        routing_map, probs = (x.reshape(x.shape[0], self.num_experts) for x in (routing_map, probs))
        self.token_probs, self.token_indices = selected_experts(routing_map, probs, self.router_topk)


class _ZeroExpertNCCLEPManager(_NCCLEPManager):
    """As :class:`_ZeroExpertDeepepManager`; upstream does the same here."""

    def setup_metadata(self, routing_map: torch.Tensor, probs: torch.Tensor) -> None:
        routing_map, probs = (x.reshape(x.shape[0], self.num_experts) for x in (routing_map, probs))
        self.token_probs, self.token_indices = selected_experts(routing_map, probs, self.router_topk)
        self.num_local_tokens = routing_map.shape[0]


class ZeroExpertFlexTokenDispatcher(MoEFlexTokenDispatcher):
    """``MoEFlexTokenDispatcher`` that sends real selections only.

    HybridEP takes the routing map as it is and needs nothing; the other two backends get a manager of ours.
    """

    def __init__(self, num_local_experts: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(num_local_experts, *args, **kwargs)
        managers = {"deepep": _ZeroExpertDeepepManager, "ncclep": _ZeroExpertNCCLEPManager}
        manager = managers.get(self.config.moe_flex_dispatcher_backend)
        if manager is not None:
            self._comm_manager = manager(
                group=self.tp_ep_group,
                num_local_experts=num_local_experts,
                router_topk=self.tp_size * self.config.moe_router_topk,
                num_experts=self.tp_size * self.config.num_moe_experts,
                config=self.config,
            )


DISPATCHERS: dict[str, type[MoETokenDispatcher]] = {
    "alltoall": ZeroExpertAlltoAllTokenDispatcher,
    "allgather": ZeroExpertAllGatherTokenDispatcher,
    "flex": ZeroExpertFlexTokenDispatcher,
}
"""``moe_token_dispatcher_type`` -> class."""
