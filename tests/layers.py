"""Small MoE layers and models for tests, and the oracle of law 2: a stock layer whose extra experts are all zero."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.moe.moe_layer import MoELayer

from megatron_zeda import platform
from megatron_zeda.zero_experts import (
    ZeroExpertMLATransformerConfig,
    ZeroExpertMoELayer,
    ZeroExpertTransformerConfig,
    get_zero_expert_layer_spec,
)

E, Z, K, H, F = 8, 4, 4, 32, 16


def layer_config(**changes: Any) -> ZeroExpertTransformerConfig | ZeroExpertMLATransformerConfig:
    """A one-layer configuration at the sizes above; ``changes`` are any configuration fields."""
    settings: dict[str, Any] = {
        "num_layers": 1,
        "hidden_size": H,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "kv_channels": 8,
        "ffn_hidden_size": F,
        "moe_ffn_hidden_size": F,
        "num_moe_experts": E,
        "num_zero_experts": Z,
        "moe_router_topk": K,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "none",
        "moe_token_dispatcher_type": "alltoall",
        "add_bias_linear": False,
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "normalization": "RMSNorm",
        "qk_layernorm": True,
        "init_method_std": 0.2,  # outputs of order one, so that tolerances mean something
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        **platform.transformer_config_overrides(),
        "gradient_accumulation_fusion": False,  # adds into buffers of Megatron's DDP, which single layers are not in
    }
    settings.update(changes)
    latent = settings.get("multi_latent_attention", False)
    return (ZeroExpertMLATransformerConfig if latent else ZeroExpertTransformerConfig)(**settings)


def dynamic_layer(config: ZeroExpertTransformerConfig, is_mtp_layer: bool = False) -> MoELayer:
    """The MoE layer that our spec builds for ``config`` (the stock one when it has no zero experts)."""
    mlp = get_zero_expert_layer_spec(config).submodules.mlp
    layer = mlp(config=config, is_mtp_layer=is_mtp_layer)
    layer.set_layer_number(1)
    return layer


def dense_zero_twin(layer: ZeroExpertMoELayer, **changes: Any) -> MoELayer:
    """A stock Megatron-Core layer with E + Z real experts, the last Z of them all-zero matrices, and the same router.

    Only for expert parallelism 1; ``changes`` as in :func:`layer_config`.
    """
    wide = layer_config(num_moe_experts=E + Z, num_zero_experts=0, zero_expert_balance_coeff=0.0, **changes)
    twin = dynamic_layer(wide)
    assert type(twin) is MoELayer
    with torch.no_grad():
        for parameter in twin.experts.parameters():
            parameter.zero_()
        own, theirs = dict(layer.named_parameters()), dict(twin.named_parameters())
        for name, parameter in own.items():
            theirs[name].copy_(parameter)
        if layer.router.expert_bias is not None:
            twin.router.expert_bias.copy_(layer.router.expert_bias)
    return twin


def tokens(seq_length: int = 12, batch: int = 2, seed: int = 0, requires_grad: bool = True) -> torch.Tensor:
    """Random hidden states ``[S, B, H]``."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(seq_length, batch, H, generator=generator).requires_grad_(requires_grad)


def rows_into_experts(layer: MoELayer) -> list[int]:
    """Record the rows that enter the experts' GEMMs in every later forward pass (law 10)."""
    rows: list[int] = []
    layer.experts.register_forward_pre_hook(lambda _, inputs: rows.append(inputs[0].shape[0]))
    return rows
