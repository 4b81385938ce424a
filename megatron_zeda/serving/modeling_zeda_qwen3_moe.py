"""Qwen3-MoE with zero-output experts for Hugging Face transformers 5, written by megatron-zeda.

This file travels with an exported checkpoint and needs transformers and torch only. Load it with
``AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)``. Without remote code the same folder fails
loudly: its router weight has N + Z rows, the stock model wants N.

Each router chooses K of N real and Z zero experts. A chosen zero expert adds nothing, and its share of the routing
weight is not given to the others. Shapes: T tokens, D hidden, N real experts, Z zero experts, K experts per token.

What the router returns (read the skip rate from it with a forward hook on ``model.model.layers[i].mlp.gate``):
    logits ``[T, N + Z]`` in the model's dtype, the dial included;
    scores ``[T, K]``: routing weights, exactly 0 for every slot that a zero expert won;
    indices ``[T, K]``: ids below N, distinct within a token; the id of a slot with weight 0 means nothing.
So ``(scores == 0).float().mean()`` is the layer's skip rate.

``config.zeda_zero_logit_bias`` (default 0) is the dial: it is added to the zero experts' logits before the softmax.
Lower skips less, ``-inf`` gives the model without zero experts.
"""

from typing import Any

import torch
from torch import nn
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.models.qwen3_moe.modeling_qwen3_moe import (
    Qwen3MoeExperts,
    Qwen3MoeForCausalLM,
    Qwen3MoeModel,
    Qwen3MoeTopKRouter,
)


def zero_expert_settings(config: Any) -> tuple[int, float]:
    """Return (Z, dial) of a configuration, or raise ValueError naming the key that is missing or wrong.

    All three ``zce_*`` keys are required: other readers of this format default to identity experts and a mask, which
    would silently be another model.
    """
    for key in ("zce_nums", "zce_types", "use_zce_mask"):
        if getattr(config, key, None) is None:
            raise ValueError(f"config.json: `{key}` is missing; zce_nums, zce_types and use_zce_mask must all be there")
    nums, types, mask = config.zce_nums, config.zce_types, config.use_zce_mask
    if not isinstance(nums, (list, tuple)) or len(nums) != 1 or type(nums[0]) is not int or nums[0] < 1:
        raise ValueError(f"config.json: `zce_nums` must be a list of one positive integer, got {nums!r}")
    if list(types) != ["zero"]:
        raise ValueError(f"config.json: `zce_types` must be ['zero'], got {types!r}")
    if mask is not False:
        raise ValueError(f"config.json: `use_zce_mask` must be false, got {mask!r}")
    bias = getattr(config, "zeda_zero_logit_bias", 0.0)
    if isinstance(bias, bool) or not isinstance(bias, (int, float)) or bias != bias or bias == float("inf"):
        raise ValueError(f"config.json: `zeda_zero_logit_bias` must be a number below infinity, got {bias!r}")
    if config.num_experts_per_tok > config.num_experts:
        raise ValueError("config.json: `num_experts_per_tok` is larger than the number of experts")
    return nums[0], float(bias)


