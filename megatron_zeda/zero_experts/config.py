"""The configuration a model with zero experts is built from, and what it refuses.

Plain dataclass fields on subclasses of Megatron-Core's configurations, so that they survive ``dataclasses.replace``,
``asdict`` and Megatron-LM's argument handling.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

_AUX_LOSSES = ("aux_loss", "seq_aux_loss", "global_aux_loss")


def _stock_aux_loss(config: Any) -> bool:
    kinds, coeffs = config.moe_router_load_balancing_type, config.moe_aux_loss_coeff
    kinds = [kinds] if isinstance(kinds, str) else kinds
    coeffs = coeffs if isinstance(coeffs, Sequence) else [coeffs] * len(kinds)
    return any(kind in _AUX_LOSSES and coeff for kind, coeff in zip(kinds, coeffs, strict=False))


def _uses(config: Any, kind: str) -> bool:
    kinds = config.moe_router_load_balancing_type
    return kind == kinds or (not isinstance(kinds, str) and kind in kinds)


@dataclass(frozen=True)
class Refusal:
    """One combination that zero experts cannot serve: when it applies, and what the user is told."""

    setting: str
    applies: Callable[[Any], bool]
    reason: str
    alternative: str

    def __str__(self) -> str:
        return f"{self.setting}: {self.reason}; {self.alternative}"


def _without_expert_ranks(config: Any) -> bool:
    tensor = config.expert_tensor_parallel_size or config.tensor_model_parallel_size
    return config.expert_model_parallel_size * tensor == 1


def _nccl_ep(config: Any) -> bool:
    return config.moe_token_dispatcher_type == "flex" and config.moe_flex_dispatcher_backend == "ncclep"


def _hybrid_ep(config: Any) -> bool:
    return config.moe_token_dispatcher_type == "flex" and config.moe_flex_dispatcher_backend == "hybridep"


def _nccl_ep_wants_num_topk() -> bool:
    """Whether this Transformer Engine's NCCL-EP has to be told a K that Megatron-Core 0.19 does not tell it."""
    try:
        from transformer_engine.pytorch import ep
    except ImportError:
        return False
    return "num_topk" in inspect.signature(ep.ep_bootstrap).parameters


