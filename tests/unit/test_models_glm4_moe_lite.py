"""The GLM-4.7-Flash family: what is read, what is refused, and a table that covers the model exactly once."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import make_hf, megatron_model

from megatron_zeda.config_refusals import OVERRIDE_REFUSALS
from megatron_zeda.errors import InputError
from megatron_zeda.models import HfConfig, build_transformer_config, family_for, load_hf_config, parallel_problems
from megatron_zeda.models.glm import dense_layers
from megatron_zeda.models.rows import NEVER_SELECTED

GLM_47_FLASH: dict[str, Any] = {
    "architectures": ["Glm4MoeLiteForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "dtype": "bfloat16",
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 10240,
    "kv_lora_rank": 512,
    "max_position_embeddings": 202752,
    "model_type": "glm4_moe_lite",
    "moe_intermediate_size": 1536,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 20,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 47,
    "num_key_value_heads": 20,
    "num_nextn_predict_layers": 1,
    "partial_rotary_factor": 1.0,
    "q_lora_rank": 768,
    "qk_nope_head_dim": 192,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "routed_scaling_factor": 1.8,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "v_head_dim": 256,
    "vocab_size": 154880,
}
ZERO = {
    "architectures": ["Glm4MoeLitePlusPlusForCausalLM"],
    "zce_nums": [32],
    "zce_types": ["zero"],
    "use_zce_mask": False,
}


def _config(**changes: Any) -> HfConfig:
    values = {**GLM_47_FLASH, **changes}
    return HfConfig({key: value for key, value in values.items() if value is not ...}, where="some/config.json")


def test_the_published_configuration() -> None:
    config = _config()
    kwargs = family_for(config).transformer_config_kwargs(config)
    expected = {
        "num_layers": 47,
        "num_attention_heads": 20,
        "ffn_hidden_size": 10240,
        "q_lora_rank": 768,
        "kv_lora_rank": 512,
        "qk_head_dim": 192,
        "qk_pos_emb_head_dim": 64,
        "v_head_dim": 256,
        "rope_type": "rope",
        "rotary_base": 1e6,
        "layernorm_epsilon": 1e-5,
        "latent_norm_epsilon": 1e-5,  # rms_norm_eps
        "moe_layer_freq": [0] + [1] * 46,
        "moe_ffn_hidden_size": 1536,
        "moe_shared_expert_intermediate_size": 1536,
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_topk_scaling_factor": 1.8,
        "moe_router_bias_update_rate": 0.0,
        "moe_aux_loss_coeff": 0.0,
        "num_moe_experts": 64,
        "num_zero_experts": 0,
    }
    assert expected.items() <= kwargs.items()
    built = build_transformer_config(_config(**ZERO, zeda_latent_norm_eps=1e-6))
    assert (built.num_zero_experts, built.latent_norm_epsilon, built.multi_latent_attention) == (32, 1e-6, True)


@pytest.mark.parametrize("layout", ["per_expert", "fused"])
def test_the_published_table_has_the_published_size(layout: Any) -> None:
    """Names and shapes of stock transformers on the meta device; 31,221,488,576 parameters on the model's page."""
    from transformers import Glm4MoeLiteConfig, Glm4MoeLiteForCausalLM

    config = _config(num_hidden_layers=2)
    with torch.device("meta"):
        stock = Glm4MoeLiteForCausalLM(Glm4MoeLiteConfig(**{k: v for k, v in config.items() if k != "architectures"}))
    expected = {name: tuple(tensor.shape) for name, tensor in stock.state_dict().items()}
    if layout == "per_expert":
        expected = _one_tensor_per_expert(expected, 64)
    table = family_for(config).weight_table(config, layout)
    assert {piece.name: piece.tensor_shape for row in table for piece in row.pieces} == expected
    full = _config()
    family = family_for(full)
    rows, carried = family.weight_table(full, layout), family.carried_rows(full, layout)
    assert sum(row.numel for row in rows) + sum(row.numel for row in carried) == 31_221_488_576


