"""What must fit together: layouts, batches, the model's shape; and what this version refuses."""

from __future__ import annotations

import ast
import json
from dataclasses import fields, replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_zeda import config_model_rules, config_pipeline_rules, config_rules
from megatron_zeda.config import (
    Config,
    derived,
    num_train_iters,
    num_warmup_iters,
    smallest_world_size,
    zero_expert_weight,
)
from megatron_zeda.config_megatron import layers_per_stage, pipeline_split
from megatron_zeda.config_refusals import (
    MODEL_DEFAULTS,
    NOT_IN_THIS_VERSION,
    OVERRIDABLE,
    OVERRIDE_REFUSALS,
    RULES,
    Problem,
)
from megatron_zeda.config_rules import find_problems, get

SHAPE = json.loads((Path(__file__).parents[2] / "examples/qwen3_30b_a3b/config.json").read_text())


def make(**values: Any) -> Config:
    """A valid configuration with ``section__key=value`` changed."""
    base = {
        "model__checkpoint": "c",
        "dataset__train": ["t"],
        "train__train_iters": 10,
        "logger__run_dir": "r",
    }
    config = Config()
    for key, value in (base | values).items():
        section, name = key.split("__")
        setattr(config, section, replace(getattr(config, section), **{name: value}))
    return config


def only(found: list[Problem]) -> Problem:
    assert len(found) == 1, [str(p) for p in found]
    return found[0]


def test_the_starting_point_has_no_problems() -> None:
    assert find_problems(make(), world_size=4, hf_config=SHAPE) == []


PAPER = {
    "model__tensor_model_parallel_size": 4,
    "model__sequence_parallel": True,
    "model__expert_model_parallel_size": 8,
}


def test_the_papers_layout() -> None:
    config = make(**PAPER, model__seq_length=32768)
    assert find_problems(config, world_size=8, hf_config=SHAPE) == []
    facts = derived(config, 8, SHAPE)
    assert (facts["data_parallel_size"], facts["expert_data_parallel_size"]) == (2, 1)
    assert (facts["num_micro_batches"], facts["tokens_per_step"]) == (64, 128 * 32768)
    assert (facts["num_experts"], facts["num_zero_experts"], facts["experts_per_rank"]) == (128, 64, 16)
    assert facts["target_skip_rate"] == 0.5 and facts["family"] == "qwen3_moe"


BATCH = {"train__global_batch_size": 120}
VIRTUAL_KEY = "model.virtual_pipeline_model_parallel_size"
VIRTUAL_FIELD = "model__virtual_pipeline_model_parallel_size"
VIRTUAL = {"model__pipeline_model_parallel_size": 2, "model__virtual_pipeline_model_parallel_size": 2}
FOUR_STAGES = {**VIRTUAL, "model__pipeline_model_parallel_size": 4}
GROUP = "microbatch_group_size_per_vp_stage"
PIPELINE = {"model__pipeline_model_parallel_size": 2}
OVERLAP_P2P, BATCH_P2P = "model.overrides.overlap_p2p_comm", "model.overrides.batch_p2p_comm"
EMBEDDING, LOSS = (f"model__account_for_{what}_in_pipeline_split" for what in ("embedding", "loss"))
FIRST, LAST = (f"model__num_layers_in_{end}_pipeline_stage" for end in ("first", "last"))
LAYOUT = "model__pipeline_model_parallel_layout"
CONTEXT = {"model__context_parallel_size": 2}
CP_COMM = "model.overrides.cp_comm_type"
A2A = {"cp_comm_type": ["p2p", "a2a"]}
FOR_32_RANKS = {"model__expert_tensor_parallel_size": 32}
GROUP_KEY = f"model.overrides.{GROUP}"
OFFLOAD = {"optimizer__optimizer_cpu_offload": True, "optimizer__use_precision_aware_optimizer": True}
FP8 = {"model__fp8": "hybrid", "model__fp8_recipe": "tensorwise"}
FP8_BLOCKS = {"model__fp8": "hybrid", "model__fp8_recipe": "blockwise"}


