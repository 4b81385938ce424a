"""What the GLM families share: leading dense layers, a sigmoid router with a selection bias, shared experts, and a
layer that drafts tokens, which is carried beside the model.

The Megatron keys are those of a model built with Transformer Engine, whatever machine writes the checkpoint. Dense
layers make the model heterogeneous, so every layer has keys of its own (``decoder.layers.7.mlp...``).
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import torch

from megatron_zeda.errors import InputError
from megatron_zeda.models.base import ExpertLayout, Family, Grow, HfPiece, WeightRow
from megatron_zeda.models.hf_config import (
    need_bool,
    need_float,
    need_int,
    refuse_unless,
    where_of,
    zero_logit_bias,
)
from megatron_zeda.models.methods import check_method_keys, method_fields
from megatron_zeda.models.rows import (
    expert_rows,
    gated_rows,
    grow_gate,
    grow_never_selected,
    grow_selection_bias,
    grow_zeros,
    row,
    tied,
    whole_tensors,
)

_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "n_shared_experts",
    "max_position_embeddings",
)


class GlmFamily(Family):
    """A GLM model but for its attention."""

    num_experts_keys: ClassVar[tuple[str, ...]] = ("n_routed_experts", "num_local_experts")

    @abstractmethod
    def attention_rows(self, hf_config: dict[str, Any], megatron: str, hf: str) -> list[WeightRow]:
        """The attention of one layer and the norm before it.

        Args:
            hf_config: the configuration.
            megatron: prefix of the layer's keys, with its dot.
            hf: prefix of its tensors, likewise.
        """

    def validate(self, hf_config: dict[str, Any]) -> None:
        """Check every key that the model's mathematics depends on; families add those of their attention."""
        for key in _SIZES:
            need_int(hf_config, key)
        if "initializer_range" in hf_config:
            need_float(hf_config, "initializer_range")
        need_float(hf_config, "rms_norm_eps")
        need_float(hf_config, "routed_scaling_factor")
        zero_logit_bias(hf_config)
        check_method_keys(hf_config)
        self.num_zero_experts(hf_config)
        dense_layers(hf_config)
        _num_carried_layers(hf_config)
        num_experts, topk = self.num_experts(hf_config), need_int(hf_config, "num_experts_per_tok", minimum=2)
        if topk > num_experts:
            raise InputError(
                "`num_experts_per_tok` is too large",
                where=where_of(hf_config),
                value=topk,
                rule=f"at most {num_experts} experts",
            )
        need_bool(hf_config, "norm_topk_prob")
        refuse_unless(hf_config, "norm_topk_prob", (True,), "weights normalised over the selected experts")
        refuse_unless(hf_config, "hidden_act", ("silu",), "only silu")
        refuse_unless(hf_config, "n_group", (1, None), "one group of experts")
        refuse_unless(hf_config, "topk_group", (1, None), "one group of experts")
        refuse_unless(hf_config, "topk_method", ("noaux_tc", None), "a selection bias")
        refuse_unless(hf_config, "scoring_func", ("sigmoid", None), "a sigmoid router")
        refuse_unless(hf_config, "tie_word_embeddings", (True, False), "true or false")
        refuse_unless(hf_config, "quantization_config", (None,), "an unquantised checkpoint; dequantise it first")

    def transformer_config_kwargs(self, hf_config: dict[str, Any]) -> dict[str, Any]:
        """``TransformerConfig`` fields but for the attention's. Dropout, auxiliary losses and updates of the selection
        bias are off.
        """
        dense, layers = dense_layers(hf_config), hf_config["num_hidden_layers"]
        return {
            "num_layers": layers,
            "hidden_size": hf_config["hidden_size"],
            "ffn_hidden_size": hf_config["intermediate_size"],
            "num_attention_heads": hf_config["num_attention_heads"],
            "normalization": "RMSNorm",
            "layernorm_epsilon": float(hf_config["rms_norm_eps"]),
            "add_bias_linear": False,
            "gated_linear_unit": True,
            "activation_func": torch.nn.functional.silu,
            "attention_dropout": 0.0,
            "hidden_dropout": 0.0,
            "init_method_std": float(hf_config.get("initializer_range", 0.02)),
            "num_moe_experts": self.num_experts(hf_config),
            "moe_layer_freq": [0] * dense + [1] * (layers - dense),
            "moe_ffn_hidden_size": hf_config["moe_intermediate_size"],
            "moe_shared_expert_intermediate_size": hf_config["moe_intermediate_size"] * hf_config["n_shared_experts"],
            "moe_router_topk": hf_config["num_experts_per_tok"],
            "moe_router_score_function": "sigmoid",
            "moe_router_enable_expert_bias": True,
            "moe_router_bias_update_rate": 0.0,
            "moe_router_topk_scaling_factor": float(hf_config["routed_scaling_factor"]),
            "moe_router_dtype": "fp32",
            "moe_router_load_balancing_type": "none",
            "moe_aux_loss_coeff": 0.0,
            "moe_token_dispatcher_type": "alltoall",
            "num_zero_experts": self.num_zero_experts(hf_config),
            "zero_expert_logit_bias": zero_logit_bias(hf_config),
            **method_fields(hf_config),
        }

    def weight_table(self, hf_config: dict[str, Any], layout: ExpertLayout = "per_expert") -> list[WeightRow]:
        """The table. Rows come in the order of the forward pass, so both directions stream layer by layer."""
        vocab, hidden = hf_config["vocab_size"], hf_config["hidden_size"]
        embedding = HfPiece("model.embed_tokens.weight", (vocab, hidden))
        rows = [WeightRow("embedding.word_embeddings.weight", (embedding,), padded=True)]
        for layer in range(hf_config["num_hidden_layers"]):
            rows += self._layer_rows(hf_config, layer, layout)
        rows.append(WeightRow("decoder.final_layernorm.weight", (HfPiece("model.norm.weight", (hidden,)),)))
        if not tied(hf_config):
            rows.append(WeightRow("output_layer.weight", (HfPiece("lm_head.weight", (vocab, hidden)),), padded=True))
        return rows

    def carried_rows(self, hf_config: dict[str, Any], layout: ExpertLayout = "per_expert") -> list[WeightRow]:
        """The layer behind the last one, which only drafts tokens (multi-token prediction).

        Its router has as many rows as the others by the format, so injection widens it too: with a selection bias that
        keeps the layer static. Its embedding and its head are copies of the model's, which some checkpoints leave out.
        """
        vocab, hidden, layers = hf_config["vocab_size"], hf_config["hidden_size"], hf_config["num_hidden_layers"]
        grow: dict[str, Grow] = {
            "mlp.gate.weight": grow_zeros,
            "mlp.gate.e_score_correction_bias": grow_never_selected,
        }
        rows = []
        for layer in range(layers, layers + _num_carried_layers(hf_config)):
            hf = f"model.layers.{layer}."
            optional = {f"{hf}embed_tokens.weight": (vocab, hidden), f"{hf}shared_head.head.weight": (vocab, hidden)}
            tensors: dict[str, tuple[int, ...]] = {
                f"{hf}enorm.weight": (hidden,),
                f"{hf}hnorm.weight": (hidden,),
                f"{hf}eh_proj.weight": (hidden, 2 * hidden),
                **whole_tensors(self._layer_rows(hf_config, layer, layout)),
                f"{hf}shared_head.norm.weight": (hidden,),
                **optional,
            }
            for name, shape in tensors.items():
                piece = HfPiece(name, shape)
                rows.append(WeightRow(name, (piece,), grow=grow.get(name.removeprefix(hf)), optional=name in optional))
        return rows

    def _layer_rows(self, hf_config: dict[str, Any], layer: int, layout: ExpertLayout) -> list[WeightRow]:
        hidden = hf_config["hidden_size"]
        megatron, hf = f"decoder.layers.{layer}.", f"model.layers.{layer}."
        rows = self.attention_rows(hf_config, megatron, hf)
        dense = layer < dense_layers(hf_config)
        # Transformer Engine fuses this norm into a dense layer's first matrix, and keeps it apart before a router.
        norm = "mlp.linear_fc1.layer_norm_weight" if dense else "pre_mlp_layernorm.weight"
        rows.append(row(megatron + norm, f"{hf}post_attention_layernorm.weight", hidden))
        if dense:
            return rows + gated_rows(f"{megatron}mlp.", f"{hf}mlp.", hf_config["intermediate_size"], hidden)
        columns = self.num_experts(hf_config) + self.num_zero_experts(hf_config)
        ffn, experts = hf_config["moe_intermediate_size"], self.num_experts(hf_config)
        router, gate = f"{megatron}mlp.router.", f"{hf}mlp.gate."
        return [
            *rows,
            row(f"{router}weight", f"{gate}weight", columns, hidden, grow=grow_gate),
            row(f"{router}expert_bias", f"{gate}e_score_correction_bias", columns, grow=grow_selection_bias),
            *expert_rows(f"{megatron}mlp.experts.experts.", f"{hf}mlp.experts.", ffn, hidden, experts, layout),
            *gated_rows(
                f"{megatron}mlp.shared_experts.",
                f"{hf}mlp.shared_experts.",
                ffn * hf_config["n_shared_experts"],
                hidden,
            ),
        ]

    def fused_tensor_names(self, hf_config: dict[str, Any]) -> frozenset[str]:
        """The stacked expert tensors of the first layer that has experts: enough to recognise the layout."""
        prefix = f"model.layers.{dense_layers(hf_config)}.mlp.experts."
        return frozenset({f"{prefix}gate_up_proj", f"{prefix}down_proj"})