def _one_tensor_per_expert(shapes: dict[str, tuple[int, ...]], experts: int) -> dict[str, tuple[int, ...]]:
    found = {}
    for name, shape in shapes.items():
        prefix, _, kind = name.rpartition(".experts.")
        for expert in range(experts):
            if kind == "down_proj":
                found[f"{prefix}.experts.{expert}.down_proj.weight"] = shape[1:]
            elif kind == "gate_up_proj":
                for half in ("gate_proj", "up_proj"):
                    found[f"{prefix}.experts.{expert}.{half}.weight"] = (shape[1] // 2, shape[2])
        if not prefix:
            found[name] = shape
    return found


@pytest.mark.parametrize("layout", ["per_expert", "fused"])
@pytest.mark.parametrize(("tied", "dense"), [(False, 1), (True, 2), (False, 0)])
def test_every_glm_block_and_piece_once(layout: Any, tied: bool, dense: int) -> None:
    config = _config(
        num_hidden_layers=4,
        n_routed_experts=8,
        tie_word_embeddings=tied,
        first_k_dense_replace=dense,
        **{**ZERO, "zce_nums": [4]},
    )
    family = family_for(config)
    rows, carried = family.weight_table(config, layout), family.carried_rows(config, layout)
    assert max(Counter((row.key, row.index) for row in [*rows, *carried]).values()) == 1
    pieces = Counter((piece.name, piece.slot) for row in [*rows, *carried] for piece in row.pieces)
    assert max(pieces.values()) == 1
    for key in {row.key for row in rows}:
        blocks = [row for row in rows if row.key == key]
        assert len(blocks) == math.prod(blocks[0].extent)
        assert len({(row.global_shape, row.extent) for row in blocks}) == 1
    assert [row.pieces[0].shape for row in rows if row.grow is not None] == [(12, 2048), (12,)] * (4 - dense)
    assert ("output_layer.weight" in {row.key for row in rows}) != tied
    names = {piece.name for row in rows for piece in row.pieces}
    if layout == "fused":
        assert family.fused_tensor_names(config) <= names
    else:
        assert not family.fused_tensor_names(config) & names


def test_carried_tensors() -> None:
    config = _config(num_hidden_layers=3, n_routed_experts=8, **{**ZERO, "zce_nums": [4]})
    rows = family_for(config).carried_rows(config)
    by_key = {row.key: row for row in rows}
    assert all(row.pieces[0].name == row.key and row.key.startswith("model.layers.3.") for row in rows)
    assert {key for key, row in by_key.items() if row.optional} == {
        "model.layers.3.embed_tokens.weight",
        "model.layers.3.shared_head.head.weight",
    }
    gate, bias = by_key["model.layers.3.mlp.gate.weight"], by_key["model.layers.3.mlp.gate.e_score_correction_bias"]
    assert (gate.shape, bias.shape) == ((12, 2048), (12,))
    assert gate.grow is not None
    assert bias.grow is not None
    assert gate.grow(torch.ones(8, 5), 4, seed=0, name="x").equal(torch.zeros(4, 5))
    assert bias.grow(torch.ones(8), 4, seed=0, name="x").equal(torch.full((4,), NEVER_SELECTED))
    assert [row.key for row in rows if row.grow] == [gate.key, bias.key]
    assert by_key["model.layers.3.eh_proj.weight"].shape == (2048, 4096)
    assert by_key["model.layers.3.mlp.experts.7.down_proj.weight"].shape == (2048, 1536)
    fused = {row.key: row.shape for row in family_for(config).carried_rows(config, "fused")}
    assert fused["model.layers.3.mlp.experts.gate_up_proj"] == (8, 3072, 2048)
    none = _config(num_nextn_predict_layers=0)
    assert family_for(none).carried_rows(none) == []
    unsaid = _config(num_nextn_predict_layers=...)
    assert len(family_for(unsaid).carried_rows(unsaid)) == len(family_for(_config()).carried_rows(_config()))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, 1),
        ({"first_k_dense_replace": 0}, 0),
        ({"first_k_dense_replace": ..., "mlp_layer_types": ["dense"] * 3 + ["sparse"]}, 3),
        ({"first_k_dense_replace": 2, "mlp_layer_types": ["dense"] * 2 + ["sparse"] * 2}, 2),
        ({"first_k_dense_replace": None, "mlp_layer_types": ["sparse"] * 4}, 0),
    ],
)
def test_dense_layers_in_either_spelling(changes: dict[str, Any], expected: int) -> None:
    config = _config(num_hidden_layers=4, **changes)
    assert dense_layers(config) == expected
    kwargs = family_for(config).transformer_config_kwargs(config)
    assert kwargs["moe_layer_freq"] == [0] * expected + [1] * (4 - expected)
    dynamic = family_for(config).make_dynamic(config, 4)
    assert dynamic["mlp_layer_types"] == ["dense"] * expected + ["sparse"] * (4 - expected)
    assert dynamic["first_k_dense_replace"] == expected