class ZedaTopKRouter(Qwen3MoeTopKRouter):
    """Top-K over N + Z experts; see the module's docstring for what it returns."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        num_zero, self.zero_logit_bias = zero_expert_settings(config)
        self.num_real = config.num_experts
        self.num_experts = self.num_real + num_zero
        self.weight = nn.Parameter(torch.zeros(self.num_experts, self.hidden_dim))
        # Some engines pattern-match "softmax, then top-K" routers and put their own routing in place, which would send
        # tokens to experts that do not exist. A router with state besides its weight is left alone.
        self.zero_expert_marker = nn.Buffer(torch.zeros(1), persistent=False)

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        hidden_states = hidden_states.reshape(-1, self.hidden_dim)
        logits = nn.functional.linear(hidden_states, self.weight)
        if self.zero_logit_bias != 0.0:
            dial = torch.zeros(self.num_experts, device=logits.device)
            dial[self.num_real :] = self.zero_logit_bias
            logits = (logits.float() + dial).to(logits.dtype)
        probs = logits.softmax(-1, dtype=torch.float)
        scores, chosen = probs.topk(self.top_k, dim=-1)
        if self.norm_topk_prob:
            scores = scores / scores.sum(-1, keepdim=True)
        is_zero = chosen >= self.num_real
        # A zero slot leaves with weight 0 and the id of a real expert that this token has not chosen: ids stay valid
        # and distinct for every consumer.
        taken = torch.zeros_like(probs).scatter(-1, chosen, 1.0)[:, : self.num_real]
        spare = taken.topk(self.top_k, dim=-1, largest=False).indices
        nth_zero = (is_zero.cumsum(-1) - 1).clamp(min=0)
        indices = torch.where(is_zero, spare.gather(-1, nth_zero), chosen)
        return logits, scores.masked_fill(is_zero, 0.0).to(logits.dtype), indices


class ZedaExperts(Qwen3MoeExperts):
    """The N real experts. Slots of weight 0 are dropped before any expert runs.

    The kept (token, expert) pairs are handed on as top-1 tokens, so every ``experts_implementation`` skips them. Under
    torch.compile and CUDA graph capture, where shapes must not depend on data, all K slots are computed: the same
    result without the saving.
    """

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        if torch.compiler.is_compiling() or (hidden_states.is_cuda and torch.cuda.is_current_stream_capturing()):
            return super().forward(hidden_states, top_k_index, top_k_weights)
        token, slot = torch.nonzero(top_k_weights, as_tuple=True)
        out = torch.zeros_like(hidden_states, dtype=torch.float)
        if token.numel():
            pairs = super().forward(
                hidden_states[token], top_k_index[token, slot, None], top_k_weights[token, slot, None]
            )
            out = out.index_add(0, token, pairs.float())
        return out.to(hidden_states.dtype)


class _AnyExpertsImplementation:
    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        """Some releases decide this from the source text of the model's own file, which is not where they are."""
        return True


class Qwen3MoePlusPlusModel(_AnyExpertsImplementation, Qwen3MoeModel):
    """The decoder without a head."""

    def __init__(self, config: Any) -> None:
        zero_expert_settings(config)
        super().__init__(config)
        for layer in self.layers:
            if hasattr(layer.mlp, "gate"):
                layer.mlp.gate = ZedaTopKRouter(config)
                layer.mlp.experts = ZedaExperts(config)
        self.post_init()


class Qwen3MoePlusPlusForCausalLM(_AnyExpertsImplementation, Qwen3MoeForCausalLM):
    """The decoder with its language-model head."""

    def __init__(self, config: Any) -> None:
        num_zero, _ = zero_expert_settings(config)
        super().__init__(config)
        self.model = Qwen3MoePlusPlusModel(config)
        # With output_router_logits the stock class adds a loss that balances all experts. Over N + Z columns that would
        # undo the routing: keep the logits for whoever asks, drop the loss.
        self.num_experts = config.num_experts + num_zero
        self.router_aux_loss_coef = 0.0
        self.post_init()


# On disk there is one tensor per expert, in memory one per layer. transformers applies the family's mapping to its own
# classes only, unless it is told to.
for _cls in (Qwen3MoePlusPlusModel, Qwen3MoePlusPlusForCausalLM):
    register_checkpoint_conversion_mapping(
        _cls.__name__, get_checkpoint_conversion_mapping("qwen3_moe"), overwrite=True
    )

# save_pretrained copies this file beside the weights (early releases of transformers 5 need to be told).
Qwen3MoePlusPlusModel.register_for_auto_class("AutoModel")
Qwen3MoePlusPlusForCausalLM.register_for_auto_class("AutoModelForCausalLM")