UNFIT: list[tuple[dict[str, Any], int, str, str]] = [
    (
        {**PAPER, "train__global_batch_size": 120},
        12,
        "model.expert_model_parallel_size",
        "8 does not divide the world",
    ),
    (
        {**PAPER, "model__expert_model_parallel_size": 2},
        2,
        "model.tensor_model_parallel_size",
        "tensor_model_parallel_size 4 does not divide the world size 2; change the sizes, or start a multiple of 4",
    ),
    (
        {**PAPER, "model__pipeline_model_parallel_size": 2},
        8,
        "model.expert_model_parallel_size",
        "expert_model_parallel_size 8 x pipeline_model_parallel_size 2 = 16 does not divide the world size 8",
    ),
    (
        {"model__expert_model_parallel_size": 3, **BATCH},
        3,
        "model.expert_model_parallel_size",
        "model's 128 experts",
    ),
    ({"model__expert_tensor_parallel_size": 5, **BATCH}, 5, "model.expert_tensor_parallel_size", "768 units"),
    ({"model__pipeline_model_parallel_size": 5}, 5, "model.pipeline_model_parallel_size", "model's 48 layers"),
    ({"train__global_batch_size": 130}, 4, "train.global_batch_size", "use 128 or 132"),
    ({"train__global_batch_size": 3}, 4, "train.global_batch_size", "use 4"),
    ({"model__seq_length": 50000}, 1, "model.seq_length", "above the model's 40960 positions"),
    ({"model__sequence_parallel": True}, 1, "model.sequence_parallel", "use false"),
    ({"model__tensor_model_parallel_size": 2}, 2, "model.sequence_parallel", "use true"),
    ({**PAPER, "model__seq_length": 4095}, 8, "model.seq_length", "use 4088 or 4096"),
    ({"zero_experts__num_zero_experts": 32}, 1, "zero_experts.num_zero_experts", "but the model has 64"),
    ({"zero_experts__target_skip_rate": 0.4, "zero_experts__weight": 3.0}, 1, "zero_experts.target_skip_rate", ""),
    ({"train__train_epochs": 1}, 1, "train.train_iters", "both are given"),
    ({"train__train_iters": None}, 1, "train.train_iters", "neither is given"),
    ({"scheduler__lr_warmup_iters": 10}, 1, "scheduler.lr_warmup_iters", "before step 10"),
    ({"optimizer__min_lr": 1.0}, 1, "optimizer.min_lr", "above lr"),
    ({"optimizer__optimizer_cpu_offload": True}, 1, "optimizer.optimizer_cpu_offload", "precision_aware"),
    ({"optimizer__optimizer_offload_fraction": 0.5}, 1, "optimizer.optimizer_offload_fraction", "no effect"),
    (OFFLOAD | {"model__bf16": False}, 1, "optimizer.optimizer_cpu_offload", "set model.bf16=true"),
    (
        OFFLOAD | {"optimizer__optimizer_offload_fraction": 0.0},
        1,
        "optimizer.optimizer_offload_fraction",
        "nothing",
    ),
    ({"optimizer__exp_avg_dtype": "bf16"}, 1, "optimizer.exp_avg_dtype", "needs"),
    ({"ddp__overlap_param_gather": True}, 1, "ddp.overlap_param_gather", "ddp.overlap_grad_reduce"),
    ({"distillation__cross_entropy": 0.0}, 1, "distillation.cross_entropy", "weight 0"),
    ({"model__recompute_method": "uniform"}, 1, "model.recompute_method", "no effect"),
    ({"model__recompute_modules": ["moe"]}, 1, "model.recompute_modules", "no effect"),
    (
        {"model__context_parallel_size": 2, "model__seq_length": 4098},
        2,
        "model.seq_length",
        "4098 is not a multiple of 16, to which micro-batches are padded (context_parallel_size 2); use 4096 or",
    ),
    (
        {
            **PAPER,
            "model__context_parallel_size": 2,
            "model__expert_model_parallel_size": 4,
            "model__seq_length": 24,
        },
        8,
        "model.seq_length",
        "16, to which micro-batches are padded (tensor_model_parallel_size 4, context_parallel_size 2)",
    ),
    ({"model__seq_length": 100}, 1, "model.seq_length", "are padded; use 96 or 104"),
    (FP8_BLOCKS | {"model__seq_length": 64}, 1, "model.seq_length", "are padded (fp8_recipe blockwise); use 128"),
    (FP8 | {"model__context_parallel_size": 2, "model__seq_length": 4112}, 2, "model.seq_length", "4096 or 4128"),
    ({"model__context_parallel_size": 2}, 3, "model.tensor_model_parallel_size", "context_parallel_size 2"),
    (
        {"model__virtual_pipeline_model_parallel_size": 2},
        1,
        "model.virtual_pipeline_model_parallel_size",
        "need pipeline_model_parallel_size above 1",
    ),
    (VIRTUAL | {VIRTUAL_FIELD: 1}, 2, VIRTUAL_KEY, "the pipeline as it is"),
    (
        VIRTUAL | {"model__virtual_pipeline_model_parallel_size": 5},
        2,
        "model.pipeline_model_parallel_size",
        "2 x 5",
    ),
    (
        VIRTUAL | {"train__global_batch_size": 12, "train__micro_batch_size": 4},
        2,
        "train.global_batch_size",
        "x 2, the micro-batches that virtual pipeline stages work on in turn, = 8; use 8 or 16",
    ),
    (
        VIRTUAL | {"model__overrides": {"batch_p2p_comm": True}},
        2,
        "model.overrides.batch_p2p_comm",
        "in the wrong order",
    ),
    (PIPELINE | {FIRST: 20, LOSS: True}, 2, "model.account_for_loss_in_pipeline_split", "not together with model.num"),
    ({LOSS: True}, 1, "model.account_for_loss_in_pipeline_split", "no effect in one pipeline stage"),
    (VIRTUAL | {FIRST: 20, LAST: 28}, 2, "model.num_layers_in_first_pipeline_stage", "give one of the two"),
    (VIRTUAL | {FIRST: 21}, 2, "model.num_layers_in_first_pipeline_stage", "not the same number in each of 2 virtual"),
    (PIPELINE | {FIRST: 20, LAST: 20}, 2, "model.num_layers_in_first_pipeline_stage", "20 + 20 layers are not"),
    (PIPELINE | {LAST: 48}, 2, "model.num_layers_in_last_pipeline_stage", "leaves 0, which 1 other pipeline stages"),
    (
        PIPELINE | {LOSS: True},
        2,
        "model.pipeline_model_parallel_size",
        "2 does not divide the model's 48 layers and loss",
    ),
    (
        {"model__pipeline_model_parallel_size": 7},
        7,
        "model.pipeline_model_parallel_size",
        "or set model.account_for_loss_in_pipeline_split=true, or set model.num_layers_in_first_pipeline_stage=6, or",
    ),
    (PIPELINE | {LAYOUT: "Et*24|t*23L"}, 2, "model.pipeline_model_parallel_layout", "must match num_layers 48"),
    (PIPELINE | {LAYOUT: "Et*12|t*12|t*12|t*12L"}, 2, "model.pipeline_model_parallel_layout", "4 parts, and 2 stages"),
    (PIPELINE | {LAYOUT: "Ex|tL"}, 2, "model.pipeline_model_parallel_layout", "Invalid layer character: x"),
    (PIPELINE | {LAYOUT: "|"}, 2, "model.pipeline_model_parallel_layout", "as many parts"),
    (FOUR_STAGES | {"model__overrides": {"batch_p2p_comm": True}}, 4, BATCH_P2P, "needs model.overrides.overlap"),
    (PIPELINE | {"model__overrides": {"overlap_p2p_comm": True}}, 2, OVERLAP_P2P, "needs virtual pipeline stages"),
    (
        FOUR_STAGES | {"model__overrides": {GROUP: 2}},
        4,
        GROUP_KEY,
        "work on pipeline_model_parallel_size 4 or more",
    ),
    (FOUR_STAGES | {"model__overrides": {GROUP: 4.0}}, 4, GROUP_KEY, "4.0, but"),
    (FOUR_STAGES | {"model__overrides": {GROUP: 256}}, 4, "train.global_batch_size", "128 is not a multiple of"),
    (CONTEXT | {"model__overrides": {"cp_comm_type": "a2a+p2p"}}, 2, CP_COMM, "'a2a+p2p' is not served"),
    (
        CONTEXT | {"model__overrides": {"cp_comm_type": ["p2p", "a2a+p2p"]}},
        2,
        CP_COMM,
        "use p2p, all_gather or a2a",
    ),
    (
        CONTEXT | {"model__context_parallel_size": 8, "model__overrides": A2A},
        8,
        CP_COMM,
        "do not divide 32 and 4 key-value heads",
    ),
    ({"model__fp8": "hybrid"}, 1, "model.fp8_recipe", "use tensorwise"),
    ({"model__fp8_recipe": "blockwise"}, 1, "model.fp8_recipe", "no effect without model.fp8"),
    (
        FP8 | FOR_32_RANKS,
        32,
        "model.fp8",
        "units of an expert are 24 wide on a rank, and tensorwise takes multiples of 16",
    ),
    (FP8 | {"model__bf16": False}, 1, "model.fp8", "set model.bf16=true"),
    (FP8 | {"model__overrides": {"fp8_param": True}}, 1, "model.overrides.fp8_param", "stay in bf16"),
    (
        {"model__overrides": {"moe_expert_capacity_factor": 0.0}},
        1,
        "model.overrides.moe_expert_capacity_factor",
        "the export routes without it",
    ),
    (
        {"model__overrides": {"moe_input_jitter_eps": 0.01}},
        1,
        "model.overrides.moe_input_jitter_eps",
        "the export routes without it",
    ),
    (
        {"model__overrides": {"moe_router_force_load_balancing": True}},
        1,
        "model.overrides.moe_router_force_load_balancing",
        "the export routes without it",
    ),
    ({"model__overrides": {"bf16": True}}, 1, "model.overrides.bf16", "set model.bf16"),
    ({"model__overrides": {"params_dtype": "x"}}, 1, "model.overrides.params_dtype", "set model.bf16"),
    ({"model__overrides": {"calculate_per_token_loss": False}}, 1, "model.overrides.calculate_per_token_loss", ""),
]


