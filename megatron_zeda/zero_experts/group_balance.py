"""The group balancing loss: equation 5 of the ZEDA paper (arXiv 2605.18643).

Shape suffixes: T tokens, G = E + Z experts (E real ones first, then Z zero-output ones).
"""

from __future__ import annotations

import math

import torch


def target_skip_rate(num_real_experts: int, num_zero_experts: int, zero_expert_weight: float) -> float:
    """The share of selections that the loss drives to zero experts: ``w Z / (E + w Z)``."""
    weighted = zero_expert_weight * num_zero_experts
    return weighted / (num_real_experts + weighted)


def weight_for_skip_rate(num_real_experts: int, num_zero_experts: int, skip_rate: float) -> float:
    """The zero-group weight ``w`` whose :func:`target_skip_rate` is ``skip_rate`` (0 < skip_rate < 1)."""
    if not 0.0 < skip_rate < 1.0:
        raise ValueError(f"skip_rate must lie strictly between 0 and 1, got {skip_rate}")
    return num_real_experts * skip_rate / (num_zero_experts * (1.0 - skip_rate))


# How far the controller may take w from where it began: a target out of reach must not drive it to infinity, from where
# it would take as long to come back.
_WIDEST = 32.0
# What a step can tell the controller at most.
_LARGEST_DIFFERENCE = 0.05


def controlled_weight(weight: float, *, initial: float, target: float, measured: float, gain: float) -> float:
    """The next w of an integral controller: ``log w += gain (target - measured)``, the difference cut to 5 points.

    It is cut because a new student begins far below its target whatever w is: what such steps added up to would have
    to be taken back later, by a router that follows ever more slowly while the learning rate falls.

    The router needs tens of steps to follow w, so the gain is small: where the rate r moves by ``r (1 - r)`` per unit
    of log w, with a delay of ``tau`` steps, nothing overshoots below ``1 / (4 tau r (1 - r))`` (tau 50, r 0.5: 0.02).

    Args:
        weight: w of the step that was measured.
        initial: w at the start; the result is between 1/32 and 32 times it.
        target: the skip rate that is wanted.
        measured: that of the step; NaN (no token) leaves w as it is.
        gain: change of log w per step and unit of skip rate.
    """
    if math.isnan(measured):
        return weight
    difference = min(max(target - measured, -_LARGEST_DIFFERENCE), _LARGEST_DIFFERENCE)
    moved = weight * math.exp(gain * difference)
    return min(max(moved, initial / _WIDEST), initial * _WIDEST)


def group_balancing_loss(
    probs: torch.Tensor,
    routing_map: torch.Tensor,
    *,
    num_real_experts: int,
    topk: int,
    zero_expert_weight: float,
    coeff: float,
    token_counts: torch.Tensor | None = None,
    num_tokens: torch.Tensor | float | None = None,
) -> torch.Tensor:
    """Balance the real experts as one group against the zero experts as another.

    .. math::
        L = \\alpha \\frac{E + wZ}{K} \\left( \\frac{f_E P_E}{E} + \\frac{f_Z P_Z}{wZ} \\right)

    ``f`` is the number of selections per token that fell into a group (``f_E + f_Z = K``) and carries no gradient;
    ``P`` is the router's mean probability of a group. The routing among the real experts is left alone.

    Over a group of ranks, pass the group's ``token_counts`` and ``num_tokens``: ``f`` is then the group's, and ``P``
    is this rank's part of the group's mean (its own sum over the *group's* token count). The values of the ranks add
    up to the loss of the whole group, exactly, however unevenly the tokens are spread. A product of two local means
    would not.

    Args:
        probs: ``[T, G]`` full score distribution (rows sum to 1); rows of padding tokens are zero.
        routing_map: ``[T, G]`` bool, the selections that were actually taken; rows of padding tokens are False.
        num_real_experts: E; the columns after it are the zero experts.
        topk: K.
        zero_expert_weight: w, the weight of the zero group (2 aims at half of the selections when Z = E / 2).
        coeff: alpha.
        token_counts: ``[G]`` selections per expert over the whole group; default: those of ``routing_map``.
        num_tokens: number of valid tokens of the whole group; default: T, which is right without padding.

    Returns:
        The loss, a scalar in fp32. Without any token it is zero (and still differentiable).

    Raises:
        ValueError: if the shapes do not fit together or there is no zero expert.
    """
    num_zero_experts = probs.shape[-1] - num_real_experts
    if probs.shape != routing_map.shape or probs.dim() != 2:
        raise ValueError(
            f"probs {tuple(probs.shape)} and routing_map {tuple(routing_map.shape)} must both be [T, E + Z]"
        )
    if num_zero_experts <= 0:
        raise ValueError(f"no zero expert: {probs.shape[-1]} columns for {num_real_experts} real experts")
    if zero_expert_weight <= 0:
        raise ValueError(f"zero_expert_weight must be positive, got {zero_expert_weight}")
    if token_counts is None:
        token_counts = routing_map.sum(dim=0)
    return loss_of_group_counts(
        probs,
        num_real_selections=token_counts[:num_real_experts].sum(),
        num_zero_selections=token_counts[num_real_experts:].sum(),
        num_tokens=torch.as_tensor(probs.shape[0] if num_tokens is None else num_tokens, device=probs.device),
        num_real_experts=num_real_experts,
        topk=topk,
        zero_expert_weight=zero_expert_weight,
        coeff=coeff,
    )


def loss_of_group_counts(
    probs: torch.Tensor,
    *,
    num_real_selections: torch.Tensor,
    num_zero_selections: torch.Tensor,
    num_tokens: torch.Tensor,
    num_real_experts: int,
    topk: int,
    zero_expert_weight: float,
    coeff: float,
) -> torch.Tensor:
    """:func:`group_balancing_loss` from the three scalars that it needs of the routing.

    On a GPU an MoE layer takes milliseconds and each of these small operations microseconds: there are few on purpose.

    Args:
        probs: ``[T, G]``.
        num_real_selections, num_zero_selections, num_tokens: scalars, of the whole group of ranks.
        num_real_experts, topk, zero_expert_weight, coeff: see there.
    """
    num_zero_experts = probs.shape[-1] - num_real_experts
    weighted_zero = zero_expert_weight * num_zero_experts
    scale = coeff * (num_real_experts + weighted_zero) / topk
    with torch.no_grad():
        # f / T of each group: one division by T is that of f, the other that of P.
        tokens_squared = num_tokens.clamp(min=1).double().square()
        real_weight = num_real_selections * (scale / num_real_experts) / tokens_squared
        zero_weight = num_zero_selections * (scale / weighted_zero) / tokens_squared
        weights_G = torch.cat([real_weight.expand(num_real_experts), zero_weight.expand(num_zero_experts)])
    return torch.dot(probs.float().sum(dim=0), weights_G.float())