@pytest.mark.parametrize(
    ("changes", "tensor", "rest"),
    [
        ({}, 5, ["1536 units of the shared experts"]),
        ({"intermediate_size": 10241}, 2, ["10241 units of a dense layer"]),
        ({"intermediate_size": 10241, "first_k_dense_replace": 0}, 2, []),
    ],
)
def test_parallel_sizes_that_do_not_fit(changes: dict[str, Any], tensor: int, rest: list[str]) -> None:
    """The builder refuses what the trainer does, and not Megatron-Core's bare assertion inside the model."""
    sizes = {"tensor_model_parallel_size": tensor, "expert_tensor_parallel_size": 1}
    wanted = [f"tensor_model_parallel_size {tensor} does not divide the model's {what}" for what in rest]
    assert parallel_problems(_config(**changes), **sizes) == wanted
    if wanted:
        with pytest.raises(InputError, match=wanted[0]):
            build_transformer_config(_config(**changes), sequence_parallel=True, **sizes)


def test_a_dynamic_glm_configuration() -> None:
    static = _config(num_local_experts=64)
    dynamic = family_for(static).make_dynamic(static, 32)
    assert "num_local_experts" not in dynamic
    expected = {
        "architectures": ["Glm4MoeLitePlusPlusForCausalLM"],
        "model_type": "glm4_moe_lite",
        "n_routed_experts": 64,
        "zce_nums": [32],
        "zce_types": ["zero"],
        "use_zce_mask": False,
        "zeda_zero_logit_bias": 0.0,
        "zeda_latent_norm_eps": 1e-5,  # what Megatron, vLLM and SGLang take where nothing is said
    }
    assert expected.items() <= dynamic.items()
    assert dynamic["auto_map"].keys() == {"AutoModel", "AutoModelForCausalLM"}
    said = _config(zeda_latent_norm_eps=1e-6)
    assert family_for(said).make_dynamic(said, 32)["zeda_latent_norm_eps"] == 1e-6
    for changes in (ZERO, {**ZERO, "model_type": "glm4_moe_lite_plus_plus"}):
        config = _config(**changes)
        assert family_for(config).transformer_config_kwargs(config)["num_zero_experts"] == 32


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        *[
            ({key: ...}, f"`{key}` is missing")
            for key in (
                "vocab_size",
                "hidden_size",
                "intermediate_size",
                "moe_intermediate_size",
                "num_hidden_layers",
                "num_attention_heads",
                "num_key_value_heads",
                "q_lora_rank",
                "kv_lora_rank",
                "qk_nope_head_dim",
                "qk_rope_head_dim",
                "v_head_dim",
                "n_routed_experts",
                "n_shared_experts",
                "num_experts_per_tok",
                "norm_topk_prob",
                "routed_scaling_factor",
                "rms_norm_eps",
                "rope_theta",
                "first_k_dense_replace",
            )
        ],
        ({"q_lora_rank": None}, "`q_lora_rank` is wrong"),
        ({"num_experts_per_tok": 65}, "`num_experts_per_tok` is too large"),
        ({"num_experts_per_tok": 1}, "`num_experts_per_tok` is wrong"),
        ({"num_key_value_heads": 4}, "`num_key_value_heads` is wrong"),
        ({"qk_rope_head_dim": 63}, "`qk_rope_head_dim` is wrong"),
        ({"head_dim": 128}, "`head_dim`"),
        ({"norm_topk_prob": False}, "`norm_topk_prob`"),
        ({"norm_topk_prob": 1}, "`norm_topk_prob` is wrong"),
        ({"routed_scaling_factor": 0}, "`routed_scaling_factor` is wrong"),
        ({"n_group": 8}, "`n_group`"),
        ({"topk_group": 4}, "`topk_group`"),
        ({"topk_method": "greedy"}, "`topk_method`"),
        ({"scoring_func": "softmax"}, "`scoring_func`"),
        ({"rope_interleave": False}, "`rope_interleave`"),
        ({"partial_rotary_factor": 0.5}, "`partial_rotary_factor`"),
        ({"attention_bias": True}, "`attention_bias`"),
        ({"hidden_act": "gelu"}, "`hidden_act`"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "scaled rotary"),
        ({"zeda_latent_norm_eps": 0.0}, "`zeda_latent_norm_eps` is wrong"),
        ({"zeda_latent_norm_eps": "1e-6"}, "`zeda_latent_norm_eps` is wrong"),
        ({"zeda_latent_norm_eps": 2.0}, "`zeda_latent_norm_eps` is wrong.*between 0 and 1"),
        ({"rms_norm_eps": 1.0}, "`rms_norm_eps` is wrong.*between 0 and 1"),
        ({"first_k_dense_replace": 47}, "`first_k_dense_replace` is wrong"),
        ({"first_k_dense_replace": -1}, "`first_k_dense_replace` is wrong"),
        ({"mlp_layer_types": ["sparse"] * 47}, "disagrees with `mlp_layer_types`"),
        ({"mlp_layer_types": ["dense"] * 47}, "`mlp_layer_types` is wrong"),
        ({"mlp_layer_types": ["dense"] + ["sparse"] * 45}, "`mlp_layer_types` is wrong"),
        ({"mlp_layer_types": ["sparse", "dense"] + ["sparse"] * 45}, "`mlp_layer_types` is wrong"),
        ({"mlp_layer_types": "dense"}, "`mlp_layer_types` is wrong"),
        ({"num_nextn_predict_layers": -1}, "`num_nextn_predict_layers` is wrong"),
        ({"num_local_experts": 96}, "two numbers of experts"),
        ({"quantization_config": {"quant_method": "fp8"}}, "`quantization_config`"),
        ({"architectures": ["Qwen3MoeForCausalLM"]}, "`architectures` does not fit"),
        ({"architectures": ["Glm4MoeLitePlusPlusForCausalLM"]}, "`zce_nums` is missing"),
        ({"model_type": "glm4_moe_lite_plus_plus"}, "`zce_nums` is missing"),
        ({**ZERO, "zce_types": ...}, "`zce_types` is missing"),
        ({**ZERO, "use_zce_mask": ...}, "`use_zce_mask` is missing"),
        ({**ZERO, "zce_types": ["copy"]}, "`zce_types` is wrong"),
        ({**ZERO, "zeda_zero_logit_bias": math.inf}, "`zeda_zero_logit_bias` is wrong"),
    ],
)
def test_wrong_glm_keys_are_refused(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(InputError, match=match) as caught:
        family_for(_config(**changes))
    assert str(caught.value).startswith("some/config.json")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dense", [0, 1, 2])
def test_megatron_saves_the_keys_of_the_table(megatron: None, tmp_path: Path, dense: int) -> None:
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    hf = make_hf(
        tmp_path,
        family="glm4_moe_lite",
        num_hidden_layers=3,
        first_k_dense_replace=dense,
        mlp_layer_types=["dense"] * dense + ["sparse"] * (3 - dense),
    )
    config = load_hf_config(hf)
    dynamic = family_for(config).make_dynamic(config, 2)
    state = megatron_model(dynamic).sharded_state_dict()
    apply_factories(state)
    saved: dict[str, tuple[int, ...]] = {}
    _collect(state, saved, ShardedTensor)
    assert saved == {row.key: row.global_shape for row in family_for(dynamic).weight_table(dynamic)}


def _collect(entry: Any, saved: dict[str, tuple[int, ...]], kind: type) -> None:
    if isinstance(entry, kind):
        saved[entry.key] = tuple(entry.global_shape)
    elif isinstance(entry, (dict, list)):
        for child in entry.values() if isinstance(entry, dict) else entry:
            _collect(child, saved, kind)


def test_the_epsilon_of_the_latent_norms(megatron: None, tmp_path: Path) -> None:
    config = load_hf_config(make_hf(tmp_path, family="glm4_moe_lite"))
    for said, epsilon in ((1e-6, 1e-6), (2e-4, 2e-4), (None, 1e-5)):
        model = megatron_model({**config, "zeda_latent_norm_eps": said})
        for layer in model.decoder.layers:
            assert layer.self_attention.q_layernorm.eps == epsilon
            assert layer.self_attention.kv_layernorm.eps == epsilon
            assert layer.input_layernorm.eps == 1e-5


@pytest.mark.parametrize(
    ("field", "value"), [("latent_norm_epsilon", 0.0), ("latent_norm_epsilon", 2.0), ("mla_down_proj_fusion", True)]
)
def test_settings_of_latent_attention_that_are_refused(field: str, value: Any) -> None:
    with pytest.raises(InputError, match=f"Megatron-Core refuses.*{field}"):
        build_transformer_config(_config(), **{field: value})


def test_the_trainer_and_the_library_refuse_the_fusion_for_the_same_reasons() -> None:
    with pytest.raises(InputError) as caught:
        build_transformer_config(_config(), mla_down_proj_fusion=True)
    assert OVERRIDE_REFUSALS["mla_down_proj_fusion"] in str(caught.value)