@pytest.mark.parametrize(("values", "world_size", "key", "text"), UNFIT)
def test_what_does_not_fit(values: dict[str, Any], world_size: int, key: str, text: str) -> None:
    problem = only(find_problems(make(**values), world_size=world_size, hf_config=SHAPE))
    assert problem.keys[0] == key and text in str(problem)


@pytest.mark.parametrize(
    ("values", "world_size"),
    [
        ({"model__context_parallel_size": 4, "model__expert_model_parallel_size": 4}, 4),
        (VIRTUAL, 2),
        (VIRTUAL | {"model__overrides": {"microbatch_group_size_per_vp_stage": 4}}, 2),
        (FOUR_STAGES | {"model__overrides": {"overlap_p2p_comm": False, "batch_p2p_comm": True}}, 4),
        (FOUR_STAGES | {"model__overrides": {"overlap_p2p_comm": False}}, 4),
        (VIRTUAL | {"model__overrides": {"overlap_p2p_comm": False}}, 2),
        (FOUR_STAGES | {FIRST: 6, LAST: 10}, 4),
        (PIPELINE | {LAST: 47}, 2),
        (VIRTUAL | {LAYOUT: "E|t*30|t*18|L"}, 2),
        (CONTEXT | {"model__overrides": {"cp_comm_type": "a2a"}}, 2),
        ({"model__overrides": {"cp_comm_type": "a2a+p2p"}}, 1),  # nothing is exchanged
        # Any number of conversations can be packed.
        ({"dataset__packing": True, "train__global_batch_size": 130}, 4),
        (VIRTUAL | {"dataset__packing": True, "train__global_batch_size": 1}, 2),
        (FP8, 1),
        ({"model__moe_token_dispatcher_type": "flex", "model__expert_model_parallel_size": 2}, 2),
    ],
)
def test_what_fits(values: dict[str, Any], world_size: int) -> None:
    assert find_problems(make(**values), world_size=world_size, hf_config=SHAPE) == []


