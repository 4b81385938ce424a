"""A Megatron-Core router with extra columns for zero experts.

Shape suffixes: T tokens of this rank, G = E + Z router columns (E real experts, then Z zero experts), K selections.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from megatron.core.transformer.moe.moe_utils import (
    MoEAuxLossAutoScaler,
    apply_router_token_dropping,
    topk_routing_with_score_function,
)
from megatron.core.transformer.moe.router import TopKRouter

from megatron_zeda.zero_experts.config import ZeroExpertTransformerConfig, normalizes_weights
from megatron_zeda.zero_experts.group_balance import loss_of_group_counts
from megatron_zeda.zero_experts.statistics import RouterCounts

_loss_tokens: torch.Tensor | float | None = None


def set_loss_tokens(num_tokens_per_micro_step: torch.Tensor | float | None) -> None:
    """Tell the routers how many tokens carry loss, so that alpha means the same whatever the prompt/response ratio.

    Needed with ``calculate_per_token_loss=True`` only. There ``finalize_model_grads`` divides every gradient by the
    number of tokens the loss function counted; the balancing loss must be multiplied by that number first, and it is
    not the number of tokens the router sees when prompts carry no loss. The value is constant during a step, so that a
    recomputed forward pass (which may run while another micro-batch is in flight) uses the same one.

    Args:
        num_tokens_per_micro_step: loss tokens of the global batch divided by the number of micro-batches (of those that
            hold a token on some rank), the same on every rank; None forgets it.
    """
    global _loss_tokens
    _loss_tokens = num_tokens_per_micro_step


class ZeroExpertRouter(TopKRouter):
    """``TopKRouter`` over E + Z columns, with the group balancing loss and skip statistics.

    Scores, the top-K choice and the normalisation of the weights run over all columns (the weights are not renormalised
    once zero experts are dropped). A selection bias is the teacher's, with Z more entries, and stays frozen.

    The stock class does all of this when it is built for E + Z experts; the layer around it keeps E (see
    :class:`~megatron_zeda.zero_experts.layer.ZeroExpertMoELayer`).
    """

    def __init__(
        self, config: ZeroExpertTransformerConfig, pg_collection: Any = None, is_mtp_layer: bool = False
    ) -> None:
        wide = copy.copy(config)  # not dataclasses.replace: E + Z need not be divisible by anything
        wide.num_moe_experts = config.num_moe_experts + config.num_zero_experts
        super().__init__(config=wide, pg_collection=pg_collection, is_mtp_layer=is_mtp_layer)
        self.num_real_experts: int = config.num_moe_experts
        self.zero_logit_bias: float = config.zero_expert_logit_bias
        self.zero_expert_weight: float = config.zero_expert_weight
        self.renormalize: bool = config.zero_expert_renormalize
        # finalize_model_grads would move the bias of all E + Z columns towards an even load.
        self.frozen_expert_bias = True
        self.counts = RouterCounts()
        self.counting = True

    def routing(
        self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Choose K of the E + Z experts for every token.

        Args:
            logits: ``[S, B, G]``.
            padding_mask: ``[S, B]``, True for padding (as in Megatron's code; its docstrings say the opposite).

        Returns:
            ``probs [T, G]`` with the weights of the selections and zeros elsewhere, and ``routing_map [T, G]`` bool.
        """
        logits_TG = logits.reshape(-1, self.num_experts)
        padding_T = None if padding_mask is None else padding_mask.reshape(-1).bool()
        logits_TG, selection_bias_G = self._turn_dial(logits_TG)
        probs_TG, routing_map_TG = topk_routing_with_score_function(
            logits_TG,
            self.topk,
            use_pre_softmax=self.config.moe_router_pre_softmax,
            scaling_factor=self.config.moe_router_topk_scaling_factor,
            score_function=self.score_function,
            expert_bias=selection_bias_G,
            fused=self.config.moe_router_fusion,
            router_replay=self.router_replay,
        )
        if self.renormalize:
            real_TG = routing_map_TG.clone()
            real_TG[:, self.num_real_experts :] = False
            probs_TG = renormalized(probs_TG, real_TG)
        if self._counts_this_pass():
            probs_TG = self._balance_and_count(probs_TG, logits_TG, routing_map_TG, padding_T)
        if self.config.moe_expert_capacity_factor is not None:
            probs_TG, routing_map_TG = self._drop_over_capacity(probs_TG, routing_map_TG)
        return probs_TG, routing_map_TG

    def _counts_this_pass(self) -> bool:
        """A recomputed layer routes twice, first without gradients: only the second pass counts. Evaluation counts."""
        return self.counting and (torch.is_grad_enabled() or not self.training)

    def _turn_dial(self, logits_TG: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Apply ``zero_logit_bias``: to the logits of a softmax router, to the selection alone of any other."""
        bias_G: torch.Tensor | None = self.expert_bias
        if self.zero_logit_bias == 0.0:
            return logits_TG, bias_G
        dial_G = logits_TG.new_zeros(self.num_experts, dtype=torch.float32)
        dial_G[self.num_real_experts :] = self.zero_logit_bias
        if self.score_function == "softmax":
            return logits_TG + dial_G.to(logits_TG.dtype), bias_G
        return logits_TG, dial_G if bias_G is None else bias_G + dial_G

    def _balance_and_count(
        self,
        probs_TG: torch.Tensor,
        logits_TG: torch.Tensor,
        routing_map_TG: torch.Tensor,
        padding_T: torch.Tensor | None,
    ) -> torch.Tensor:
        """Count selections, and attach the losses: their gradients join in the backward pass."""
        with torch.no_grad():
            skipped_TZ = routing_map_TG[:, self.num_real_experts :]
            num_valid = logits_TG.new_full((), logits_TG.shape[0], dtype=torch.int64)
            if padding_T is not None:
                skipped_TZ, num_valid = skipped_TZ & ~padding_T[:, None], (~padding_T).sum()
            local = torch.stack([skipped_TZ.sum(), num_valid])
            self.counts.add_selections(local)
        if not self.training:
            return probs_TG

        group = local
        if self.tp_dp_cp_group.size() > 1:
            group = local.clone()
            torch.distributed.all_reduce(group, group=self.tp_dp_cp_group)
        num_zero_selections, num_tokens = group.unbind()
        coeff, z_coeff = self.config.zero_expert_balance_coeff, self.config.moe_z_loss_coeff or 0.0
        with torch.set_grad_enabled(coeff > 0.0):
            loss = loss_of_group_counts(
                self._score_distribution(logits_TG, padding_T),
                num_real_selections=num_tokens * self.topk - num_zero_selections,
                num_zero_selections=num_zero_selections,
                num_tokens=num_tokens,
                num_real_experts=self.num_real_experts,
                topk=self.topk,
                zero_expert_weight=self.zero_expert_weight,
                coeff=1.0,
            )
        self.counts.add_balance_loss(loss.detach(), num_tokens)
        if coeff == 0.0 and z_coeff == 0.0:
            return probs_TG
        scale = self._gradient_scale()
        total = (coeff * scale) * loss
        if z_coeff != 0.0:
            total = total + (z_coeff * scale) * self._z_loss(logits_TG, padding_T, num_tokens)
        return MoEAuxLossAutoScaler.apply(probs_TG, total)

    def _z_loss(
        self, logits_TG: torch.Tensor, padding_T: torch.Tensor | None, num_tokens: torch.Tensor
    ) -> torch.Tensor:
        """This rank's part of the group's z-loss, the mean over tokens of the squared log-sum-exp of all logits.

        Upstream multiplies its own by the tokens the router sees, which prompts inflate under per-token loss.
        """
        squares_T = torch.logsumexp(logits_TG.float(), dim=-1).square()
        if padding_T is not None:
            squares_T = squares_T.masked_fill(padding_T, 0.0)
        loss = squares_T.sum() / num_tokens.clamp(min=1)
        num_layers = self.config.num_layers + (self.config.mtp_num_layers or 0)
        # The tracker has one way to reduce a metric, that of its last caller: the same here as in static layers.
        get_moe_metrics_tracker().record(
            "z_loss",
            loss * self.tp_dp_cp_group.size(),
            self.layer_number,
            num_layers,
            avg_group=self.tp_dp_cp_group,
        )
        return loss

    def _drop_over_capacity(
        self, probs_TG: torch.Tensor, routing_map_TG: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Drop what exceeds an expert's capacity, which is that of the static model: over real columns only.

        A dropped selection is not a skipped one: statistics and loss are about what the router chose.
        """
        real = slice(None, self.num_real_experts)
        probs_TE, routing_map_TE = apply_router_token_dropping(
            probs_TG[:, real],
            routing_map_TG[:, real],
            router_topk=self.topk,
            capacity_factor=self.config.moe_expert_capacity_factor,
            drop_policy=self.config.moe_token_drop_policy,
        )
        zero = slice(self.num_real_experts, None)
        return (
            torch.cat([probs_TE, probs_TG[:, zero]], dim=1),
            torch.cat([routing_map_TE, routing_map_TG[:, zero]], dim=1),
        )

    def _score_distribution(self, logits_TG: torch.Tensor, padding_T: torch.Tensor | None) -> torch.Tensor:
        """The full score distribution ``[T, G]`` in fp32: rows sum to 1, those of padding tokens are zero."""
        if self.score_function == "softmax":
            scores_TG = torch.softmax(logits_TG, dim=-1, dtype=torch.float32)
        else:
            score = torch.sigmoid if self.score_function == "sigmoid" else _sqrt_softplus
            scores_TG = score(logits_TG.float())
            scores_TG = scores_TG / (scores_TG.sum(dim=-1, keepdim=True) + 1e-20)
        return scores_TG if padding_T is None else scores_TG.masked_fill(padding_T[:, None], 0.0)

    def _gradient_scale(self) -> torch.Tensor | float:
        """What makes the gradients of all ranks and micro-batches add up to the mean of the micro-batches' losses.

        Each rank holds its part of the group's loss. With per-token loss Megatron sums gradients over ranks and
        micro-batches and divides by the number of loss tokens; otherwise it divides by the number of micro-batches,
        sums over the tensor- and context-parallel ranks and averages over the data-parallel ones.
        """
        if not self.config.calculate_per_token_loss:
            return self.tp_dp_cp_group.size() / self.tp_cp_group.size()
        if _loss_tokens is None:
            raise RuntimeError(
                "calculate_per_token_loss=True: before each step call megatron_zeda.zero_experts.set_loss_tokens("
                "loss tokens of the global batch / number of micro-batches), or the length of the prompts would scale "
                "the balancing loss"
            )
        return _loss_tokens

    def _apply_expert_bias(self, routing_map: torch.Tensor, padding_mask: torch.Tensor | None = None) -> None:
        """Nothing: the bias is frozen. (Upstream counts here, and mixes up ``[T, E]`` and ``[T]`` under padding.)"""


class DynamicSkippingRouter(ZeroExpertRouter):
    """A static model's router that drops selections of small weight: Dynamic Skipping, without training.

    Of a token's K selections those remain whose weight is at least beta times its largest one, as in "Not All Experts
    are Equal" (arXiv 2402.14800) for K = 2; where the model normalises its weights, they are normalised over the rest.
    Nothing is balanced. Statistics are those of zero experts: what is dropped counts as skipped.
    """

    def __init__(self, config: ZeroExpertTransformerConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        assert config.dynamic_skipping_beta is not None  # the spec chooses this class by it
        self.beta: float = config.dynamic_skipping_beta
        self.normalizes = normalizes_weights(config)
        self.ratios: WeightRatios | None = None

    def routing(
        self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As :meth:`ZeroExpertRouter.routing`, of E columns; fewer than K True per row."""
        logits_TE = logits.reshape(-1, self.num_experts)
        probs_TE, routing_map_TE = topk_routing_with_score_function(
            logits_TE,
            self.topk,
            use_pre_softmax=self.config.moe_router_pre_softmax,
            scaling_factor=self.config.moe_router_topk_scaling_factor,
            score_function=self.score_function,
            expert_bias=self.expert_bias,
            fused=self.config.moe_router_fusion,
            router_replay=self.router_replay,
        )
        largest_T1 = probs_TE.detach().amax(dim=-1, keepdim=True)
        valid_T = None if padding_mask is None else ~padding_mask.reshape(-1).bool()
        if self.ratios is not None:
            self.ratios.add((probs_TE / largest_T1)[routing_map_TE].view(-1, self.topk), valid_T)
        beta = 0.0 if self.zero_logit_bias == float("-inf") else self.beta
        kept_TE = routing_map_TE & (probs_TE >= beta * largest_T1)
        if self._counts_this_pass():
            dropped_T = (routing_map_TE & ~kept_TE).sum(dim=-1)
            num_valid = dropped_T.new_full((), dropped_T.shape[0]) if valid_T is None else valid_T.sum()
            if valid_T is not None:
                dropped_T = dropped_T * valid_T
            self.counts.add_selections(torch.stack([dropped_T.sum(), num_valid]))
        return renormalized(probs_TE, kept_TE) if self.normalizes else probs_TE * kept_TE, kept_TE


class WeightRatios:
    """How often a selection has which share of its token's largest weight: a histogram of one or more routers.

    ``counts[i]`` is the number of ratios in ``[i, i + 1) / BINS``; the last bin holds 1 too.
    """

    BINS = 1 << 16

    def __init__(self, device: torch.device) -> None:
        self.counts = torch.zeros(self.BINS, dtype=torch.float64, device=device)

    def add(self, ratios_TK: torch.Tensor, valid_T: torch.Tensor | None) -> None:
        """Count the ratios of the tokens that are valid; None: of all."""
        chosen = ratios_TK if valid_T is None else ratios_TK[valid_T]
        bins = (chosen.double().flatten() * self.BINS).long().clamp(max=self.BINS - 1)
        self.counts.scatter_add_(0, bins, torch.ones_like(bins, dtype=torch.float64))

    def beta_for(self, skip_rate: float) -> float:
        """The beta below which nearly a share of ``skip_rate`` of all selections lies.

        Never the largest of a token: beta stays below 1. Of all that drop the same, the middle.
        """
        below = self.counts.cumsum(0)
        dropped = torch.cat([below.new_zeros(1), below[:-1]])  # by beta = i / BINS
        closest = dropped[(dropped - skip_rate * below[-1]).abs().argmin()].contiguous()
        first, last = (int(torch.searchsorted(dropped, closest, right=right)) for right in (False, True))
        return (first + last - 1) / 2 / self.BINS


def renormalized(probs_TG: torch.Tensor, kept_TG: torch.Tensor) -> torch.Tensor:
    """Give the weight of what is not kept to the rest, in proportion; a token that keeps nothing gets weights of 0.

    Args:
        probs_TG: ``[T, G]`` weights of the selections, zeros elsewhere.
        kept_TG: ``[T, G]`` bool.

    Returns:
        ``[T, G]``; rows that keep anything have the sum they had.
    """
    kept_probs_TG = probs_TG * kept_TG
    kept_T1 = kept_probs_TG.sum(dim=-1, keepdim=True)
    # Not the smallest number there is: the quotient would be infinite, and 0 times that is none.
    return kept_probs_TG * (probs_TG.sum(dim=-1, keepdim=True) / kept_T1.clamp(min=1e-30))


class StaticRouter(TopKRouter):
    """The stock router with a frozen selection bias, for layers that keep their E experts."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.frozen_expert_bias = True

    def _apply_expert_bias(self, routing_map: torch.Tensor, padding_mask: torch.Tensor | None = None) -> None:
        """Nothing; see :class:`ZeroExpertRouter`."""


def _sqrt_softplus(logits: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.softplus(logits).sqrt()


def zero_expert_routers(model: torch.nn.Module | Iterable[torch.nn.Module]) -> list[ZeroExpertRouter]:
    """The zero-expert routers of a model or of a list of model chunks, in layer order per chunk."""
    chunks = [model] if isinstance(model, torch.nn.Module) else model
    return [module for chunk in chunks for module in chunk.modules() if isinstance(module, ZeroExpertRouter)]


def set_zero_expert_weight(model: torch.nn.Module | Iterable[torch.nn.Module], weight: float) -> None:
    """Let the balancing loss of all routers go on with another w; between steps only, and the same on every rank."""
    if not weight > 0.0:
        raise ValueError(f"zero_expert_weight must be positive, got {weight}")
    for router in zero_expert_routers(model):
        router.zero_expert_weight = weight


@contextmanager
def _topk_of_teacher(model: torch.nn.Module | Iterable[torch.nn.Module]) -> Iterator[None]:
    """Within the block a model whose K was lowered routes with the K it had before (``teacher_router_topk``)."""
    chunks = [model] if isinstance(model, torch.nn.Module) else model
    modules: list[Any] = [module for chunk in chunks for module in chunk.modules() if hasattr(module, "config")]
    modules = [module for module in modules if getattr(module.config, "teacher_router_topk", None) is not None]
    configs = {id(module.config): module.config for module in modules}
    # Everybody who keeps K: routers, the configuration that dispatchers read, and the flex dispatcher's managers.
    managers = [getattr(getattr(module, "token_dispatcher", None), "_comm_manager", None) for module in modules]
    keepers: list[tuple[Any, str]] = [(config, "moe_router_topk") for config in configs.values()]
    keepers += [(module, "topk") for module in modules if isinstance(module, TopKRouter)]
    keepers += [(manager, "router_topk") for manager in managers if hasattr(manager, "router_topk")]
    before = [getattr(keeper, name) for keeper, name in keepers]
    if before:
        lowered, teacher = before[0], next(iter(configs.values())).teacher_router_topk
        for (keeper, name), value in zip(keepers, before, strict=True):
            setattr(keeper, name, value * teacher // lowered)  # managers count every tensor-parallel copy of an expert
    try:
        yield
    finally:
        for (keeper, name), value in zip(keepers, before, strict=True):
            setattr(keeper, name, value)


@contextmanager
def masked_zero_experts(model: torch.nn.Module | Iterable[torch.nn.Module]) -> Iterator[None]:
    """Within the block no zero expert of ``model`` can be chosen: it computes what its teacher computes (law 1).

    Dynamic Skipping drops nothing there, and a model whose K was lowered (NET) has the K of its teacher. Such a pass is
    the teacher's, not the student's: nothing is counted, and no balancing loss is attached.
    """
    routers = zero_expert_routers(model)
    before = [(router.zero_logit_bias, router.counting) for router in routers]
    for router in routers:
        router.zero_logit_bias, router.counting = float("-inf"), False
    try:
        with _topk_of_teacher(model):
            yield
    finally:
        for router, (bias, counting) in zip(routers, before, strict=True):
            router.zero_logit_bias, router.counting = bias, counting
