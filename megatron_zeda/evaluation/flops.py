"""The FLOP model of the ZEDA paper (arXiv 2605.18643): of one layer, and of any model that a family's table lists.

A multiply-accumulate counts as 2. :func:`theoretical_speedup` is the paper's, of one layer of l tokens (H hidden, A
width of all queries, g keys and values per query, H_e width of an expert, r of the K selections skipped):

    MoE                        6 (1 - r) K l H H_e + 2 (N + Z) l H         (static: r = Z = 0)
    attention, prefill of l    4 l^2 A + 4 (1 + g) l H A                   (no causal halving)
    attention, decode of l     2 l (l - 1) A + 4 (1 + g) l H A             (keys and values are cached)

:class:`ModelShape` is the same for models with dense layers, shared experts or multi-latent attention. Of n tokens (l
of them in one sequence):

    matrices                   2 n (F + (N + Z) R + (1 - r) K X)
    attention, prefill of l    2 l^2 S
    attention, decode of l     l (l - 1) S     (latents are cached expanded)

F elements of the matrices that every token passes (attention, dense layers, shared experts), R elements of one router
column and X of one expert, all summed over the layers; N real and Z zero experts, K experts per token; S width of the
queries and of the values of all heads and layers. Embedding, head, norms and the sum over experts are left out.

Engines that decode multi-latent attention on the latents themselves compute more scores than this and no expansion.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Self, get_args

from megatron_zeda.errors import InputError

Stage = Literal["prefill", "decode"]
LENGTHS = (1024, 8192, 32768)
"""Tokens for which a report gives the speed-up."""


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
    *,
    hidden_size: int,
    attention_size: int,
    kv_ratio: float,
    expert_size: int,
    num_experts: int,
    num_zero_experts: int,
    topk: int,
    skip_rate: float,
    seq_length: int,
    stage: Stage,
) -> float:
    """Return static over dynamic FLOPs of one layer by the paper's model: the most that skipping could gain.

    Args:
        hidden_size: H.
        attention_size: A, query heads times their width.
        kv_ratio: g, key-value heads over query heads.
        expert_size: H_e, intermediate width of one expert.
        num_experts: N.
        num_zero_experts: Z, of the dynamic layer.
        topk: K, zero experts included.
        skip_rate: share of the K selections that are zero experts, 0 to 1.
        seq_length: l; tokens of the prompt, or tokens generated one by one from nothing.
        stage: ``prefill`` or ``decode``.

    Raises:
        InputError: a value out of its range.
    """
    sizes = {"hidden_size": hidden_size, "attention_size": attention_size, "expert_size": expert_size}
    counts = {"num_experts": num_experts, "topk": topk, "seq_length": seq_length}
    for name, value in (sizes | counts).items():
        _require(value >= 1, name, value, "at least 1")
    _require(num_zero_experts >= 0, "num_zero_experts", num_zero_experts, "at least 0")
    _require(topk <= num_experts, "topk", topk, f"at most num_experts, {num_experts}")
    _require(0 < kv_ratio <= 1, "kv_ratio", kv_ratio, "key-value heads over query heads: above 0, at most 1")
    _require_rate("skip_rate", skip_rate)
    _require(stage in get_args(Stage), "stage", stage, "`prefill` or `decode`")

    scores = 4 * seq_length**2 if stage == "prefill" else 2 * seq_length * (seq_length - 1)
    attention = scores * attention_size + 4 * (1 + kv_ratio) * seq_length * hidden_size * attention_size
    experts = 6 * topk * seq_length * hidden_size * expert_size
    router_column = 2 * seq_length * hidden_size
    static = experts + num_experts * router_column + attention
    dynamic = (1 - skip_rate) * experts + (num_experts + num_zero_experts) * router_column + attention
    return static / dynamic


def model_speedup(
    shape: ModelShape, *, prompt_skip_rate: float, response_skip_rate: float, prompt: int, response: int
) -> dict[str, float]:
    """Return static over dynamic FLOPs of a whole model that reads a prompt and answers.

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


def speedup_by_length(
    shape: ModelShape, *, prompt_skip_rate: float, response_skip_rate: float, lengths: Sequence[int] = LENGTHS
) -> list[dict[str, float]]:
    """Return ``[{seq_length, prefill, decode}]``: what :func:`theoretical_speedup` says of a whole model.

    Args:
        shape: the dynamic model.
        prompt_skip_rate: share of the K slots that prefill does not compute, 0 to 1.
        response_skip_rate: the same of decoding.
        lengths: tokens, each at least 1.

    Raises:
        InputError: a rate or a length out of its range.
    """
    _require_rate("prompt_skip_rate", prompt_skip_rate)
    _require_rate("response_skip_rate", response_skip_rate)
    static, found = shape.static(), []
    for length in lengths:
        _require(length >= 1, "seq_length", length, "at least 1")
        prefill = static.prefill_flops(length) / shape.prefill_flops(length, prompt_skip_rate)
        decode = static.decode_flops(length) / shape.decode_flops(length, response_skip_rate)
        found.append({"seq_length": length, "prefill": prefill, "decode": decode})
    return found


def _require(holds: bool, name: str, value: object, rule: str) -> None:
    if not holds:
        raise InputError("out of range", where=name, value=value, rule=rule)


def _require_rate(name: str, value: float) -> None:
    _require(0 <= value <= 1, name, value, "a share of the K selections, 0 to 1")


def expert_flops_saved(real_rows: int, tokens: int, topk: int) -> float:
    """Return 1 - real rows / (T K): the share of the expert rows of a static layer that is not computed.

    Args:
        real_rows: (token, real expert) pairs that were computed, over all layers.
        tokens: T, counted once per layer.
        topk: K of the model it is compared with.
    """
    return 1 - real_rows / (tokens * topk)
