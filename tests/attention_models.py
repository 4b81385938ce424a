"""Small models with grouped-query and with multi-latent attention, for the tests of the core attention."""

from __future__ import annotations

import zlib
from typing import Any

import torch
from layers import layer_config
from megatron.core.models.gpt import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams

from megatron_zeda.zero_experts import (
    ZeroExpertMLATransformerConfig,
    ZeroExpertTransformerConfig,
    get_zero_expert_layer_spec,
)

VOCAB = 64
# Values narrower than keys, which stock Megatron-Core pads in packs and nowhere else.
LATENT = {
    "q_lora_rank": 12,
    "kv_lora_rank": 10,
    "qk_head_dim": 8,
    "qk_pos_emb_head_dim": 4,
    "v_head_dim": 6,
    "rope_type": "rope",
}
_SHARED = (
    "hidden_size",
    "num_attention_heads",
    "kv_channels",
    "ffn_hidden_size",
    "moe_ffn_hidden_size",
    "num_moe_experts",
    "num_zero_experts",
    "moe_router_topk",
    "moe_router_dtype",
    "moe_router_load_balancing_type",
    "moe_token_dispatcher_type",
    "add_bias_linear",
    "gated_linear_unit",
    "activation_func",
    "normalization",
    "qk_layernorm",
    "init_method_std",
    "hidden_dropout",
    "attention_dropout",
    "transformer_impl",
    "moe_permute_fusion",
    "moe_grouped_gemm",
    "persist_layer_norm",
    "gradient_accumulation_fusion",
    "use_cpu_initialization",
    "masked_softmax_fusion",
    "bias_activation_fusion",
    "bias_dropout_fusion",
    "apply_rope_fusion",
)


def attention_config(latent: bool, **changes: Any) -> ZeroExpertTransformerConfig | ZeroExpertMLATransformerConfig:
    """The configuration of `layers.layer_config`, or the same with multi-latent attention."""
    settings = {"num_layers": 2, "zero_expert_balance_coeff": 0.0, **changes}
    if not latent:
        return layer_config(**settings)
    grouped = layer_config()
    shared = {name: getattr(grouped, name) for name in _SHARED}
    return ZeroExpertMLATransformerConfig(**{**shared, **LATENT, **settings})


def build_model(config: Any) -> GPTModel:
    """A language model whose parameters depend on their names only, not on the layout (for TP 1)."""
    return fill(
        GPTModel(
            config,
            get_zero_expert_layer_spec(config),
            VOCAB,
            512,
            position_embedding_type="rope",
            share_embeddings_and_output_weights=False,
        )
    )


def fill(model: GPTModel) -> GPTModel:
    """Draw every parameter anew, from its name alone."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            offset = 1.0 if "norm" in name else 0.0
            parameter.normal_(offset, 0.2, generator=generator)
    return model


def pack(*lengths: int, **changes: Any) -> PackedSeqParams:
    """Sequences of these lengths, one behind the other; ``changes`` are further fields."""
    boundaries = torch.tensor([0, *lengths]).cumsum(0).int()
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=boundaries,
        cu_seqlens_kv=boundaries,
        max_seqlen_q=max(lengths),
        max_seqlen_kv=max(lengths),
        **changes,
    )
