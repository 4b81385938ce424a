"""GLM-4.5-Air, the family that was added by docs/adding_a_family.md: everything that page says to test."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import (
    BIAS,
    EXPERTS,
    VOCAB,
    assert_same_bits,
    edit_config,
    load_hf_model,
    load_megatron,
    make_dense_zeros,
    make_hf,
    megatron_logits,
    megatron_model,
    newest_iteration,
    read_tensors,
)
from full_size import full_size_config, stock_shapes
from megatron.core.transformer.moe.router import TopKRouter

from megatron_zeda.conversion import hf_to_megatron, inject_zero_experts, megatron_to_hf
from megatron_zeda.errors import InputError
from megatron_zeda.models import HfConfig, family_for, load_hf_config
from megatron_zeda.models.rows import NEVER_SELECTED
from megatron_zeda.zero_experts import draw_zero_entries, masked_zero_experts, router_statistics

IDS = torch.arange(3 * 12).reshape(3, 12) * 7 % VOCAB
NAME = "glm4_moe"
AIR = full_size_config("glm-4.5-air")
ZERO = {
    "architectures": ["Glm4MoePlusPlusForCausalLM"],
    "zce_nums": [64],
    "zce_types": ["zero"],
    "use_zce_mask": False,
}


def _config(**changes: Any) -> HfConfig:
    values = {**AIR, **changes}
    return HfConfig({key: value for key, value in values.items() if value is not ...}, where="some/config.json")


def _loaded(folder: Path, **overrides: Any) -> Any:
    model = megatron_model(load_hf_config(folder / "hf"), **overrides)
    load_megatron(model, newest_iteration(folder))
    return model


def test_the_published_air_configuration() -> None:
    config = _config()
    family = family_for(config)
    expected = {
        "num_layers": 46,
        "num_attention_heads": 96,
        "num_query_groups": 8,
        "kv_channels": 128,
        "ffn_hidden_size": 10944,
        "qk_layernorm": False,
        "add_qkv_bias": True,
        "add_bias_linear": False,
        "layernorm_epsilon": 1e-5,
        "moe_layer_freq": [0] + [1] * 45,
        "moe_ffn_hidden_size": 1408,
        "moe_shared_expert_intermediate_size": 1408,
        "moe_router_score_function": "sigmoid",
        "moe_router_topk_scaling_factor": 1.0,
        "num_moe_experts": 128,
        "num_zero_experts": 0,
    }
    assert expected.items() <= family.transformer_config_kwargs(config).items()
    assert family.gpt_model_kwargs(config)["rotary_percent"] == 0.5
    dynamic = family.make_dynamic(config, 64)
    assert dynamic["model_type"] == NAME
    assert family_for(dynamic).transformer_config_kwargs(dynamic)["num_zero_experts"] == 64
    assert "zeda_latent_norm_eps" not in dynamic
    larger = _config(use_qk_norm=True, first_k_dense_replace=3, n_routed_experts=160)  # as in GLM-4.5
    assert family_for(larger).transformer_config_kwargs(larger)["qk_layernorm"]


@pytest.mark.parametrize("layout", ["per_expert", "fused"])
@pytest.mark.parametrize(("norm", "bias"), [(False, True), (True, False)])
def test_the_table_has_the_names_of_stock_transformers(layout: Any, norm: bool, bias: bool) -> None:
    config = _config(num_hidden_layers=3, n_routed_experts=8, use_qk_norm=norm, attention_bias=bias)
    table = family_for(config).weight_table(config, layout)
    assert {piece.name: piece.tensor_shape for row in table for piece in row.pieces} == stock_shapes(config, layout)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        *[
            ({key: ...}, f"`{key}` is missing")
            for key in (
                "num_key_value_heads",
                "n_routed_experts",
                "n_shared_experts",
                "routed_scaling_factor",
                "first_k_dense_replace",
                "partial_rotary_factor",
                "rope_theta",
            )
        ],
        ({"num_key_value_heads": 7}, "`num_key_value_heads` is wrong"),
        ({"head_dim": None, "hidden_size": 4000}, "`head_dim` is missing"),
        ({"use_qk_norm": "yes"}, "`use_qk_norm` is wrong"),
        ({"attention_bias": 1}, "`attention_bias` is wrong"),
        ({"partial_rotary_factor": 0.3}, "`partial_rotary_factor` is wrong"),
        ({"partial_rotary_factor": 1.5}, "`partial_rotary_factor` is wrong"),
        (
            {"rope_parameters": {"rope_theta": 1e6, "partial_rotary_factor": 0.25}},
            "in `rope_parameters` is wrong.*0.5, the",
        ),
        *[
            ({"partial_rotary_factor": ..., "rope_parameters": {"rope_theta": 1e6, **factor}}, match)
            for factor, match in (
                ({"partial_rotary_factor": 0}, "rope_parameters: `partial_rotary_factor` is wrong"),
                ({"partial_rotary_factor": -0.5}, "rope_parameters: `partial_rotary_factor` is wrong"),
                ({"partial_rotary_factor": True}, "rope_parameters: `partial_rotary_factor` is wrong"),
                ({"partial_rotary_factor": 1.5}, "config.json: `partial_rotary_factor` is wrong"),
                ({}, "`partial_rotary_factor` is missing"),
            )
        ],
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "scaled rotary"),
        ({"first_k_dense_replace": ..., "mlp_layer_types": ["dense"] + ["sparse"] * 45}, "`first_k_dense_replace`"),
        ({"n_group": 8}, "`n_group`"),
        ({"norm_topk_prob": False}, "`norm_topk_prob`"),
        ({"quantization_config": {"quant_method": "fp8"}}, "`quantization_config`"),
        ({"architectures": ["Glm4MoePlusPlusForCausalLM"]}, "`zce_nums` is missing"),
        ({"model_type": "glm4_moe_plus_plus"}, "`zce_nums` is missing"),
        ({**ZERO, "zeda_zero_logit_bias": math.inf}, "`zeda_zero_logit_bias` is wrong"),
    ],
)
def test_wrong_keys_of_glm4_moe_are_refused(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(InputError, match=match) as caught:
        family_for(_config(**changes))
    assert str(caught.value).startswith("some/config.json")
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def air(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with static/, dynamic/, both as Megatron checkpoints, and dense/: all from the same weights."""
    root = tmp_path_factory.mktemp("air")
    make_hf(root / "static", family=NAME, num_hidden_layers=3, mtp=True)
    inject_zero_experts(root / "static", root / "dynamic", num_zero_experts=3)
    make_dense_zeros(root / "dynamic", root / "dense")
    for name in ("static", "dynamic", "dense"):
        hf_to_megatron(root / name, root / f"megatron-{name}")
    return root