def dense_layers(hf_config: dict[str, Any]) -> int:
    """How many layers at the front are dense, from ``mlp_layer_types`` or ``first_k_dense_replace``.

    Raises:
        InputError: if neither is there, the two disagree, a dense layer is elsewhere or no layer has experts.
    """
    where, layers = where_of(hf_config), hf_config["num_hidden_layers"]
    types, first = hf_config.get("mlp_layer_types"), hf_config.get("first_k_dense_replace")
    if types is None and first is None:
        raise InputError("`first_k_dense_replace` is missing", where=where, rule="it or `mlp_layer_types` is needed")
    if first is not None and not 0 <= need_int(hf_config, "first_k_dense_replace", minimum=0) < layers:
        raise InputError(
            "`first_k_dense_replace` is wrong", where=where, value=first, rule=f"less than {layers} layers"
        )
    if types is None:
        return need_int(hf_config, "first_k_dense_replace", minimum=0)
    count = types.count("dense") if isinstance(types, list) else 0
    if types != ["dense"] * count + ["sparse"] * (layers - count) or count == layers:
        raise InputError(
            "`mlp_layer_types` is wrong",
            where=where,
            value=types,
            rule=f'{layers} entries: "dense" ones first, then one "sparse" or more',
        )
    if first is not None and first != count:
        raise InputError(
            "`first_k_dense_replace` disagrees with `mlp_layer_types`",
            where=where,
            value=first,
            rule=f"{count} dense layers",
            fix="keep one of the keys",
        )
    return int(count)


def _num_carried_layers(hf_config: dict[str, Any]) -> int:
    # transformers drops these layers and the key stays; a configuration that never had the key may still have them.
    if hf_config.get("num_nextn_predict_layers") is None:
        return 1
    return need_int(hf_config, "num_nextn_predict_layers", minimum=0)