# Judged on values as a user gives them, deprecated spellings included, before or after Megatron-Core normalises them.
# Every `setting` begins with the name of the field to change.
REFUSALS: tuple[Refusal, ...] = (
    Refusal(
        "moe_aux_loss_coeff",
        _stock_aux_loss,
        "Megatron's load-balancing losses would spread the tokens evenly over real and zero experts alike",
        "set moe_aux_loss_coeff to 0 and use zero_expert_balance_coeff",
    ),
    Refusal(
        "moe_router_load_balancing_type=sinkhorn",
        lambda c: _uses(c, "sinkhorn"),
        "sinkhorn balances all columns of the router, zero experts included",
        "use 'none' and zero_expert_balance_coeff",
    ),
    Refusal(
        "moe_router_load_balancing_type=quantile_balancing",
        lambda c: _uses(c, "quantile_balancing"),
        "quantile balancing moves a bias of every column towards an even load and accepts no padding mask",
        "use 'none' and zero_expert_balance_coeff",
    ),
    Refusal(
        "moe_router_num_groups",
        lambda c: (c.moe_router_num_groups or 1) > 1 or bool(c.moe_router_topk_limited_devices),
        "groups are equal slices of all columns, so that real and zero experts would land in the same ones",
        "leave it unset",
    ),
    Refusal(
        "moe_router_fusion with moe_enable_routing_replay",
        lambda c: c.moe_router_fusion and c.moe_enable_routing_replay,
        "the fused router ignores recorded routing without a word",
        "turn one of the two off",
    ),
    Refusal(
        "moe_router_padding_for_quantization",
        lambda c: bool(c.moe_router_padding_for_quantization or c.moe_router_padding_for_fp8),
        "it sends tokens to experts they did not choose, through the all-to-all, and leaves an expert unaligned when "
        "too few other tokens are left to fill it up",
        "leave it off: the experts then pad their own input, after the all-to-all",
    ),
    Refusal(
        "moe_pad_expert_input_to_capacity",
        lambda c: c.moe_pad_expert_input_to_capacity,
        "every expert is filled up to its capacity with tokens that did not choose it: the rows that skipping saves "
        "come back",
        "leave it off; in a Megatron-Core job of your own, moe_expert_capacity_factor alone drops without filling up",
    ),
    Refusal(
        "moe_pad_experts_for_cuda_graph_inference",
        lambda c: c.moe_pad_experts_for_cuda_graph_inference,
        "it fills every expert up to its capacity while decoding: the rows that skipping saves come back",
        "leave it off",
    ),
    Refusal(
        "moe_token_dispatcher_type=flex with one expert-parallel rank",
        lambda c: (
            c.moe_token_dispatcher_type == "flex"
            and c.moe_flex_dispatcher_backend in ("deepep", "ncclep")
            and _without_expert_ranks(c)
        ),
        "DeepEP and NCCL-EP move tokens between ranks, and Megatron-Core builds neither for one rank",
        "use 'alltoall', or raise expert_model_parallel_size",
    ),
    Refusal(
        "moe_expert_rank_capacity_factor missing with moe_flex_dispatcher_backend=ncclep",
        lambda c: _nccl_ep(c) and c.moe_expert_rank_capacity_factor is None,
        "NCCL-EP sizes its receive buffer with it, and Megatron-Core refuses to build without",
        "set it generously: a step that exceeds the buffer ends the run",
    ),
    Refusal(
        "moe_flex_dispatcher_backend=ncclep without bf16",
        lambda c: _nccl_ep(c) and not c.bf16,
        "NCCL-EP moves bfloat16 only",
        "use bf16, or another dispatcher",
    ),
    Refusal(
        "moe_flex_dispatcher_backend=ncclep with a Transformer Engine whose ep_bootstrap needs num_topk",
        lambda c: _nccl_ep(c) and _nccl_ep_wants_num_topk(),
        "Megatron-Core 0.19 calls it without, so that the first step would fail (Transformer Engine 2.20 is one)",
        "use 'deepep' or 'hybridep', or an older Transformer Engine",
    ),
    Refusal(
        "moe_expert_rank_capacity_factor with moe_flex_dispatcher_backend=hybridep",
        lambda c: _hybrid_ep(c) and c.moe_expert_rank_capacity_factor is not None,
        "its buffers have the size of the static model whatever is skipped, and what exceeds them is dropped without "
        "a word",
        "leave it unset: HybridEP then sizes its buffers by the rows that arrive",
    ),
    Refusal(
        "moe_ncclep_static_shape",
        lambda c: _nccl_ep(c) and (c.moe_ncclep_static_shape or c.moe_ncclep_zero_copy),
        "it (and moe_ncclep_zero_copy, which needs it) gives the experts the whole receive buffer, which has the size "
        "of the static model whatever is skipped",
        "leave both off: the experts then get the rows that arrive",
    ),
    Refusal(
        "moe_paged_stash",
        lambda c: c.moe_paged_stash,
        "it pages buffers of a fixed size, and repeats a step that exceeds them, whose selections would be counted "
        "twice",
        "leave it off: without fixed buffers the experts keep the rows that arrive and no more",
    ),
    Refusal(
        "moe_shared_expert_overlap with moe_latent_size",
        lambda c: c.moe_shared_expert_overlap and bool(c.moe_latent_size),
        "Megatron-Core overlaps the two in inference only, and would fail in the first step",
        "turn moe_shared_expert_overlap off",
    ),
    Refusal(
        "mlp_chunks_for_training",
        lambda c: (c.mlp_chunks_for_training or 1) > 1,
        "every chunk is routed as a micro-batch of its own, so that the balancing loss is added once per chunk, and "
        "without the padding mask",
        "use 1, and recompute_modules to save memory",
    ),
    Refusal(
        "overlap_moe_expert_parallel_comm",
        lambda c: c.overlap_moe_expert_parallel_comm,
        "its schedule calls the router without the padding mask, so that batches with padding would have it counted "
        "and balanced",
        "leave it off; where there are shared experts, moe_shared_expert_overlap hides communication too",
    ),
    Refusal(
        "cuda_graph_impl",
        lambda c: c.cuda_graph_impl != "none" or c.enable_cuda_graph or c.external_cuda_graph,
        "a graph of an MoE layer freezes the number of dispatched rows, which is data; one of its router freezes the "
        "number of loss tokens and goes on counting where nobody reads after the statistics are reset; and after one "
        "of the attention alone the MoE layer runs without the padding mask",
        "use 'none'",
    ),
    Refusal(
        "transformer_impl=inference_optimized",
        lambda c: c.transformer_impl == "inference_optimized",
        "its router returns K columns instead of one per expert, so that zero experts cannot be told apart",
        "use 'transformer_engine' or 'local'",
    ),
)


def skips_experts(config: Any) -> bool:
    """Whether tokens keep any number of their K selections, so that MoE layers need the classes of this package."""
    return config.num_zero_experts > 0 or config.dynamic_skipping_beta is not None


def normalizes_weights(config: Any) -> bool:
    """Whether the weights of a token's selections add up to the same for every token."""
    return config.moe_router_score_function != "softmax" or not config.moe_router_pre_softmax