def test_a_pipeline_is_refused_exactly_where_megatron_cannot_deal_out_the_layers() -> None:
    """Every small pipeline of every small model, with each way of uneven stages."""
    splits: list[dict[str, Any]] = [{}, {LOSS: True}, {EMBEDDING: True}, {EMBEDDING: True, LOSS: True}]
    splits += [{FIRST: count} for count in (1, 2, 3, 4)] + [{LAST: count} for count in (1, 2, 4)]
    splits += [{FIRST: first, LAST: last} for first in (1, 2, 4) for last in (1, 2, 3)]
    fits = 0
    for layers, stages, virtual in product(range(1, 14), (2, 3, 4), (None, 2, 3)):
        for split in splits:
            config = make(
                model__pipeline_model_parallel_size=stages,
                model__virtual_pipeline_model_parallel_size=virtual,
                train__global_batch_size=stages * 32,
                **split,
            )
            shape = SHAPE | {"num_hidden_layers": layers}
            problems = find_problems(config, world_size=stages, hf_config=shape)
            assert {problem.rule for problem in problems} <= {"layers", "pipeline_split"}
            dealt = megatrons_stages(layers, config)
            assert (dealt is None) == bool(problems), (layers, stages, virtual, split, dealt, problems)
            if dealt is not None:
                fits += 1
                assert layers_per_stage(config, layers) == dealt
    assert fits > 200


