"""The FLOP model of the ZEDA paper (arXiv 2605.18643), per layer; a multiply-accumulate counts as 2.

    MoE                        6 (1 - r) K n H H_e + 2 (N + Z) n H
    attention, prefill of l    4 l^2 A + 4 (1 + g) l H A             (no causal halving)
    attention, decode of l     2 l (l - 1) A + 4 (1 + g) l H A

n tokens, l positions, H hidden, H_e expert hidden, N real and Z zero experts, K experts per token, A = heads x
head_dim, g = key-value heads / query heads, r skip rate. The second term of attention is the four projections.
Embedding, head, norms and the sum over experts are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self


@dataclass(frozen=True)
class LayerShape:
    """The sizes the model needs; ``zero_experts`` 0 is a static layer."""

    hidden: int
    attention: int
    kv_share: float
    expert_hidden: int
    experts: int
    topk: int
    zero_experts: int = 0

    @classmethod
    def from_hf_config(cls, config: Mapping[str, Any]) -> Self:
        """Read the shape from a ``config.json``."""
        from megatron_zeda.models import family_for

        fields = dict(config)
        family = family_for(fields)
        heads = fields["num_attention_heads"]
        head_dim = fields.get("head_dim") or fields["hidden_size"] // heads
        return cls(
            hidden=fields["hidden_size"],
            attention=heads * head_dim,
            kv_share=fields["num_key_value_heads"] / heads,
            expert_hidden=fields["moe_intermediate_size"],
            experts=family.num_experts(fields),
            topk=fields["num_experts_per_tok"],
            zero_experts=family.num_zero_experts(fields),
        )

    def static(self) -> LayerShape:
        """The same layer without zero experts."""
        return replace(self, zero_experts=0)

    def expert_flops(self, tokens: int, skip_rate: float = 0.0) -> float:
        """FLOPs of the experts' three matrices."""
        return 6 * (1 - skip_rate) * self.topk * tokens * self.hidden * self.expert_hidden

    def moe_flops(self, tokens: int, skip_rate: float = 0.0) -> float:
        """FLOPs of experts and router."""
        router = 2 * (self.experts + self.zero_experts) * tokens * self.hidden
        return self.expert_flops(tokens, skip_rate) + router

    def prefill_flops(self, length: int, skip_rate: float = 0.0) -> float:
        """FLOPs of one layer over a prompt of ``length`` tokens."""
        attention = 4 * length**2 * self.attention + self._projection_flops(length)
        return attention + self.moe_flops(length, skip_rate)

    def decode_flops(self, length: int, skip_rate: float = 0.0, *, prefix: int = 0) -> float:
        """FLOPs of one layer generating ``length`` tokens one by one after ``prefix`` cached ones."""
        scores = 2 * length * (length - 1) * self.attention + 4 * prefix * length * self.attention
        return scores + self._projection_flops(length) + self.moe_flops(length, skip_rate)

    def _projection_flops(self, length: int) -> float:
        return 4 * (1 + self.kv_share) * length * self.hidden * self.attention


def theoretical_speedup(
    shape: LayerShape, *, prompt_skip_rate: float, response_skip_rate: float, prompt: int, response: int
) -> dict[str, float]:
    """Return static over dynamic FLOPs: the most that skipping could gain.

    Args:
        shape: the dynamic layer (its static counterpart has the same sizes and no zero experts).
        prompt_skip_rate: share of the K slots of prompt tokens that are not computed: what prefill saves.
        response_skip_rate: the same of response tokens: what decoding saves.
        prompt: tokens of the prompt, at least 1.
        response: tokens generated after it, at least 1.

    Returns:
        ``prefill``, ``decode`` (after the prompt) and ``total`` of both.
    """
    static = shape.static()
    prefill = static.prefill_flops(prompt), shape.prefill_flops(prompt, prompt_skip_rate)
    decode = (
        static.decode_flops(response, prefix=prompt),
        shape.decode_flops(response, response_skip_rate, prefix=prompt),
    )
    return {
        "prefill": prefill[0] / prefill[1],
        "decode": decode[0] / decode[1],
        "total": (prefill[0] + decode[0]) / (prefill[1] + decode[1]),
    }


def expert_flops_saved(real_rows: int, tokens: int, topk: int) -> float:
    """Return 1 - real rows / (T K): the share of the expert rows of a static layer that is not computed.

    Args:
        real_rows: (token, real expert) pairs that were computed, over all layers.
        tokens: T, counted once per layer.
        topk: K of the model it is compared with.
    """
    return 1 - real_rows / (tokens * topk)
