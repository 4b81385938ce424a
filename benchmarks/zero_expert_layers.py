"""The compared MoE layers: dynamic, stock and naive, at the shapes of real models and with the same weights."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

from megatron_zeda import platform
from megatron_zeda.zero_experts import (
    ZeroExpertMoELayer,
    ZeroExpertRouter,
    ZeroExpertTransformerConfig,
    draw_zero_rows,
    get_zero_expert_layer_spec,
    zero_expert_routers,
)

SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-30b-a3b": {
        "hidden_size": 2048,
        "moe_ffn_hidden_size": 768,
        "num_moe_experts": 128,
        "num_zero_experts": 64,
        "moe_router_topk": 8,
    },
    "glm-4.7-flash": {
        "hidden_size": 2048,
        "moe_ffn_hidden_size": 1536,
        "num_moe_experts": 64,
        "num_zero_experts": 32,
        "moe_router_topk": 4,
        "moe_shared_expert_intermediate_size": 1536,
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_topk_scaling_factor": 1.8,
    },
    "tiny": {  # for tests
        "hidden_size": 64,
        "moe_ffn_hidden_size": 32,
        "num_moe_experts": 8,
        "num_zero_experts": 4,
        "moe_router_topk": 4,
        "moe_shared_expert_intermediate_size": 32,
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
    },
}


def fused_kernels() -> dict[str, Any]:
    """The fast path of this machine: Transformer Engine's where it is there, else Megatron-Core's own modules."""
    overrides = platform.transformer_config_overrides()
    if platform.have_transformer_engine():
        overrides |= {"moe_grouped_gemm": True, "moe_permute_fusion": True, "bias_activation_fusion": True}
    return overrides


def layer_config(shape: str, **changes: Any) -> ZeroExpertTransformerConfig:
    """A configuration of one layer of ``shape`` in bf16, with the router in fp32; ``changes`` are further fields."""
    settings: dict[str, Any] = {
        "num_layers": 1,
        "num_attention_heads": 16,
        "ffn_hidden_size": SHAPES[shape]["moe_ffn_hidden_size"],
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "none",
        "moe_token_dispatcher_type": "alltoall",
        "add_bias_linear": False,
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "normalization": "RMSNorm",
        "bf16": True,
        "params_dtype": torch.bfloat16,
        "perform_initialization": False,  # dynamic_layer draws the weights, and the others share them
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        **fused_kernels(),
    }
    return ZeroExpertTransformerConfig(**(settings | SHAPES[shape] | changes))


def build_layer(config: ZeroExpertTransformerConfig, device: torch.device) -> MoELayer:
    """The MoE layer our spec builds: the stock class without zero experts."""
    layer = get_zero_expert_layer_spec(config).submodules.mlp(config=config)
    layer.set_layer_number(1)
    return layer.to(device).train()


def dynamic_layer(shape: str, device: torch.device, **changes: Any) -> ZeroExpertMoELayer:
    """A dynamic layer with random weights; the zero rows of its router are drawn as injection draws them."""
    config = layer_config(shape, **changes)
    layer = build_layer(config, device)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.02)
        gate, num_real = layer.router.weight, config.num_moe_experts
        gate[num_real:] = draw_zero_rows(gate[:num_real].cpu(), config.num_zero_experts, seed=0, name="router")
        if layer.router.expert_bias is not None:
            layer.router.expert_bias.zero_()
    return layer


def stock_layer(dynamic: ZeroExpertMoELayer, shape: str, device: torch.device, **changes: Any) -> MoELayer:
    """Megatron-Core's static layer with the same (not copied) experts and the real rows of the same router."""
    layer = build_layer(layer_config(shape, num_zero_experts=0, zero_expert_balance_coeff=0.0, **changes), device)
    layer.experts, layer.shared_experts = dynamic.experts, dynamic.shared_experts
    _copy_router(layer, dynamic, layer.config.num_moe_experts)
    return layer