def megatrons_stages(layers: int, config: Config) -> list[list[int]] | None:
    """Layers of every virtual stage of every stage by Megatron-Core; None where it cannot place each layer once."""
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.transformer_block import get_num_layers_to_build
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

    stages, virtual = config.model.pipeline_model_parallel_size, config.model.virtual_pipeline_model_parallel_size
    parts: list[int | None] = [None] if virtual is None else list(range(virtual))
    try:
        model = TransformerConfig(
            num_layers=layers,
            hidden_size=8,
            num_attention_heads=1,
            pipeline_model_parallel_size=stages,
            virtual_pipeline_model_parallel_size=virtual,
            pipeline_dtype=torch.float32,
            **pipeline_split(config),
        )
        counts = [[get_num_layers_to_build(model, part, stage) for part in parts] for stage in range(stages)]
        firsts = [[get_transformer_layer_offset(model, part, stage) for part in parts] for stage in range(stages)]
    except (ValueError, AssertionError, ZeroDivisionError):
        return None
    placed = [
        layer
        for part in range(len(parts))
        for stage in range(stages)
        for layer in range(firsts[stage][part], firsts[stage][part] + counts[stage][part])
    ]
    return counts if placed == list(range(layers)) else None


def test_a_written_layout_is_counted_part_by_part() -> None:
    config = make(**VIRTUAL, **{LAYOUT: "E|t*30|t*18|L"})
    assert layers_per_stage(config, 48) == [[0, 18], [30, 0]]
    assert derived(config, 2, SHAPE)["layers_per_stage"] == ["0 + 18", "30 + 0"]


@pytest.mark.parametrize(
    "name",
    [
        "moe_router_topk",
        "rotary_base",
        "layernorm_epsilon",
        "moe_router_score_function",
        "moe_router_pre_softmax",
        "num_moe_experts",
        "moe_ffn_hidden_size",
        "softmax_scale",
        "moe_router_topk_scaling_factor",
    ],
)
def test_overrides_do_not_make_another_model(name: str) -> None:
    problem = only(find_problems(make(model__overrides={name: 1}), world_size=1, hf_config=SHAPE))
    assert problem.keys == (f"model.overrides.{name}",)
    assert "the checkpoint decides it" in str(problem) and "config.json" in problem.fix


