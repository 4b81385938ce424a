"""The Qwen3-MoE family: what is read, what is refused, and a table that covers the model exactly once."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_zeda.errors import InputError
from megatron_zeda.models import (
    HfConfig,
    Packing,
    build_transformer_config,
    family_for,
    load_hf_config,
    parallel_problems,
)

QWEN3_30B_A3B: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "decoder_sparse_step": 1,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "max_window_layers": 48,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.001,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 151936,
}
ZERO = {
    "architectures": ["Qwen3MoePlusPlusForCausalLM"],
    "zce_nums": [64],
    "zce_types": ["zero"],
    "use_zce_mask": False,
}


def _config(**changes: Any) -> HfConfig:
    values = {**QWEN3_30B_A3B, **changes}
    return HfConfig({key: value for key, value in values.items() if value is not ...}, where="some/config.json")


def test_the_published_configuration() -> None:
    config = _config()
    kwargs = family_for(config).transformer_config_kwargs(config)
    expected = {
        "num_layers": 48,
        "hidden_size": 2048,
        "num_attention_heads": 32,
        "num_query_groups": 4,
        "kv_channels": 128,
        "num_moe_experts": 128,
        "moe_router_topk": 8,
        "moe_ffn_hidden_size": 768,
        "moe_router_pre_softmax": False,
        "moe_router_dtype": "fp32",
        "qk_layernorm": True,
        "layernorm_epsilon": 1e-6,
        "num_zero_experts": 0,
        "zero_expert_logit_bias": 0.0,
        "moe_aux_loss_coeff": 0.0,
    }
    assert expected.items() <= kwargs.items()
    model = family_for(config).gpt_model_kwargs(config)
    assert (model["vocab_size"], model["rotary_base"]) == (151936, 1e6)
    assert model["share_embeddings_and_output_weights"] is False


def test_the_published_table_has_the_published_size() -> None:
    """30.5 billion parameters, names and shapes of stock transformers on the meta device."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = _config(num_hidden_layers=2)
    with torch.device("meta"):
        stock = Qwen3MoeForCausalLM(Qwen3MoeConfig(**{key: v for key, v in config.items() if key != "architectures"}))
    fused = {name: tuple(tensor.shape) for name, tensor in stock.state_dict().items()}
    table = family_for(config).weight_table(config, "fused")
    assert {piece.name: piece.tensor_shape for row in table for piece in row.pieces} == fused
    full = _config()
    rows = family_for(full).weight_table(full)
    assert sum(row.numel for row in rows) == 30_532_122_624
    assert len(rows) == 48 * (7 + 2 * 128) + 3


@pytest.mark.parametrize("layout", ["per_expert", "fused"])
@pytest.mark.parametrize("tied", [False, True])
def test_every_block_and_every_piece_once(layout: Any, tied: bool) -> None:
    config = _config(num_hidden_layers=3, num_experts=8, tie_word_embeddings=tied, **{**ZERO, "zce_nums": [4]})
    rows = family_for(config).weight_table(config, layout)
    assert max(Counter((row.key, row.index) for row in rows).values()) == 1
    assert max(Counter((piece.name, piece.slot) for row in rows for piece in row.pieces).values()) == 1
    for key in {row.key for row in rows}:
        blocks = [row for row in rows if row.key == key]
        assert len(blocks) == math.prod(blocks[0].extent)
        assert len({(row.global_shape, row.extent) for row in blocks}) == 1
    assert [row.pieces[0].shape for row in rows if row.grow is not None] == [(12, 2048)] * 3
    assert ("output_layer.weight" in {row.key for row in rows}) != tied


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_packing_against_a_loop(groups: int) -> None:
    """Megatron's order, written out: for each query group its queries, its key, its value."""
    heads, dim, hidden = 8, 3, 5
    query, key, value = (torch.randn(n * dim, hidden) for n in (heads, groups, groups))
    expected = []
    for group in range(groups):
        each = heads // groups
        expected += [query[(group * each + head) * dim :][:dim] for head in range(each)]
        expected += [key[group * dim :][:dim], value[group * dim :][:dim]]
    packed = Packing(groups).pack([query, key, value])
    assert packed.equal(torch.cat(expected))
    shapes = [tuple(tensor.shape) for tensor in (query, key, value)]
    for got, want in zip(Packing(groups).unpack(packed, shapes), (query, key, value), strict=True):
        assert got.equal(want)