@pytest.mark.parametrize(
    ("dtype", "fused", "mtp", "changes"),
    [
        (torch.float32, False, True, {}),
        (torch.bfloat16, True, False, {"tie_word_embeddings": True, "use_qk_norm": False}),
        (torch.bfloat16, False, True, {"attention_bias": False, "first_k_dense_replace": 0}),
    ],
)
def test_law_4_air_round_trip_is_bit_equal(
    tmp_path: Path, dtype: torch.dtype, fused: bool, mtp: bool, changes: dict[str, Any]
) -> None:
    make_hf(tmp_path / "hf", family=NAME, dtype=dtype, fused=fused, mtp=mtp, **changes)
    inject_zero_experts(tmp_path / "hf", tmp_path / "dynamic")
    hf_to_megatron(tmp_path / "dynamic", tmp_path / "megatron")
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    assert_same_bits(read_tensors(tmp_path / "dynamic"), read_tensors(tmp_path / "back"))
    config, back = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("dynamic", "back"))
    assert config == back
    assert load_hf_model(tmp_path / "back")(IDS).logits.equal(load_hf_model(tmp_path / "dynamic")(IDS).logits)


def test_injection_keeps_the_drafting_layer_static(air: Path) -> None:
    new = read_tensors(air / "dynamic")
    assert new["model.layers.3.mlp.gate.weight"][EXPERTS:].equal(torch.zeros(3, 32))
    assert new[f"model.layers.3.mlp.gate.{BIAS}"][EXPERTS:].equal(torch.full((3,), NEVER_SELECTED))
    bias = f"model.layers.2.mlp.gate.{BIAS}"
    assert new[bias][EXPERTS:].equal(draw_zero_entries(new[bias][:EXPERTS], 3, seed=0, name=bias))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_qk_norm": False},
        {"attention_bias": False},
        {"tie_word_embeddings": True, "n_shared_experts": 2, "first_k_dense_replace": 2},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.25}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 1.0}},
        {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 8},
    ],
)
def test_static_air_logits_are_stock_transformers(megatron: None, tmp_path: Path, changes: dict[str, Any]) -> None:
    hf = make_hf(tmp_path / "hf", family=NAME, num_hidden_layers=3, **changes)
    hf_to_megatron(hf, tmp_path / "megatron")
    expected = load_hf_model(hf)(IDS).logits
    assert expected.std() > 0.5  # the comparison means something
    torch.testing.assert_close(megatron_logits(_loaded(tmp_path / "megatron"), IDS), expected, atol=2e-5, rtol=0)