def test_overrides_of_layout_performance_and_regularisation_pass() -> None:
    overrides = {"moe_grouped_gemm": True, "attention_dropout": 0.1, "hidden_dropout": 0.1, "moe_router_fusion": True}
    assert find_problems(make(model__overrides=overrides), world_size=1, hf_config=SHAPE) == []


def test_every_default_that_is_the_model_is_a_field_of_megatron() -> None:
    """A name that Megatron-Core renames must not silently stop being refused."""
    from megatron.core.transformer import TransformerConfig

    assert {f.name for f in fields(TransformerConfig)} >= MODEL_DEFAULTS | OVERRIDE_REFUSALS.keys() | OVERRIDABLE


def test_tensor_parallel_size_divides_heads_and_vocabulary() -> None:
    config = make(model__tensor_model_parallel_size=3, model__sequence_parallel=True, model__seq_length=24)
    found = [str(p) for p in find_problems(config, world_size=3, hf_config=SHAPE)]
    assert len(found) == 3
    for noun, line in zip(("32 attention heads", "151936 tokens", "4 key-value heads"), found, strict=True):
        assert line.startswith("model.tensor_model_parallel_size: 3") and noun in line


@pytest.mark.parametrize(
    ("recipe", "change", "noun"),
    [
        ("tensorwise", {"hidden_size": 2040}, "hidden states are 2040"),
        ("blockwise", {"head_dim": 2, "num_attention_heads": 36}, "outputs of attention are 72"),
        ("tensorwise", {"head_dim": 4, "num_attention_heads": 32, "num_key_value_heads": 1}, "values are 136"),
        ("mxfp8", {"moe_intermediate_size": 784}, "mxfp8 takes multiples of 32"),
    ],
)
def test_fp8_asks_for_widths(recipe: str, change: dict[str, Any], noun: str) -> None:
    config = make(model__fp8="hybrid", model__fp8_recipe=recipe)
    found = find_problems(config, world_size=1, hf_config=SHAPE | change)
    assert noun in str(found[0]) and {problem.keys[0] for problem in found} == {"model.fp8"}
    assert not find_problems(make(), world_size=1, hf_config=SHAPE | change)


def test_full_recompute_names_what_it_lacks() -> None:
    found = find_problems(make(model__recompute_granularity="full"))
    assert [p.keys[0] for p in found] == ["model.recompute_method", "model.recompute_num_layers"]


def test_a_static_model_is_not_trained() -> None:
    assert "inject_zero_experts" in str(only(find_problems(make(), hf_config=STATIC)))


def test_an_unknown_family_is_a_problem_of_the_model() -> None:
    problem = only(find_problems(make(model__hf="x"), hf_config={**SHAPE, "model_type": "llama"}))
    assert problem.keys == ("model.hf",)


STATIC = {key: value for key, value in SHAPE.items() if not key.startswith(("zce", "use_zce"))}
STATIC["architectures"] = ["Qwen3MoeForCausalLM"]
# What breaks the rules that UNFIT keeps: the change, the world size and the model's config.json.
ALSO_UNFIT: list[tuple[dict[str, Any], int, dict[str, Any]]] = [
    ({"model__checkpoint": None}, 1, SHAPE),
    ({"dataset__train": []}, 1, SHAPE),
    ({"logger__run_dir": None}, 1, SHAPE),
    ({"train__stage": 2}, 1, SHAPE),
    ({"model__tensor_model_parallel_size": 3, "model__sequence_parallel": True, "model__seq_length": 24}, 3, SHAPE),
    ({"model__overrides": {"softmax_scale": 1.0}}, 1, SHAPE),
    ({"model__overrides": {"no_such_field": 1}}, 1, SHAPE),
    ({"model__overrides": {"moe_router_num_groups": 4}}, 1, SHAPE),
    ({"model__hf": "x"}, 1, {**SHAPE, "model_type": "llama"}),
    ({}, 1, STATIC),
]


