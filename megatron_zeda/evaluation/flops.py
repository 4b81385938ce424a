"""The FLOP model of the ZEDA paper (arXiv 2605.18643), for any model whose weights a family's table lists.

A multiply-accumulate counts as 2. Of n tokens (l of them in one sequence, with r of the K selections skipped):

    matrices                   2 n (F + (N + Z) R + (1 - r) K X)
    attention, prefill of l    2 l^2 S         (no causal halving)
    attention, decode of l     l (l - 1) S     (keys and values of earlier tokens are cached, expanded)

F elements of the matrices that every token passes (attention, dense layers, shared experts), R elements of one router
column and X of one expert, all summed over the layers; N real and Z zero experts, K experts per token; S width of the
queries and of the values of all heads and layers. Embedding, head, norms and the sum over experts are left out.

Engines that decode multi-latent attention on the latents themselves compute more scores than this and no expansion.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self


@dataclass(frozen=True)
class ModelShape:
    """The sizes that the FLOP model needs; ``zero_experts`` 0 is a static model.

    Attributes:
        fixed: F of the formulas above.
        router_column: R.
        expert: X.
        scores: S.
        experts: N.
        topk: K; of a model whose K was lowered (NET), the K it had before.
        zero_experts: Z.
    """

    fixed: int
    router_column: int
    expert: int
    scores: int
    experts: int
    topk: int
    zero_experts: int = 0

    @classmethod
    def from_hf_config(cls, config: Mapping[str, Any]) -> Self:
        """Read the shape from a ``config.json``: every matrix of the family's weight table is counted."""
        from megatron_zeda.models import family_for, teacher_topk

        fields = dict(config)
        family = family_for(fields)
        fixed = router = experts = 0
        for row in family.weight_table(fields):
            if len(row.shape) != 2 or not row.key.startswith("decoder."):
                continue
            if ".mlp.experts." in row.key:
                experts += row.numel
            elif row.key.endswith("mlp.router.weight"):
                router += row.shape[1]
            else:
                fixed += row.numel
        num_experts = family.num_experts(fields)
        return cls(
            fixed=fixed,
            router_column=router,
            expert=experts // num_experts,
            scores=_score_width(family.transformer_config_kwargs(fields)),
            experts=num_experts,
            topk=teacher_topk(fields),
            zero_experts=family.num_zero_experts(fields),
        )

    def static(self) -> ModelShape:
        """The same model without zero experts."""
        return replace(self, zero_experts=0)

    def expert_flops(self, tokens: int, skip_rate: float = 0.0) -> float:
        """FLOPs of the experts' matrices."""
        return 2 * (1 - skip_rate) * self.topk * tokens * self.expert

    def matrix_flops(self, tokens: int, skip_rate: float = 0.0) -> float:
        """FLOPs of all matrices: experts, routers and what no token can skip."""
        columns = (self.experts + self.zero_experts) * self.router_column
        return 2 * tokens * (self.fixed + columns) + self.expert_flops(tokens, skip_rate)

    def prefill_flops(self, length: int, skip_rate: float = 0.0) -> float:
        """FLOPs of a prompt of ``length`` tokens."""
        return 2 * length**2 * self.scores + self.matrix_flops(length, skip_rate)

    def decode_flops(self, length: int, skip_rate: float = 0.0, *, prefix: int = 0) -> float:
        """FLOPs of generating ``length`` tokens one by one after ``prefix`` cached ones."""
        scores = length * (length - 1) * self.scores + 2 * prefix * length * self.scores
        return scores + self.matrix_flops(length, skip_rate)


def _score_width(fields: Mapping[str, Any]) -> int:
    """Width of the queries and of the values, heads and layers together, from ``TransformerConfig`` fields."""
    if "v_head_dim" in fields:
        width = fields["qk_head_dim"] + fields["qk_pos_emb_head_dim"] + fields["v_head_dim"]
    else:
        width = 2 * fields["kv_channels"]
    return int(width * fields["num_attention_heads"] * fields["num_layers"])


def theoretical_speedup(
    shape: ModelShape, *, prompt_skip_rate: float, response_skip_rate: float, prompt: int, response: int
) -> dict[str, float]:
    """Return static over dynamic FLOPs: the most that skipping could gain.

    Args:
        shape: the dynamic model (its static counterpart has the same sizes and no zero experts).
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