def test_dynamic_air_logits_are_dense_zeros_and_the_export_s(megatron: None, air: Path, tmp_path: Path) -> None:
    model = _loaded(air / "megatron-dynamic")
    logits = megatron_logits(model, IDS)
    torch.testing.assert_close(logits, load_hf_model(air / "dense")(IDS).logits, atol=2e-5, rtol=0)
    assert 0.1 < float(router_statistics(model).skip_rate) < 0.9
    megatron_to_hf(air / "megatron-dynamic", tmp_path / "export")
    torch.testing.assert_close(load_hf_model(tmp_path / "export")(IDS).logits, logits, atol=2e-5, rtol=0)


def test_law_1_air_masked_student_is_the_teacher(megatron: None, air: Path, tmp_path: Path) -> None:
    student, teacher = _loaded(air / "megatron-dynamic"), _loaded(air / "megatron-static")
    with masked_zero_experts(student):
        masked = megatron_logits(student, IDS)
    torch.testing.assert_close(masked, megatron_logits(teacher, IDS), atol=1e-5, rtol=0)
    padded = _loaded(air / "megatron-dense")
    for router in (module for module in padded.modules() if isinstance(module, TopKRouter)):
        router.expert_bias[EXPERTS:] = float("-inf")
    assert masked.equal(megatron_logits(padded, IDS))
    assert not masked.equal(megatron_logits(student, IDS))
    edit_config(air / "dynamic", tmp_path / "off", zeda_zero_logit_bias=float("-inf"))
    torch.testing.assert_close(load_hf_model(tmp_path / "off")(IDS).logits, masked, atol=2e-5, rtol=0)


@pytest.mark.parametrize(("dense", "norm", "bias"), [(0, True, False), (1, False, True), (2, True, True)])
def test_megatron_saves_the_keys_of_air_s_table(
    megatron: None, tmp_path: Path, dense: int, norm: bool, bias: bool
) -> None:
    from full_size import saved_blocks

    changes = {"first_k_dense_replace": dense, "use_qk_norm": norm, "attention_bias": bias}
    config = load_hf_config(make_hf(tmp_path, family=NAME, num_hidden_layers=3, **changes))
    dynamic = family_for(config).make_dynamic(config, 2)
    saved = {key: shape for key, shape, _, _ in saved_blocks(megatron_model(dynamic))}
    assert saved == {row.key: row.global_shape for row in family_for(dynamic).weight_table(dynamic)}


def test_worked_shape_of_air() -> None:
    """By hand: 45 layers of 128 experts beside a shared one, one dense layer, 96 query and 2 x 8 other heads."""
    from megatron_zeda.evaluation import ModelShape

    shape = ModelShape.from_hf_config(_config())
    attention = 4096 * (96 + 2 * 8) * 128 + 96 * 128 * 4096
    assert shape.fixed == 46 * attention + 45 * 3 * 4096 * 1408 + 3 * 4096 * 10944
    assert shape.expert == 45 * 3 * 4096 * 1408
    assert shape.router_column == 45 * 4096
    assert shape.scores == 46 * 96 * (128 + 128)


def test_rollouts_are_greedy_tokens_of_generate(air: Path) -> None:
    from megatron_zeda.rollout import Request, Sampling, TransformersEngine

    for name in ("static", "dynamic"):
        engine = TransformersEngine(air / name)
        requests = [Request([3, 9, 17], 0), Request([5, 8], 1)]
        responses = engine.generate(requests, Sampling(max_new_tokens=6, temperature=0.0))
        for prompt, response in zip([[3, 9, 17], [5, 8]], responses, strict=True):
            wanted = engine.model.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False, pad_token_id=0)
            assert response.ids == wanted[0, len(prompt) :].tolist()


def test_speculative_decoding_with_the_drafting_layer(air: Path) -> None:
    """transformers drafts with a layer of our model's class; the tokens are those of plain greedy decoding."""
    from transformers import GenerationConfig

    if not hasattr(GenerationConfig(), "use_mtp"):
        pytest.skip("this release of transformers does not draft")
    model = load_hf_model(air / "dynamic")
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    plain = model.generate(IDS[:1, :5], **options)
    assert model.generate(IDS[:1, :5], use_mtp=True, **options).equal(plain)