def test_every_rule_is_in_the_table_and_every_row_is_a_rule() -> None:
    """Bad configurations break all rows; each problem is reported at a setting that its row names."""
    every = [*((values, size, SHAPE) for values, size, _, _ in UNFIT), *ALSO_UNFIT]
    broken = [
        p for values, size, shape in every for p in find_problems(make(**values), world_size=size, hf_config=shape)
    ]
    assert {problem.rule for problem in broken} == RULES.keys()
    for problem in broken:
        settings = RULES[problem.rule].settings
        assert problem.keys[0] in settings or any("<" in setting for setting in settings), problem


def test_no_problem_is_without_a_row() -> None:
    """Read from the source, because a bad configuration for every branch is not at hand."""
    sources = [
        Path(module.__file__).read_text() for module in (config_rules, config_model_rules, config_pipeline_rules)
    ]
    calls = [node for text in sources for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
    rules = [ast.literal_eval(call.args[0]) for call in calls if ast.unparse(call.func) == "Problem"]
    assert len(rules) > 40 and set(rules) == RULES.keys()


@pytest.mark.parametrize("row", NOT_IN_THIS_VERSION, ids=lambda row: row.key)
def test_every_refusal_names_its_key_and_a_way_out(row: Any) -> None:
    """The default passes, another value does not."""
    others: dict[str, Any] = {
        "train.stage": 2,
        "zero_experts.method": "other",
        "teacher.placement": "host",
        "distillation.estimator": "topk",
        "model.fp8_recipe": "delayed",
        "logger.wandb_project": "p",
        "rollout.url": "http://localhost",
        "rollout.samples_per_prompt": 3,
    }
    keys = [key for key in others if key.startswith(f"{row.key}.")] or [row.key]
    for key in keys:
        default = get(Config(), key)
        value = others[key] if key in others else True if default is False else (default or 0) + 2
        needed = {"model__fp8": "hybrid"} if key == "model.fp8_recipe" else {}
        problem = only(find_problems(make(**{key.replace(".", "__"): value}, **needed)))
        assert problem.keys == (key,) and "refused" in str(problem) and problem.fix


def test_the_weight_that_a_target_asks_for_gives_the_target() -> None:
    for target in (0.1, 0.5, 0.75):
        config = make(zero_experts__target_skip_rate=target)
        weight = zero_expert_weight(config, 128, 64)
        assert weight * 64 / (128 + weight * 64) == pytest.approx(target, rel=1e-12)
        assert derived(config, 1, SHAPE)["target_skip_rate"] == pytest.approx(target, rel=1e-12)
    assert zero_expert_weight(make(), 128, 64) == 2.0


def test_the_length_of_a_run() -> None:
    epochs = make(train__train_iters=None, train__train_epochs=2)
    assert num_train_iters(epochs, None) is None
    assert num_train_iters(epochs, 128) == 2 and num_train_iters(epochs, 129) == 3
    assert num_train_iters(make(), 129) == 10
    assert num_warmup_iters(make(), 469) == 46
    assert num_warmup_iters(make(scheduler__lr_warmup_iters=3), 469) == 3
    assert num_warmup_iters(make(scheduler__lr_decay_iters=50), 469) == 5


def test_the_smallest_world_size_fits_both_layouts() -> None:
    assert smallest_world_size(make(**PAPER, model__pipeline_model_parallel_size=2)) == 16
    assert smallest_world_size(make(model__expert_model_parallel_size=3, model__tensor_model_parallel_size=2)) == 6


def test_where_a_run_lives() -> None:
    config = make()
    assert (config.run_dir, config.save_dir, config.load_dir) == (
        Path("r"),
        Path("r/checkpoints"),
        Path("r/checkpoints"),
    )
    assert config.hf_dir == config.tokenizer_path == Path("c/hf")
    other = make(checkpoint__save="s", model__hf="h", dataset__tokenizer="t.model")
    assert (other.save_dir, other.load_dir, other.hf_dir) == (Path("s"), Path("s"), Path("h"))
    assert other.tokenizer_path == Path("t.model")
    assert make(checkpoint__load="l").load_dir == Path("l")
