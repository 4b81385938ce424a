"""The refusal table again, for GLM-4.7-Flash: latent attention, a dense layer, a shared expert, 47 layers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from config_cases import (
    A2A,
    CONTEXT,
    FIRST,
    FOUR_STAGES,
    FP8,
    LAST,
    LAYOUT,
    LOSS,
    PAPER,
    PIPELINE,
    SHAPE,
    UNFIT,
    VIRTUAL,
    make,
    only,
)
from test_zero_experts_config import REFUSED

from megatron_zeda.config import derived
from megatron_zeda.config_machine import check_with_megatron
from megatron_zeda.config_megatron import zero_expert_refusals
from megatron_zeda.config_refusals import RULES
from megatron_zeda.config_rules import find_problems
from megatron_zeda.evaluation import ModelShape
from megatron_zeda.zero_experts.config import REFUSALS

GLM = json.loads((Path(__file__).parents[2] / "examples/glm47_flash/config.json").read_text())
# What depends on the model's shape, and is therefore tried with numbers of its own below.
SHAPE_RULES = {"divisors", "layers", "positions", "num_zero_experts", "cp_a2a", "fp8_widths"}


def _whatever_the_shape(values: dict[str, Any], world_size: int) -> bool:
    return only(find_problems(make(**values), world_size=world_size, hf_config=SHAPE)).rule not in SHAPE_RULES


UNFIT_ANYWHERE = [case for case in UNFIT if _whatever_the_shape(*case[:2])]


@pytest.mark.parametrize(("values", "world_size", "key", "text"), UNFIT_ANYWHERE)
def test_what_fits_no_model_does_not_fit_this_one(values: dict[str, Any], world_size: int, key: str, text: str) -> None:
    found = find_problems(make(**values), world_size=world_size, hf_config=GLM)
    problem = only([problem for problem in found if problem.rule not in SHAPE_RULES])  # 47 layers break some, too
    assert problem.keys[0] == key and text in str(problem)


GLM_UNFIT: list[tuple[dict[str, Any], int, str, str]] = [
    ({"model__expert_model_parallel_size": 3, "train__global_batch_size": 120}, 3, "", "model's 64 experts"),
    ({"model__expert_tensor_parallel_size": 5, "train__global_batch_size": 120}, 5, "", "1536 units of an expert"),
    ({**PAPER, "model__tensor_model_parallel_size": 8}, 8, "model.tensor_model_parallel_size", "20 attention heads"),
    (
        PIPELINE,
        2,
        "model.pipeline_model_parallel_size",
        "47 layers; use a divisor of that number, or set model.account",
    ),
    (VIRTUAL, 2, "model.pipeline_model_parallel_size", "2 x 2 virtual stages does not divide"),
    (PIPELINE | {FIRST: 20, LAST: 20}, 2, "model.num_layers_in_first_pipeline_stage", "are not the model's 47"),
    (FOUR_STAGES | {FIRST: 12, LAST: 12}, 4, "model.num_layers_in_first_pipeline_stage", "leaves 23, which 2 other"),
    (PIPELINE | {LAYOUT: "Et*24|t*24L"}, 2, "model.pipeline_model_parallel_layout", "must match num_layers 47"),
    (PIPELINE | {LAYOUT: "Et*24|t*23mL"}, 2, "model.pipeline_model_parallel_layout", "mtp"),
    ({"model__seq_length": 204800}, 1, "model.seq_length", "above the model's 202752 positions"),
    ({"zero_experts__num_zero_experts": 64}, 1, "zero_experts.num_zero_experts", "but the model has 32"),
    (
        {**PAPER, "model__context_parallel_size": 2, "model__overrides": A2A},
        8,
        "model.overrides.cp_comm_type",
        "which do not divide 5 and 5 key-value heads",
    ),
    (FP8 | {"model__fp8_recipe": "mxfp8", "model__expert_tensor_parallel_size": 32}, 32, "model.fp8", "48 wide"),
]


@pytest.mark.parametrize(("values", "world_size", "key", "text"), GLM_UNFIT)
def test_what_does_not_fit_glm(values: dict[str, Any], world_size: int, key: str, text: str) -> None:
    problem = only(find_problems(make(**values), world_size=world_size, hf_config=GLM))
    assert problem.keys[0].startswith(key or "model.") and text in str(problem)
    assert problem.keys[0] in RULES[problem.rule].settings


def test_every_rule_about_the_shape_is_tried() -> None:
    found = {
        problem.rule
        for values, size, _, _ in GLM_UNFIT
        for problem in find_problems(make(**values), world_size=size, hf_config=GLM)
    }
    assert found == SHAPE_RULES


@pytest.mark.parametrize(
    ("values", "world_size"),
    [
        ({**PAPER, "model__seq_length": 32768}, 8),
        (VIRTUAL | {LOSS: True}, 2),
        (FOUR_STAGES | {LOSS: True, "model__virtual_pipeline_model_parallel_size": 3}, 4),
        (PIPELINE | {FIRST: 23}, 2),
        (FOUR_STAGES | {LAYOUT: "Et*6|(t*6|)*6t*5L", "model__virtual_pipeline_model_parallel_size": 2}, 4),
        (CONTEXT | {"model__overrides": {"cp_comm_type": "a2a"}}, 2),
        (FP8, 1),
        (FP8 | {"model__fp8_recipe": "mxfp8", **PAPER, "model__expert_model_parallel_size": 4}, 4),
        ({"model__recompute_granularity": "selective", "model__recompute_modules": ["mla_up_proj", "moe"]}, 1),
    ],
)
def test_what_fits_glm(values: dict[str, Any], world_size: int) -> None:
    config = make(**values)
    assert find_problems(config, world_size=world_size, hf_config=GLM) == []
    check_with_megatron(config, GLM)


def test_tensor_parallel_sizes_that_divide_the_heads_and_not_the_shared_expert() -> None:
    config = make(model__tensor_model_parallel_size=5, model__sequence_parallel=True, model__seq_length=4000)
    problem = only(find_problems(config, world_size=5, hf_config=GLM))
    assert problem.rule == "divisors" and "5 does not divide the model's 1536 units of the shared experts" in str(
        problem
    )


def test_layers_on_stages() -> None:
    facts = derived(make(**FOUR_STAGES | {LOSS: True, "model__virtual_pipeline_model_parallel_size": 3}), 4, GLM)
    assert facts["layers_per_stage"] == "4 + 4 + 4 | 4 + 4 + 4 | 4 + 4 + 4 | 4 + 4 + 3"
    assert facts["target_skip_rate"] == 0.5 and facts["num_zero_experts"] == 32


def test_what_the_example_says_about_stages() -> None:
    """The output layer is the work of 4.6 layers, 3.4 of which are recomputed; 8 layers leave room for that."""
    facts = derived(make(**PIPELINE | {"model__pipeline_model_parallel_size": 4, LAST: 8}), 4, GLM)
    assert facts["layers_per_stage"] == "13 | 13 | 13 | 8"
    shape = ModelShape.from_hf_config(GLM)
    columns = shape.router_column * (shape.experts + shape.zero_experts)
    layer = (shape.fixed + columns + shape.topk * shape.expert) / GLM["num_hidden_layers"]
    output = GLM["vocab_size"] * GLM["hidden_size"]
    assert (round(layer / 1e6), round(output / 1e6), shape.scores / GLM["num_hidden_layers"]) == (69, 317, 10240)
    assert (round(output / layer, 1), round(output * 3 / (layer * 4), 1)) == (4.6, 3.4)


@pytest.mark.parametrize(
    ("change", "noun"),
    [
        ({"hidden_size": 2040}, "hidden states are 2040"),
        ({"q_lora_rank": 760}, "latent queries are 760"),
        ({"kv_lora_rank": 520}, "latent keys and values are 520"),
        ({"qk_rope_head_dim": 72}, "latent keys and values with the rotary part are 584"),
        ({"num_attention_heads": 4, "num_key_value_heads": 4, "qk_nope_head_dim": 62}, "queries are 504"),
        ({"num_attention_heads": 4, "num_key_value_heads": 4, "v_head_dim": 254}, "outputs of attention are 1016"),
        ({"moe_intermediate_size": 1544}, "units of the shared experts are 1544"),
        ({"intermediate_size": 10248}, "units of a dense layer are 10248"),
    ],
)
def test_fp8_asks_for_widths_of_latent_attention(change: dict[str, Any], noun: str) -> None:
    shape = GLM | change
    found = find_problems(make(**FP8), world_size=1, hf_config=shape)
    assert any(noun in str(problem) for problem in found) and {problem.rule for problem in found} == {"fp8_widths"}
    assert not find_problems(make(), world_size=1, hf_config=shape)


def test_fp8_widths_are_those_of_one_rank() -> None:
    """Latent vectors are on every rank as a whole; what is split may be too narrow then."""
    shape = GLM | {"moe_intermediate_size": 1568}
    four = make(**FP8, **PAPER)
    assert not find_problems(make(**FP8), world_size=1, hf_config=shape)
    [problem] = find_problems(four, world_size=8, hf_config=shape)
    assert "units of the shared experts are 392 wide" in str(problem)
    assert problem.keys[-1] == "model.tensor_model_parallel_size"


@pytest.mark.parametrize(
    "name",
    [
        "q_lora_rank",
        "multi_latent_attention",
        "latent_norm_epsilon",
        "moe_layer_freq",
        "moe_router_enable_expert_bias",
        "moe_router_bias_update_rate",
        "moe_router_topk_scaling_factor",
        "moe_shared_expert_intermediate_size",
        "mscale_all_dim",
        "rotary_scaling_factor",
        "apply_rope_fusion",
        "cache_mla_latents",
        "mla_down_proj_fusion",
    ],
)
def test_overrides_do_not_make_another_glm(name: str) -> None:
    problem = only(find_problems(make(model__overrides={name: 1}), world_size=1, hf_config=GLM))
    assert problem.keys == (f"model.overrides.{name}",) and problem.fix.startswith("remove it")


@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda refusal: refusal.setting)
def test_every_refusal_of_zero_experts_holds_for_latent_attention(refusal: Any) -> None:
    if "num_topk" in refusal.setting:
        pytest.skip("depends on the Transformer Engine that is installed")
    config = make()
    model = replace(config.model, overrides={"bf16": False, **REFUSED[refusal.setting]})
    messages = [text for _, text in zero_expert_refusals(replace(config, model=model), GLM)]
    assert len(messages) == 1 and refusal.reason in messages[0]
    assert zero_expert_refusals(config, GLM) == []
