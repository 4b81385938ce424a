"""What a layer of each method computes, in float64, one expert after the other: the oracle of its tests."""

from __future__ import annotations

from typing import Any

import torch
from forced_routing import expert_parameters
from layers import E, F, K, dynamic_layer, layer_config
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import Tensor

SCORES: dict[str, dict[str, Any]] = {
    "softmax": {},
    "not normalised": {"moe_router_pre_softmax": True, "moe_router_topk_scaling_factor": 3.0},
    "sigmoid": {
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_topk_scaling_factor": 1.8,
    },
}
BETA = 0.6
METHODS: dict[str, dict[str, Any]] = {
    "adamoe": {"zero_expert_renormalize": True},
    "copy": {"zero_expert_type": "copy"},
    "dynamic_skipping": {"num_zero_experts": 0, "dynamic_skipping_beta": BETA},
    "net": {"num_zero_experts": 0, "moe_router_topk": K // 2, "teacher_router_topk": K},
}


# AdaMoE is for models that normalise their weights.
PAIRS = [
    (method, scores) for method in METHODS for scores in SCORES if (method, scores) != ("adamoe", "not normalised")
]


def build(method: str, **changes: Any) -> MoELayer:
    """The layer of a method; a selection bias, if it has one, is not 0."""
    layer = dynamic_layer(layer_config(zero_expert_balance_coeff=0.0, **METHODS[method] | changes))
    if layer.router.expert_bias is not None:
        layer.router.expert_bias.copy_(torch.linspace(-0.2, 0.2, layer.router.weight.shape[0]))
    return layer


def equation(
    method: str, layer: MoELayer, x_TH: Tensor, gate_GH: Tensor, routing_map_TG: Tensor | None = None
) -> Tensor:
    """The output of a method's layer.

    Args:
        method: one of :data:`METHODS`.
        layer: whose experts compute.
        x_TH: hidden states, float64.
        gate_GH: the router's weight, float64.
        routing_map_TG: the selections, where they are not to be made here: a router that computes with fewer bits
            takes another one of two that are nearly alike.
    """
    config, router = layer.config, layer.router
    logits_TG = x_TH @ gate_GH.T
    if config.moe_router_score_function == "sigmoid":
        scores_TG = logits_TG.sigmoid()
        ranked_TG = scores_TG + router.expert_bias.to(scores_TG)
    else:
        scores_TG = ranked_TG = logits_TG.softmax(-1)
    if routing_map_TG is None:
        routing_map_TG = torch.zeros_like(scores_TG).scatter(1, ranked_TG.topk(router.topk).indices, 1.0) > 0
        if method == "dynamic_skipping":
            chosen_TG = scores_TG * routing_map_TG
            routing_map_TG = routing_map_TG & (chosen_TG >= BETA * chosen_TG.amax(-1, keepdim=True))
    weights_TG = scores_TG * routing_map_TG
    if method == "adamoe":
        weights_TG = weights_TG * (torch.arange(weights_TG.shape[1], device=x_TH.device) < E)
    if not config.moe_router_pre_softmax:
        weights_TG = weights_TG / weights_TG.sum(-1, keepdim=True).clamp(min=1e-30)
    weights_TG = weights_TG * (config.moe_router_topk_scaling_factor or 1.0)
    out_TH = torch.zeros_like(x_TH)
    first, second = (
        [p.detach().to(x_TH) for p in expert_parameters(layer, name)] for name in ("linear_fc1", "linear_fc2")
    )
    for expert in range(E):
        gate, up = (x_TH @ first[expert].T).split(F, dim=-1)
        hidden_TF = torch.nn.functional.silu(gate) * up
        out_TH = out_TH + weights_TG[:, expert, None] * (hidden_TF @ second[expert].T)
    if method == "copy":
        out_TH = out_TH + weights_TG[:, E:].sum(-1, keepdim=True) * x_TH
    return out_TH
