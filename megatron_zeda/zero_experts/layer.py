"""A Megatron-Core MoE layer whose router may also choose zero experts.

Shape suffixes: S sequence of this rank, B batch, H hidden, T = S * B tokens, E real experts, G = E + Z router columns.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection

from megatron_zeda.zero_experts.config import ZeroExpertTransformerConfig
from megatron_zeda.zero_experts.dispatcher import DISPATCHERS
from megatron_zeda.zero_experts.router import StaticRouter


class ZeroExpertMoELayer(MoELayer):
    """``MoELayer`` that keeps E experts while its router has E + Z columns.

    The zero columns end between router and dispatcher: a selection of a zero expert adds nothing to the output, so it
    is not dispatched, and a token whose K selections are all zero experts costs no expert any row. Neither does one of
    an identity expert (``zero_expert_type="copy"``), which adds the token's hidden state on its own rank.

    Layers of multi-token prediction, which Megatron builds from the same spec, stay static: no checkpoint has zero rows
    for them.
    """

    def __init__(
        self,
        config: ZeroExpertTransformerConfig,
        submodules: MoESubmodules | None = None,
        layer_number: int | None = None,
        pg_collection: Any = None,
        is_mtp_layer: bool = False,
        name: str | None = None,
    ) -> None:
        if pg_collection is None:
            pg_collection = get_default_pg_collection()
        if is_mtp_layer and submodules is not None:
            submodules = replace(submodules, router=StaticRouter)
        super().__init__(
            config=config,
            submodules=submodules,
            layer_number=layer_number,
            pg_collection=pg_collection,
            is_mtp_layer=is_mtp_layer,
            name=name,
        )
        self.token_dispatcher = DISPATCHERS[config.moe_token_dispatcher_type](
            self.num_local_experts, self.local_expert_indices, config=self.config, pg_collection=pg_collection
        )
        self._copied_TH: torch.Tensor | None = None
        if self.shared_expert_overlap:
            self.token_dispatcher.set_shared_experts(self.shared_experts)

    def preprocess(
        self, hidden_states: torch.Tensor, probs: torch.Tensor, routing_map: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Hand the real columns of ``probs`` and ``routing_map`` (both ``[T, G]``) to the dispatcher."""
        num_real: int = self.config.num_moe_experts
        if self.config.zero_expert_type == "copy":
            share_T1 = probs[:, num_real:].sum(dim=-1, keepdim=True)
            rows_TH = hidden_states.reshape(-1, hidden_states.shape[-1])
            self._copied_TH = (rows_TH * share_T1).to(hidden_states.dtype)
        return super().preprocess(
            hidden_states, probs[:, :num_real].contiguous(), routing_map[:, :num_real].contiguous()
        )

    def postprocess(self, output: torch.Tensor, shared_expert_output: torch.Tensor | None) -> torch.Tensor:
        """Add what identity experts return: each token's own hidden state, as often as its weights for them say."""
        output = super().postprocess(output, shared_expert_output)
        copied_TH, self._copied_TH = self._copied_TH, None
        return output if copied_TH is None else output + copied_TH.view_as(output)

    def forward(
        self,
        hidden_states: torch.Tensor,
        intermediate_tensors: Any = None,
        padding_mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As upstream, with a padding mask that is right on every pipeline stage.

        Args:
            hidden_states: ``[S, B, H]``, this rank's part of the sequence.
            intermediate_tensors: upstream's, for partial CUDA graphs.
            padding_mask: ``[B, S]``, True for padding; with sequence parallelism also ``[B, S * TP]``, which
                ``GPTModel`` scatters on the first pipeline stage only. With context parallelism it is the rank's part,
                like the tokens.
        """
        if padding_mask is not None:
            padding_mask = self._local_padding_mask(padding_mask, hidden_states.shape[0])
        return super().forward(hidden_states, intermediate_tensors, padding_mask)

    def _local_padding_mask(self, padding_mask: torch.Tensor, local_length: int) -> torch.Tensor:
        if padding_mask.shape[1] == local_length:
            return padding_mask
        if self.config.sequence_parallel and padding_mask.shape[1] == local_length * self.tp_group.size():
            return padding_mask.narrow(1, self.tp_group.rank() * local_length, local_length)
        raise ValueError(
            f"padding_mask {tuple(padding_mask.shape)} does not fit {local_length} positions on each of "
            f"{self.tp_group.size()} tensor-parallel ranks; it is [batch, sequence], and with context parallelism cut "
            "like the tokens"
        )