def dense_zeros_layer(dynamic: ZeroExpertMoELayer, shape: str, device: torch.device) -> MoELayer:
    """A stock layer with E + Z experts: the dynamic layer's E (not copied), then Z all-zero ones, which it computes."""
    num_real, num_zero = dynamic.config.num_moe_experts, dynamic.config.num_zero_experts
    config = layer_config(shape, num_moe_experts=num_real + num_zero, num_zero_experts=0, zero_expert_balance_coeff=0.0)
    layer = build_layer(config, device)
    with torch.no_grad():
        for parameter in layer.experts.parameters():
            parameter.zero_()
    if hasattr(layer.experts, "local_experts"):
        for index in range(num_real):
            layer.experts.local_experts[index] = dynamic.experts.local_experts[index]
    else:  # grouped GEMM: one parameter per expert
        for linear in ("linear_fc1", "linear_fc2"):
            for index in range(num_real):
                weight = getattr(getattr(dynamic.experts, linear), f"weight{index}")
                getattr(layer.experts, linear).register_parameter(f"weight{index}", weight)
    layer.shared_experts = dynamic.shared_experts
    _copy_router(layer, dynamic, num_real + num_zero)
    return layer


def fp8_layer(dynamic: ZeroExpertMoELayer, shape: str, device: torch.device, recipe: str) -> ZeroExpertMoELayer:
    """A dynamic layer that computes in FP8, with (copies of) the same weights."""
    layer = dynamic_layer(shape, device, fp8="hybrid", fp8_recipe=recipe)
    weights = dict(dynamic.named_parameters())
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            parameter.copy_(weights[name])
    return layer


def naive_layer(dynamic: ZeroExpertMoELayer, shape: str, device: torch.device) -> ZeroExpertMoELayer:
    """The shortest way to zero experts: slice the router's output and keep the stock dispatcher.

    The permutation is the unfused one: given the stock count, the fused kernels read rows that nobody wrote.
    """
    layer = build_layer(layer_config(shape, moe_permute_fusion=False), device)
    layer.experts, layer.shared_experts = dynamic.experts, dynamic.shared_experts
    _copy_router(layer, dynamic, dynamic.router.num_experts)
    ours = layer.token_dispatcher
    layer.token_dispatcher = MoEAlltoAllTokenDispatcher(
        layer.num_local_experts,
        layer.local_expert_indices,
        config=layer.config,
        pg_collection=_Groups(ours.ep_group, ours.tp_group, ours.tp_ep_group),
    )
    return layer


class _Groups:
    """The process groups that a dispatcher is built from."""

    def __init__(self, ep: Any, expt_tp: Any, tp_ep: Any) -> None:
        self.ep, self.expt_tp, self.tp_ep = ep, expt_tp, tp_ep


def _copy_router(layer: MoELayer, source: ZeroExpertMoELayer, columns: int) -> None:
    with torch.no_grad():
        layer.router.weight.copy_(source.router.weight[:columns])
        if source.router.expert_bias is not None:
            layer.router.expert_bias.copy_(source.router.expert_bias[:columns])


@torch.no_grad()
def turn_dial(router: ZeroExpertRouter, hidden: torch.Tensor, skip_rate: float, group: Any = None) -> None:
    """Set a router's dial so that ``skip_rate`` of its selections for ``hidden`` are zero experts.

    Args:
        router: its ``zero_logit_bias`` is changed, its counts are not.
        hidden: ``[S, B, H]``, the router's input on this rank.
        skip_rate: 0 masks the zero experts; otherwise the dial is found by bisection.
        group: ranks whose tokens count together.
    """
    if skip_rate == 0.0:
        router.zero_logit_bias = float("-inf")
        return
    logits = router.gating(hidden)
    counting, router.counting = router.counting, False
    low, high = -64.0, 64.0
    for _ in range(40):
        router.zero_logit_bias = (low + high) / 2
        _, routing_map = router.routing(logits)
        counts = torch.stack([routing_map[:, router.num_real_experts :].sum(), routing_map.sum()])
        if group is not None:
            torch.distributed.all_reduce(counts, group=group)
        if int(counts[0]) < skip_rate * int(counts[1]):
            low = router.zero_logit_bias
        else:
            high = router.zero_logit_bias
    router.counting = counting


def turn_dials(model: torch.nn.Module, forward: Any, skip_rate: float) -> None:
    """Set every dial of a model: during one pass each router sees the input that the dials before it make."""
    hooks = [
        router.register_forward_pre_hook(lambda router, inputs: turn_dial(router, inputs[0], skip_rate))
        for router in zero_expert_routers(model)
    ]
    with torch.no_grad():
        forward()
    for hook in hooks:
        hook.remove()
