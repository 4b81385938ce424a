"""Qwen3-MoE (``Qwen3MoeForCausalLM``): grouped-query attention with QK norm, softmax router, no shared expert.

The Megatron keys are those of a model built with Transformer Engine, whatever machine writes the checkpoint.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from megatron_zeda.errors import InputError
from megatron_zeda.models.base import ExpertLayout, Family, Grow, HfPiece, Packing, WeightRow
from megatron_zeda.models.hf_config import (
    head_dim,
    need_bool,
    need_float,
    need_int,
    refuse_unless,
    rope_theta,
    where_of,
    zero_logit_bias,
)
from megatron_zeda.models.methods import check_method_keys, method_fields
from megatron_zeda.models.rows import expert_rows, grow_gate, tied


class Qwen3Moe(Family):
    """Qwen3-MoE, static and dynamic."""

    name: ClassVar[str] = "qwen3_moe"
    model_types: ClassVar[tuple[str, ...]] = ("qwen3_moe", "qwen3_moe_plus_plus")
    static_architecture: ClassVar[str] = "Qwen3MoeForCausalLM"
    dynamic_architecture: ClassVar[str] = "Qwen3MoePlusPlusForCausalLM"
    num_experts_keys: ClassVar[tuple[str, ...]] = ("num_experts", "num_local_experts")
    modeling_files: ClassVar[tuple[str, ...]] = ("modeling_zeda_qwen3_moe.py", "modeling_zeda_base.py")
    auto_map: ClassVar[dict[str, str]] = {
        "AutoModel": "modeling_zeda_qwen3_moe.Qwen3MoePlusPlusModel",
        "AutoModelForCausalLM": "modeling_zeda_qwen3_moe.Qwen3MoePlusPlusForCausalLM",
    }

    def validate(self, hf_config: dict[str, Any]) -> None:
        """Check every key that the model's mathematics depends on."""
        for key in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"):
            need_int(hf_config, key)
        for key in ("moe_intermediate_size", "max_position_embeddings"):
            need_int(hf_config, key)
        if "intermediate_size" in hf_config:
            need_int(hf_config, "intermediate_size")
        if "initializer_range" in hf_config:
            need_float(hf_config, "initializer_range")
        need_float(hf_config, "rms_norm_eps")
        need_bool(hf_config, "norm_topk_prob")
        rope_theta(hf_config)
        zero_logit_bias(hf_config)
        check_method_keys(hf_config)
        self.num_zero_experts(hf_config)
        num_experts, topk = self.num_experts(hf_config), need_int(hf_config, "num_experts_per_tok")
        heads, groups = hf_config["num_attention_heads"], hf_config["num_key_value_heads"]
        where = where_of(hf_config)
        if topk > num_experts:
            raise InputError(
                "`num_experts_per_tok` is too large", where=where, value=topk, rule=f"at most {num_experts} experts"
            )
        if heads % groups:
            raise InputError(
                "`num_key_value_heads` is wrong", where=where, value=groups, rule=f"a divisor of {heads} heads"
            )
        if hf_config.get("head_dim") is not None:
            need_int(hf_config, "head_dim")
        elif hf_config["hidden_size"] % heads:
            raise InputError(
                "`head_dim` is missing", where=where, rule=f"hidden_size is not a multiple of {heads} heads"
            )
        refuse_unless(hf_config, "hidden_act", ("silu",), "only silu")
        refuse_unless(hf_config, "attention_bias", (False, None), "attention without bias")
        refuse_unless(hf_config, "use_sliding_window", (False, None), "full attention")
        refuse_unless(hf_config, "mlp_only_layers", ([], None), "every layer is a mixture of experts")
        refuse_unless(hf_config, "decoder_sparse_step", (1, None), "every layer is a mixture of experts")
        refuse_unless(hf_config, "tie_word_embeddings", (True, False), "true or false")
        refuse_unless(hf_config, "quantization_config", (None,), "an unquantised checkpoint; dequantise it first")

    def transformer_config_class(self) -> type:
        """``TransformerConfig`` with the fields for zero experts."""
        from megatron_zeda.zero_experts import ZeroExpertTransformerConfig

        return ZeroExpertTransformerConfig

    def transformer_config_kwargs(self, hf_config: dict[str, Any]) -> dict[str, Any]:
        """``TransformerConfig`` fields. Dropout and every auxiliary loss of Megatron's own are off."""
        return {
            "num_layers": hf_config["num_hidden_layers"],
            "hidden_size": hf_config["hidden_size"],
            "ffn_hidden_size": hf_config.get("intermediate_size", hf_config["moe_intermediate_size"]),
            "num_attention_heads": hf_config["num_attention_heads"],
            "num_query_groups": hf_config["num_key_value_heads"],
            "kv_channels": head_dim(hf_config),
            "qk_layernorm": True,
            "normalization": "RMSNorm",
            "layernorm_epsilon": float(hf_config["rms_norm_eps"]),
            "add_bias_linear": False,
            "gated_linear_unit": True,
            "activation_func": torch.nn.functional.silu,
            "attention_dropout": 0.0,
            "hidden_dropout": 0.0,
            "init_method_std": float(hf_config.get("initializer_range", 0.02)),
            "num_moe_experts": self.num_experts(hf_config),
            "moe_ffn_hidden_size": hf_config["moe_intermediate_size"],
            "moe_router_topk": hf_config["num_experts_per_tok"],
            "moe_router_score_function": "softmax",
            # Softmax after top-K is the softmax over everything, normalised over the K chosen: norm_topk_prob.
            "moe_router_pre_softmax": not hf_config["norm_topk_prob"],
            "moe_router_dtype": "fp32",
            "moe_router_load_balancing_type": "none",
            "moe_aux_loss_coeff": 0.0,
            "moe_token_dispatcher_type": "alltoall",
            "num_zero_experts": self.num_zero_experts(hf_config),
            "zero_expert_logit_bias": zero_logit_bias(hf_config),
            **method_fields(hf_config),
        }

    def gpt_model_kwargs(self, hf_config: dict[str, Any]) -> dict[str, Any]:
        """``GPTModel`` arguments: vocabulary, rotary embeddings, tying."""
        return {
            "vocab_size": hf_config["vocab_size"],
            "max_sequence_length": hf_config["max_position_embeddings"],
            "position_embedding_type": "rope",
            "rotary_percent": 1.0,
            "rotary_base": rope_theta(hf_config),
            "share_embeddings_and_output_weights": tied(hf_config),
        }

    def weight_table(self, hf_config: dict[str, Any], layout: ExpertLayout = "per_expert") -> list[WeightRow]:
        """The table. Rows come in the order of the forward pass, so both directions stream layer by layer."""
        vocab, hidden = hf_config["vocab_size"], hf_config["hidden_size"]
        rows = [
            WeightRow(
                "embedding.word_embeddings.weight",
                (HfPiece("model.embed_tokens.weight", (vocab, hidden)),),
                padded=True,
            )
        ]
        for layer in range(hf_config["num_hidden_layers"]):
            rows += self._layer_rows(hf_config, layer)
            rows += expert_rows(
                "decoder.layers.mlp.experts.experts.",
                f"model.layers.{layer}.mlp.experts.",
                hf_config["moe_intermediate_size"],
                hidden,
                self.num_experts(hf_config),
                layout,
                layer=(layer, hf_config["num_hidden_layers"]),
            )
        rows.append(WeightRow("decoder.final_layernorm.weight", (HfPiece("model.norm.weight", (hidden,)),)))
        if not tied(hf_config):
            rows.append(WeightRow("output_layer.weight", (HfPiece("lm_head.weight", (vocab, hidden)),), padded=True))
        return rows

    def _layer_rows(self, hf_config: dict[str, Any], layer: int) -> list[WeightRow]:
        hidden, dim = hf_config["hidden_size"], head_dim(hf_config)
        heads, groups = hf_config["num_attention_heads"], hf_config["num_key_value_heads"]
        num_rows = self.num_experts(hf_config) + self.num_zero_experts(hf_config)
        index, extent = (layer,), (hf_config["num_hidden_layers"],)
        megatron, hf = "decoder.layers.", f"model.layers.{layer}."

        def row(key: str, name: str, *shape: int, grow: Grow | None = None) -> WeightRow:
            return WeightRow(megatron + key, (HfPiece(hf + name, shape),), index, extent, grow=grow)

        return [
            row("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight", hidden),
            WeightRow(
                megatron + "self_attention.linear_qkv.weight",
                (
                    HfPiece(hf + "self_attn.q_proj.weight", (heads * dim, hidden)),
                    HfPiece(hf + "self_attn.k_proj.weight", (groups * dim, hidden)),
                    HfPiece(hf + "self_attn.v_proj.weight", (groups * dim, hidden)),
                ),
                index,
                extent,
                Packing(groups=groups),  # each query group keeps its queries, key and value together
            ),
            row("self_attention.q_layernorm.weight", "self_attn.q_norm.weight", dim),
            row("self_attention.k_layernorm.weight", "self_attn.k_norm.weight", dim),
            row("self_attention.linear_proj.weight", "self_attn.o_proj.weight", hidden, heads * dim),
            row("pre_mlp_layernorm.weight", "post_attention_layernorm.weight", hidden),
            row("mlp.router.weight", "mlp.gate.weight", num_rows, hidden, grow=grow_gate),
        ]

    def fused_tensor_names(self, hf_config: dict[str, Any]) -> frozenset[str]:
        """The stacked expert tensors of layer 0: enough to recognise the layout."""
        return frozenset({"model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj"})