def test_both_numbers_of_experts_are_read() -> None:
    family = family_for(_config())
    assert family.num_experts(_config(num_experts=..., num_local_experts=16)) == 16
    assert family.num_experts(_config(num_local_experts=128)) == 128


def test_transformers_5_rope_parameters_are_read() -> None:
    config = _config(rope_theta=..., rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    assert family_for(config).gpt_model_kwargs(config)["rotary_base"] == 5e5


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        *[
            ({key: ...}, f"`{key}` is missing")
            for key in (
                "vocab_size",
                "hidden_size",
                "num_hidden_layers",
                "num_attention_heads",
                "num_key_value_heads",
                "moe_intermediate_size",
                "num_experts",
                "num_experts_per_tok",
                "norm_topk_prob",
                "rms_norm_eps",
                "rope_theta",
            )
        ],
        ({"hidden_size": "2048"}, "`hidden_size` is wrong"),
        ({"hidden_size": 0}, "`hidden_size` is wrong"),
        ({"num_hidden_layers": True}, "`num_hidden_layers` is wrong"),
        ({"num_experts": 128.0}, "`num_experts`"),
        ({"num_experts": 4}, "`num_experts_per_tok` is too large"),
        ({"num_local_experts": 64}, "two numbers of experts"),
        ({"norm_topk_prob": "yes"}, "`norm_topk_prob` is wrong"),
        ({"rms_norm_eps": -1}, "`rms_norm_eps` is wrong"),
        ({"num_key_value_heads": 5}, "`num_key_value_heads` is wrong"),
        ({"attention_bias": True}, "`attention_bias`"),
        ({"use_sliding_window": True}, "`use_sliding_window`"),
        ({"hidden_act": "gelu"}, "`hidden_act`"),
        ({"mlp_only_layers": [0]}, "`mlp_only_layers`"),
        ({"decoder_sparse_step": 2}, "`decoder_sparse_step`"),
        ({"quantization_config": {"quant_method": "fp8"}}, "`quantization_config`"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "scaled rotary"),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "scaled rotary"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, "two different rotary bases"),
        ({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, "not supported"),
        ({"model_type": ...}, "not supported"),
        ({"architectures": ["Qwen3MoeForSequenceClassification"]}, "`architectures` does not fit"),
        ({**ZERO, "zce_nums": ...}, "`zce_nums` is missing"),
        ({**ZERO, "zce_types": ...}, "`zce_types` is missing"),
        ({**ZERO, "use_zce_mask": ...}, "`use_zce_mask` is missing"),
        ({"zce_nums": [64]}, "`zce_types` is missing"),  # one forgotten key is enough, whatever the architecture
        ({"architectures": ["Qwen3MoePlusPlusForCausalLM"]}, "`zce_nums` is missing"),
        ({"model_type": "qwen3_moe_plus_plus"}, "`zce_nums` is missing"),
        ({"zce_other": 1}, "`zce_nums` is missing"),
        ({**ZERO, "zce_nums": [0]}, "`zce_nums` is wrong"),
        ({**ZERO, "zce_nums": [32, 32]}, "`zce_nums` is wrong"),
        ({**ZERO, "zce_nums": 64}, "`zce_nums` is wrong"),
        ({**ZERO, "zce_types": ["copy"]}, "`zce_types` is wrong"),
        ({**ZERO, "use_zce_mask": True}, "`use_zce_mask` is wrong"),
        ({**ZERO, "use_zce_mask": 0}, "`use_zce_mask` is wrong"),
        ({**ZERO, "zeda_zero_logit_bias": "x"}, "`zeda_zero_logit_bias` is wrong"),
        ({**ZERO, "zeda_zero_logit_bias": math.inf}, "`zeda_zero_logit_bias` is wrong"),
    ],
)
def test_wrong_keys_are_refused(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(InputError, match=match) as caught:
        family_for(_config(**changes))
    assert str(caught.value).startswith("some/config.json")
    assert "\n" not in str(caught.value)


def test_a_dynamic_configuration() -> None:
    for changes in (ZERO, {**ZERO, "model_type": "qwen3_moe_plus_plus"}):
        config = _config(**changes, zeda_zero_logit_bias=-math.inf)
        kwargs = family_for(config).transformer_config_kwargs(config)
        assert (kwargs["num_moe_experts"], kwargs["num_zero_experts"]) == (128, 64)
        assert kwargs["zero_expert_logit_bias"] == -math.inf


@pytest.mark.parametrize("text", ["", "{", "[1]", '"x"', "\xff"])
def test_a_file_that_is_not_a_json_object(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match="JSON") as caught:
        load_hf_config(tmp_path)
    assert str(tmp_path / "config.json") in str(caught.value)


@pytest.mark.parametrize("written", ["-Infinity", '{"__float__": "-Infinity"}'])
def test_both_spellings_of_minus_infinity(tmp_path: Path, written: str) -> None:
    text = json.dumps({**QWEN3_30B_A3B, **ZERO, "zeda_zero_logit_bias": "HERE"}).replace('"HERE"', written)
    (tmp_path / "config.json").write_text(text)
    config = load_hf_config(tmp_path)
    assert family_for(config).transformer_config_kwargs(config)["zero_expert_logit_bias"] == -math.inf


def test_layouts_that_do_not_divide_are_named_all_at_once() -> None:
    problems = parallel_problems(_config(), tensor_model_parallel_size=5, expert_model_parallel_size=3)
    assert problems == [
        "expert_model_parallel_size 3 does not divide the model's 128 experts",
        "tensor_model_parallel_size 5 does not divide the model's 32 attention heads",
        "tensor_model_parallel_size 5 does not divide the model's 151936 tokens of the vocabulary",
        "expert_tensor_parallel_size 5 does not divide the model's 768 units of an expert",
        "tensor_model_parallel_size 5 is neither a multiple nor a divisor of the model's 4 key-value heads",
    ]
    assert parallel_problems(_config(), tensor_model_parallel_size=4, expert_model_parallel_size=8) == []
    with pytest.raises(InputError, match=r"expert_model_parallel_size 3 .*; .*32 attention heads"):
        build_transformer_config(_config(), tensor_model_parallel_size=5, expert_model_parallel_size=3)


def test_overrides_win_and_are_checked() -> None:
    config = build_transformer_config(_config(**ZERO), moe_router_topk=4, zero_expert_weight=3.0)
    assert (config.moe_router_topk, config.num_zero_experts, config.zero_expert_weight) == (4, 64, 3.0)
    with pytest.raises(InputError, match=r"did you mean `moe_router_topk`"):
        build_transformer_config(_config(), moe_router_top_k=4)
    with pytest.raises(InputError, match="Megatron-Core refuses"):
        build_transformer_config(_config(), moe_router_topk=1)


@pytest.mark.parametrize("size", [0, -2, 1.5, "2", True])
@pytest.mark.parametrize(
    "name", ["tensor_model_parallel_size", "expert_model_parallel_size", "expert_tensor_parallel_size"]
)
def test_parallel_sizes_that_are_none(name: str, size: Any) -> None:
    found = parallel_problems(_config(), **{name: size})
    assert found[0] == f"{name} {size!r} is not a positive integer"
    with pytest.raises(InputError, match=f"{name} .*is not a positive integer"):
        build_transformer_config(_config(), **{name: size})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("initializer_range", "a"),
        ("initializer_range", None),
        ("initializer_range", -0.02),
        ("intermediate_size", "x"),
        ("intermediate_size", None),
        ("intermediate_size", 0),
        ("head_dim", "128"),
        ("head_dim", 0),
    ],
)
def test_optional_keys_are_checked_when_they_are_there(key: str, value: Any) -> None:
    with pytest.raises(InputError, match=f"`{key}` is wrong"):
        family_for(_config(**{key: value}))
    if key != "head_dim":
        family_for(_config(**{key: ...}))


@pytest.mark.parametrize("value", [..., None])
def test_a_head_size_that_does_not_follow_from_the_others(value: Any) -> None:
    with pytest.raises(InputError, match="`head_dim` is missing"):
        family_for(_config(head_dim=value, hidden_size=2050))
    config = _config(head_dim=value)
    assert family_for(config).transformer_config_kwargs(config)["kv_channels"] == 64
