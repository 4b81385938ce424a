"""The configuration a model with zero experts is built from, and what it refuses.

Plain dataclass fields on subclasses of Megatron-Core's configurations, so that they survive ``dataclasses.replace``,
``asdict`` and Megatron-LM's argument handling.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

_AUX_LOSSES = ("aux_loss", "seq_aux_loss", "global_aux_loss")


def _stock_aux_loss(config: TransformerConfig) -> bool:
    kinds, coeffs = config.moe_router_load_balancing_type, config.moe_aux_loss_coeff
    kinds = [kinds] if isinstance(kinds, str) else kinds
    coeffs = coeffs if isinstance(coeffs, Sequence) else [coeffs] * len(kinds)
    return any(kind in _AUX_LOSSES and coeff for kind, coeff in zip(kinds, coeffs, strict=True))


def _uses(config: TransformerConfig, kind: str) -> bool:
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


REFUSALS: tuple[Refusal, ...] = (
    Refusal(
        "moe_aux_loss_coeff",
        _stock_aux_loss,
        "Megatron's load-balancing losses would spread the tokens evenly over real and zero experts alike",
        "set moe_aux_loss_coeff to 0 and use zero_expert_balance_coeff",
    ),
    Refusal(
        "moe_z_loss_coeff",
        lambda c: bool(c.moe_z_loss_coeff),
        "the z-loss scales with all router tokens under per-token loss, and nobody has tried it with zero experts",
        "leave moe_z_loss_coeff unset",
    ),
    Refusal(
        "moe_router_load_balancing_type=sinkhorn",
        lambda c: _uses(c, "sinkhorn"),
        "sinkhorn balances all columns of the router, zero experts included",
        "use 'none'",
    ),
    Refusal(
        "moe_router_load_balancing_type=quantile_balancing",
        lambda c: _uses(c, "quantile_balancing"),
        "quantile balancing moves a bias of every column and accepts no padding",
        "use 'none'",
    ),
    Refusal(
        "moe_expert_capacity_factor",
        lambda c: c.moe_expert_capacity_factor is not None,
        "router and dispatcher would compute different capacities (over E + Z and over E experts)",
        "leave it unset: routing is dropless",
    ),
    Refusal(
        "moe_pad_expert_input_to_capacity",
        lambda c: c.moe_pad_expert_input_to_capacity,
        "padding every expert to capacity computes the rows that skipping saves",
        "leave it off",
    ),
    Refusal(
        "moe_router_padding_for_quantization",
        lambda c: bool(c.moe_router_padding_for_quantization),
        "padding the routing map gives tokens experts they did not choose and skips the alignment of short experts",
        "leave it off: the experts pad their own input",
    ),
    Refusal(
        "moe_router_num_groups",
        lambda c: (c.moe_router_num_groups or 1) > 1,
        "grouped routing would put real and zero experts into the same groups",
        "leave it unset",
    ),
    Refusal(
        "moe_token_dispatcher_type=flex",
        lambda c: c.moe_token_dispatcher_type == "flex",
        "its DeepEP and NCCL-EP managers rebuild a full top-K and would send skipped tokens to arbitrary experts",
        "use 'alltoall' or 'allgather'",
    ),
    Refusal(
        "transformer_impl=inference_optimized",
        lambda c: c.transformer_impl == "inference_optimized",
        "its router returns K columns instead of one per expert, so zero experts cannot be told apart",
        "use 'transformer_engine' or 'local'",
    ),
    Refusal(
        "moe_router_fusion with moe_enable_routing_replay",
        lambda c: c.moe_router_fusion and c.moe_enable_routing_replay,
        "the fused router ignores recorded routing without a word",
        "turn one of the two off",
    ),
    Refusal(
        "cuda_graph_impl",
        lambda c: c.cuda_graph_impl != "none",
        "the number of dispatched rows depends on the data and is read on the host",
        "use 'none'",
    ),
    Refusal(
        "overlap_moe_expert_parallel_comm",
        lambda c: c.overlap_moe_expert_parallel_comm,
        "its schedule calls the router without the padding mask, so that padding would be counted",
        "leave it off",
    ),
    Refusal(
        "moe_layer_freq",
        lambda c: isinstance(c.moe_layer_freq, list) and all(c.moe_layer_freq),
        "a list renames every weight in checkpoints, for nothing when all layers are MoE layers",
        "use 1",
    ),
    Refusal(
        "moe_shared_expert_overlap",
        lambda c: c.moe_shared_expert_overlap,
        "the overlap has not been checked with data-dependent row counts",
        "leave it off",
    ),
    Refusal(
        "mtp_num_layers",
        lambda c: bool(c.mtp_num_layers),
        "multi-token-prediction layers have no zero experts and would be given a wider router",
        "leave it unset",
    ),
    Refusal(
        "moe_latent_size",
        lambda c: bool(c.moe_latent_size),
        "latent experts have not been checked with zero experts",
        "leave it unset",
    ),
)


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
    if config.num_zero_experts > 0:
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
    """``MLATransformerConfig`` with zero experts; see :class:`ZeroExpertTransformerConfig`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._refuse_unsupported()