def _method_problems(config: Any) -> list[str]:
    problems, beta, topk = [], config.dynamic_skipping_beta, config.teacher_router_topk
    if config.zero_expert_type not in ("zero", "copy"):
        problems.append(f"zero_expert_type: zero or copy, got {config.zero_expert_type!r}")
    if config.zero_expert_renormalize and not config.num_zero_experts:
        problems.append("zero_expert_renormalize: there are no zero experts whose weight could go to the others")
    if config.zero_expert_renormalize and config.zero_expert_type == "copy":
        problems.append("zero_expert_renormalize: weight that identity experts have is not given to the others")
    if config.zero_expert_renormalize and not normalizes_weights(config):
        problems.append("zero_expert_renormalize: this router does not normalise its weights (moe_router_pre_softmax)")
    if beta is not None and not 0.0 <= beta <= 1.0:
        problems.append(f"dynamic_skipping_beta: between 0 and 1, got {beta}")
    if beta is not None and config.num_zero_experts:
        problems.append("dynamic_skipping_beta: not with zero experts")
    if topk is not None and (config.num_zero_experts or beta is not None or topk < config.moe_router_topk):
        problems.append(
            f"teacher_router_topk: the K of a static model before it was {config.moe_router_topk}, got {topk}"
        )
    return problems


def _value_problems(config: Any) -> list[str]:
    problems = []
    if config.num_zero_experts < 0:
        problems.append(f"num_zero_experts: must not be negative, got {config.num_zero_experts}")
    if config.num_zero_experts and not config.num_moe_experts:
        problems.append("num_zero_experts: a model without num_moe_experts has no router to widen; set it to 0")
    if config.num_zero_experts and config.zero_expert_weight <= 0:
        problems.append(f"zero_expert_weight: must be positive, got {config.zero_expert_weight}")
    if config.zero_expert_balance_coeff < 0:
        problems.append(f"zero_expert_balance_coeff: must not be negative, got {config.zero_expert_balance_coeff}")
    problems += _method_problems(config)
    if config.num_moe_experts and config.num_zero_experts and config.moe_router_topk > config.num_moe_experts:
        problems.append(
            f"moe_router_topk: {config.moe_router_topk} selections out of {config.num_moe_experts} real experts"
        )
    return problems


def unsupported_settings(config: Any) -> list[str]:
    """Every reason why this configuration cannot be trained with zero experts, one line each.

    Args:
        config: a configuration with the fields of :class:`ZeroExpertTransformerConfig`.

    Returns:
        ``"setting: reason; alternative"`` lines, empty when all is well. Without zero experts nothing is refused.
    """
    problems = _value_problems(config)
    if skips_experts(config):
        problems += [str(refusal) for refusal in REFUSALS if refusal.applies(config)]
    return problems


@dataclass
class _ZeroExpertSettings:
    """The fields that zero experts add to a Megatron-Core configuration."""

    num_zero_experts: int = 0
    """Z: router columns after the ``num_moe_experts`` real ones. 0 builds the stock classes."""

    zero_expert_weight: float = 2.0
    """w of the group balancing loss; the skip rate it aims at is ``w Z / (E + w Z)``."""

    zero_expert_balance_coeff: float = 0.1
    """alpha of the group balancing loss; 0 turns it off."""

    zero_expert_logit_bias: float = 0.0
    """The dial: added to the zero logits before the softmax (softmax routers) or to the zero entries of the selection
    bias (sigmoid routers). ``-inf`` masks the zero experts: the model is then its teacher."""

    zero_expert_type: str = "zero"
    """What the Z experts return: ``zero`` nothing, ``copy`` their input (the paper's control)."""

    zero_expert_renormalize: bool = False
    """Normalise the weights over the real experts that were selected (AdaMoE) instead of over all K selections."""

    dynamic_skipping_beta: float | None = None
    """Dynamic Skipping, without zero experts: drop selections with less than beta times the token's largest weight, and
    normalise over the rest. None: off; 0 drops nothing."""

    teacher_router_topk: int | None = None
    """K before ``moe_router_topk`` was lowered (NET): what :func:`masked_zero_experts` routes with."""

    def _refuse_unsupported(self) -> None:
        problems = unsupported_settings(self)
        if problems:
            raise ValueError("zero experts: " + "\n".join(problems))


@dataclass
class ZeroExpertTransformerConfig(_ZeroExpertSettings, TransformerConfig):
    """``TransformerConfig`` with zero experts.

    Raises:
        ValueError: listing every setting that zero experts cannot serve (see :func:`unsupported_settings`).
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self._refuse_unsupported()


@dataclass
class ZeroExpertMLATransformerConfig(_ZeroExpertSettings, MLATransformerConfig):
    """``MLATransformerConfig`` with zero experts; see :class:`ZeroExpertTransformerConfig`.

    Raises:
        ValueError: also for an epsilon that is not between 0 and 1, and for a fused down projection, whose weights
            have other names in a checkpoint.
    """

    latent_norm_epsilon: float | None = None
    """Epsilon of the norms of the query and key-value latents; None: ``layernorm_epsilon``, as in Megatron-Core."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.latent_norm_epsilon is not None and not 0 < self.latent_norm_epsilon < 1:
            raise ValueError(f"latent_norm_epsilon: must be between 0 and 1, got {self.latent_norm_epsilon}")
        if self.mla_down_proj_fusion:
            raise ValueError(
                "mla_down_proj_fusion: its attention gives the latent norms the epsilon of all others, and saves "
                "weights under other names than checkpoints have; leave it off"
            )
        self._refuse_unsupported()
