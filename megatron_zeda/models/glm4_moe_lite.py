"""GLM-4.7-Flash (``Glm4MoeLiteForCausalLM``): multi-latent attention; the rest is in ``glm.py``."""

from __future__ import annotations

from typing import Any, ClassVar

from megatron_zeda.errors import InputError
from megatron_zeda.models.base import WeightRow
from megatron_zeda.models.glm import GlmFamily, dense_layers
from megatron_zeda.models.hf_config import HfConfig, need_float, need_int, refuse_unless, rope_theta, where_of
from megatron_zeda.models.rows import row, tied

_SIZES = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")


class Glm4MoeLite(GlmFamily):
    """GLM-4.7-Flash, static and dynamic."""

    name: ClassVar[str] = "glm4_moe_lite"
    model_types: ClassVar[tuple[str, ...]] = ("glm4_moe_lite", "glm4_moe_lite_plus_plus")
    static_architecture: ClassVar[str] = "Glm4MoeLiteForCausalLM"
    dynamic_architecture: ClassVar[str] = "Glm4MoeLitePlusPlusForCausalLM"
    modeling_files: ClassVar[tuple[str, ...]] = ("modeling_zeda_glm4_moe_lite.py", "modeling_zeda_base.py")
    auto_map: ClassVar[dict[str, str]] = {
        "AutoModel": "modeling_zeda_glm4_moe_lite.Glm4MoeLitePlusPlusModel",
        "AutoModelForCausalLM": "modeling_zeda_glm4_moe_lite.Glm4MoeLitePlusPlusForCausalLM",
    }

    def validate(self, hf_config: dict[str, Any]) -> None:
        """Check every key that the model's mathematics depends on."""
        super().validate(hf_config)
        where = where_of(hf_config)
        for key in _SIZES:
            need_int(hf_config, key)
        latent_norm_eps(hf_config)
        rope_theta(hf_config)
        if hf_config["num_key_value_heads"] != hf_config["num_attention_heads"]:
            raise InputError(
                "`num_key_value_heads` is wrong",
                where=where,
                value=hf_config["num_key_value_heads"],
                rule="multi-latent attention has as many as `num_attention_heads`",
            )
        if hf_config["qk_rope_head_dim"] % 2:
            raise InputError(
                "`qk_rope_head_dim` is wrong", where=where, value=hf_config["qk_rope_head_dim"], rule="an even number"
            )
        refuse_unless(hf_config, "head_dim", (hf_config["qk_rope_head_dim"], None), "qk_rope_head_dim, if it is there")
        refuse_unless(hf_config, "attention_bias", (False, None), "attention without bias")
        refuse_unless(hf_config, "rope_interleave", (True, None), "interleaved rotary embeddings")
        refuse_unless(hf_config, "partial_rotary_factor", (1, None), "all of qk_rope_head_dim rotates")

    def make_dynamic(self, hf_config: dict[str, Any], num_zero_experts: int) -> HfConfig:
        """As for every family, with the epsilon of the latent norms and the dense layers written out: readers have
        different defaults for the one and different keys for the other.
        """
        return _written_out(super().make_dynamic(hf_config, num_zero_experts))

    def make_skipping(self, hf_config: dict[str, Any]) -> HfConfig:
        """Likewise."""
        return _written_out(super().make_skipping(hf_config))

    def transformer_config_class(self) -> type:
        """``MLATransformerConfig`` with the fields for zero experts."""
        from megatron_zeda.zero_experts import ZeroExpertMLATransformerConfig

        return ZeroExpertMLATransformerConfig

    def transformer_config_kwargs(self, hf_config: dict[str, Any]) -> dict[str, Any]:
        """``MLATransformerConfig`` fields."""
        return {
            **super().transformer_config_kwargs(hf_config),
            "kv_channels": hf_config["v_head_dim"],
            "q_lora_rank": hf_config["q_lora_rank"],
            "kv_lora_rank": hf_config["kv_lora_rank"],
            "qk_head_dim": hf_config["qk_nope_head_dim"],
            "qk_pos_emb_head_dim": hf_config["qk_rope_head_dim"],
            "v_head_dim": hf_config["v_head_dim"],
            "qk_layernorm": True,
            "latent_norm_epsilon": latent_norm_eps(hf_config),
            "rope_type": "rope",
            "rotary_base": rope_theta(hf_config),
            "rotary_percent": 1.0,
            "rotary_scaling_factor": 1.0,
            "apply_rope_fusion": False,  # Megatron-Core's kernel serves another kind of rotary embedding
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

    def attention_rows(self, hf_config: dict[str, Any], megatron: str, hf: str) -> list[WeightRow]:
        """Multi-latent attention. Both sides keep heads one behind the other, so nothing is rearranged."""
        hidden, heads, rope = (hf_config[key] for key in ("hidden_size", "num_attention_heads", "qk_rope_head_dim"))
        queries, keys = hf_config["q_lora_rank"], hf_config["kv_lora_rank"]
        nope, value = hf_config["qk_nope_head_dim"], hf_config["v_head_dim"]
        norm = row(f"{megatron}input_layernorm.weight", f"{hf}input_layernorm.weight", hidden)
        megatron, hf = f"{megatron}self_attention.", f"{hf}self_attn."
        return [
            norm,
            row(f"{megatron}linear_q_down_proj.weight", f"{hf}q_a_proj.weight", queries, hidden),
            row(f"{megatron}linear_q_up_proj.layer_norm_weight", f"{hf}q_a_layernorm.weight", queries),
            row(f"{megatron}linear_q_up_proj.weight", f"{hf}q_b_proj.weight", heads * (nope + rope), queries),
            row(f"{megatron}linear_kv_down_proj.weight", f"{hf}kv_a_proj_with_mqa.weight", keys + rope, hidden),
            row(f"{megatron}linear_kv_up_proj.layer_norm_weight", f"{hf}kv_a_layernorm.weight", keys),
            row(f"{megatron}linear_kv_up_proj.weight", f"{hf}kv_b_proj.weight", heads * (nope + value), keys),
            row(f"{megatron}linear_proj.weight", f"{hf}o_proj.weight", hidden, heads * value),
        ]

    def adapt_stock_model(self, model: Any, hf_config: dict[str, Any]) -> None:
        """Give the latent norms the epsilon that Megatron-Core gives them, see :func:`latent_norm_eps`."""
        epsilon = latent_norm_eps(hf_config)
        for layer in model.model.layers:
            layer.self_attn.q_a_layernorm.variance_epsilon = epsilon
            layer.self_attn.kv_a_layernorm.variance_epsilon = epsilon

    def stock_differences(self, hf_config: dict[str, Any]) -> dict[str, str]:
        """The epsilon of the latent norms, where an implementation of the stock architecture has another one."""
        epsilon, stock = latent_norm_eps(hf_config), {}
        if epsilon != TRANSFORMERS_LATENT_NORM_EPS:
            stock["transformers"] = f"stock transformers takes {TRANSFORMERS_LATENT_NORM_EPS:g}"
        if epsilon != hf_config["rms_norm_eps"]:
            stock["vLLM"] = f"vLLM and SGLang take `rms_norm_eps`, {hf_config['rms_norm_eps']:g},"
        text = "as the epsilon of the latent norms, where this model has `zeda_latent_norm_eps`,"
        return {reader: f"{takes} {text} {epsilon:g}" for reader, takes in stock.items()}


def _written_out(config: HfConfig) -> HfConfig:
    config["zeda_latent_norm_eps"] = latent_norm_eps(config)
    dense, layers = dense_layers(config), config["num_hidden_layers"]
    config["mlp_layer_types"] = ["dense"] * dense + ["sparse"] * (layers - dense)
    config["first_k_dense_replace"] = dense
    return config


TRANSFORMERS_LATENT_NORM_EPS = 1e-6
"""What stock transformers has in the latent norms, whatever ``config.json`` says."""


def latent_norm_eps(hf_config: dict[str, Any]) -> float:
    """Epsilon of the two norms inside the attention: ``zeda_latent_norm_eps``, or ``rms_norm_eps`` without that key.

    The one answer of everything in this project. vLLM, SGLang and Megatron-Core take ``rms_norm_eps`` there (1e-5 in
    GLM-4.7-Flash), stock transformers :data:`TRANSFORMERS_LATENT_NORM_EPS`.
    """
    given = hf_config.get("zeda_latent_norm_eps") is not None
    key = "zeda_latent_norm_eps" if given else "rms_norm_eps"
    epsilon = need_float(hf_config, key)
    if epsilon >= 1:  # as the modelling file has it
        raise InputError(f"`{key}` is wrong", where=where_of(hf_config), value=epsilon, rule="between 0 and 1")
    return epsilon
