"""Qwen3-MoE with zero-output experts for Hugging Face transformers 5, written by megatron-zeda.

This file travels with an exported checkpoint, together with modeling_zeda_base.py, which says what zero experts are and
what the routers return. Load the checkpoint with
``AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)``. Without remote code the same folder fails
loudly: its router weight has N + Z rows, the stock model wants N.

The dial ``config.zeda_zero_logit_bias`` is added to the zero experts' logits before the softmax.
"""

from typing import Any

import torch
from torch import nn
from transformers.models.qwen3_moe.modeling_qwen3_moe import (
    Qwen3MoeExperts,
    Qwen3MoeForCausalLM,
    Qwen3MoeModel,
    Qwen3MoeTopKRouter,
)

from .modeling_zeda_base import (
    AnyExpertsImplementation,
    SkippingExperts,
    ZeroExpertRows,
    ignored_tensors,
    register,
    replace_experts,
    zero_expert_settings,
)


class ZedaTopKRouter(ZeroExpertRows, Qwen3MoeTopKRouter):
    """Top-K over N + Z experts; logits and scores in the model's dtype, the dial included in the logits."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.add_zero_rows(config, config.num_experts)

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        hidden_states = hidden_states.reshape(-1, self.weight.shape[-1])
        logits = nn.functional.linear(hidden_states, self.weight)
        if self.zero_logit_bias != 0.0:
            logits = (logits.float() + self.dial(logits.device)).to(logits.dtype)
        scores, chosen = logits.softmax(-1, dtype=torch.float).topk(self.top_k, dim=-1)
        if self.norm_topk_prob:
            scores = scores / scores.sum(-1, keepdim=True)
        return logits, *self.finish(scores, chosen, logits.dtype)


class ZedaExperts(SkippingExperts, Qwen3MoeExperts):
    """The N real experts."""


class Qwen3MoePlusPlusModel(AnyExpertsImplementation, Qwen3MoeModel):
    """The decoder without a head."""

    def __init__(self, config: Any) -> None:
        zero_expert_settings(config, config.num_experts)
        super().__init__(config)
        self._keys_to_ignore_on_load_unexpected = ignored_tensors(config)
        for layer in self.layers:
            replace_experts(layer.mlp, ZedaTopKRouter, ZedaExperts, config)
        self.post_init()


class Qwen3MoePlusPlusForCausalLM(AnyExpertsImplementation, Qwen3MoeForCausalLM):
    """The decoder with its language-model head."""

    def __init__(self, config: Any) -> None:
        num_zero, _ = zero_expert_settings(config, config.num_experts)
        super().__init__(config)
        self._keys_to_ignore_on_load_unexpected = ignored_tensors(config)
        self.model = Qwen3MoePlusPlusModel(config)
        # With output_router_logits the stock class adds a loss that balances all experts. Over N + Z columns that would
        # undo the routing: keep the logits for whoever asks, drop the loss.
        self.num_experts = config.num_experts + num_zero
        self.router_aux_loss_coef = 0.0
        self.post_init()


register("qwen3_moe", Qwen3MoePlusPlusModel, Qwen3MoePlusPlusForCausalLM)
