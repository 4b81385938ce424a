"""GLM-4.5 and GLM-4.5-Air (``Glm4MoeForCausalLM``): grouped-query attention of which a part rotates; the rest is in
``glm.py``.
"""

from __future__ import annotations

from typing import Any, ClassVar

from megatron_zeda.errors import InputError
from megatron_zeda.models.base import HfPiece, Packing, WeightRow
from megatron_zeda.models.glm import GlmFamily
from megatron_zeda.models.hf_config import HfConfig, head_dim, need_bool, need_float, need_int, rope_theta, where_of
from megatron_zeda.models.rows import row, tied


class Glm4Moe(GlmFamily):
    """GLM-4.5 and its smaller sibling, static and dynamic."""

    name: ClassVar[str] = "glm4_moe"
    model_types: ClassVar[tuple[str, ...]] = ("glm4_moe", "glm4_moe_plus_plus")
    static_architecture: ClassVar[str] = "Glm4MoeForCausalLM"
    dynamic_architecture: ClassVar[str] = "Glm4MoePlusPlusForCausalLM"
    modeling_files: ClassVar[tuple[str, ...]] = ("modeling_zeda_glm4_moe.py", "modeling_zeda_base.py")
    auto_map: ClassVar[dict[str, str]] = {
        "AutoModel": "modeling_zeda_glm4_moe.Glm4MoePlusPlusModel",
        "AutoModelForCausalLM": "modeling_zeda_glm4_moe.Glm4MoePlusPlusForCausalLM",
    }

    def validate(self, hf_config: dict[str, Any]) -> None:
        """Check every key that the model's mathematics depends on."""
        super().validate(hf_config)
        where = where_of(hf_config)
        # glm.py takes `mlp_layer_types` instead, which readers of this family do not know.
        need_int(hf_config, "first_k_dense_replace", minimum=0)
        for key in ("use_qk_norm", "attention_bias"):
            if hf_config.get(key) is not None:
                need_bool(hf_config, key)
        factor = rotary_factor(hf_config)
        rope_theta(hf_config, rotary_factor=factor)
        heads, groups = hf_config["num_attention_heads"], hf_config["num_key_value_heads"]
        if heads % groups:
            raise InputError(
                "`num_key_value_heads` is wrong", where=where, value=groups, rule=f"a divisor of {heads} heads"
            )
        if hf_config.get("head_dim") is None and hf_config["hidden_size"] % heads:
            raise InputError(
                "`head_dim` is missing", where=where, rule=f"hidden_size is not a multiple of {heads} heads"
            )
        rotating = head_dim(hf_config) * factor
        if factor > 1 or rotating != int(rotating) or rotating % 2:
            raise InputError(
                "`partial_rotary_factor` is wrong",
                where=where,
                value=factor,
                rule=f"an even number of the {head_dim(hf_config)} dimensions of a head",
            )

    def transformer_config_class(self) -> type:
        """``TransformerConfig`` with the fields for zero experts."""
        from megatron_zeda.zero_experts import ZeroExpertTransformerConfig

        return ZeroExpertTransformerConfig

    def transformer_config_kwargs(self, hf_config: dict[str, Any]) -> dict[str, Any]:
        """``TransformerConfig`` fields."""
        return {
            **super().transformer_config_kwargs(hf_config),
            "num_query_groups": hf_config["num_key_value_heads"],
            "kv_channels": head_dim(hf_config),
            "qk_layernorm": bool(hf_config.get("use_qk_norm")),
            "add_qkv_bias": bool(hf_config.get("attention_bias")),
        }

    def gpt_model_kwargs(self, hf_config: dict[str, Any]) -> dict[str, Any]:
        """``GPTModel`` arguments: vocabulary, rotary embeddings, tying."""
        factor = rotary_factor(hf_config)
        return {
            "vocab_size": hf_config["vocab_size"],
            "max_sequence_length": hf_config["max_position_embeddings"],
            "position_embedding_type": "rope",
            "rotary_percent": factor,
            "rotary_base": rope_theta(hf_config, rotary_factor=factor),
            "share_embeddings_and_output_weights": tied(hf_config),
        }

    def attention_rows(self, hf_config: dict[str, Any], megatron: str, hf: str) -> list[WeightRow]:
        """Grouped-query attention; its norm is part of the first matrix. There is no bias on the way out."""
        hidden, dim = hf_config["hidden_size"], head_dim(hf_config)
        heads, groups = hf_config["num_attention_heads"], hf_config["num_key_value_heads"]
        norm = row(f"{megatron}self_attention.linear_qkv.layer_norm_weight", f"{hf}input_layernorm.weight", hidden)
        megatron, hf = f"{megatron}self_attention.", f"{hf}self_attn."
        packing = Packing(groups=groups)  # each query group keeps its queries, key and value together

        def qkv(kind: str, *shape: int) -> WeightRow:
            sizes = {"q_proj": heads * dim, "k_proj": groups * dim, "v_proj": groups * dim}
            pieces = tuple(HfPiece(f"{hf}{name}.{kind}", (size, *shape)) for name, size in sizes.items())
            return WeightRow(f"{megatron}linear_qkv.{kind}", pieces, packing=packing)

        rows = [norm, qkv("weight", hidden)]
        if hf_config.get("attention_bias"):
            rows.append(qkv("bias"))
        if hf_config.get("use_qk_norm"):
            rows.append(row(f"{megatron}q_layernorm.weight", f"{hf}q_norm.weight", dim))
            rows.append(row(f"{megatron}k_layernorm.weight", f"{hf}k_norm.weight", dim))
        return [*rows, row(f"{megatron}linear_proj.weight", f"{hf}o_proj.weight", hidden, heads * dim)]


def rotary_factor(hf_config: dict[str, Any]) -> float:
    """The part of a head that rotates: ``partial_rotary_factor``, which transformers 5 moves to ``rope_parameters``."""
    if hf_config.get("partial_rotary_factor") is not None:
        return need_float(hf_config, "partial_rotary_factor")
    parameters = hf_config.get("rope_parameters")
    if isinstance(parameters, dict) and parameters.get("partial_rotary_factor") is not None:
        inner = HfConfig(parameters, where=f"{where_of(hf_config)}: rope_parameters")
        return need_float(inner, "partial_rotary_factor")
    raise InputError("`partial_rotary_factor` is missing", where=where_of(hf_config), rule="0.5 in published models")
