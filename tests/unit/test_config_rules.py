"""What must fit together: layouts, batches, the model's shape; and what this version refuses."""

from __future__ import annotations

import ast
import json
from dataclasses import fields
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from config_cases import (
    CONTEXT,
    DEFERRED,
    EMBEDDING,
    FIRST,
    FOUR_STAGES,
    FP8,
    LAST,
    LAYOUT,
    LOSS,
    PAPER,
    PIPELINE,
    SAMPLED,
    SERVER,
    SHAPE,
    STAGE_2,
    UNFIT,
    VIRTUAL,
    make,
    only,
)

from megatron_zeda import (
    config_distillation_rules,
    config_model_rules,
    config_pipeline_rules,
    config_rollout_rules,
    config_rules,
    config_server_rules,
)
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
)
from megatron_zeda.config_rules import find_problems, get


def test_the_starting_point_has_no_problems() -> None:
    assert find_problems(make(), world_size=4, hf_config=SHAPE) == []


def test_the_papers_layout() -> None:
    config = make(**PAPER, model__seq_length=32768)
    assert find_problems(config, world_size=8, hf_config=SHAPE) == []
    facts = derived(config, 8, SHAPE)
    assert (facts["data_parallel_size"], facts["expert_data_parallel_size"]) == (2, 1)
    assert (facts["num_micro_batches"], facts["tokens_per_step"]) == (64, 128 * 32768)
    assert (facts["num_experts"], facts["num_zero_experts"], facts["experts_per_rank"]) == (128, 64, 16)
    assert facts["target_skip_rate"] == 0.5 and facts["family"] == "qwen3_moe"


def test_what_a_teacher_in_the_step_takes() -> None:
    """By hand for Qwen3-30B-A3B at the paper's layout: 28.99 B parameters in experts over 8, 1.54 B others over 4."""
    config = make(**PAPER, model__seq_length=32768, teacher__checkpoint="t", distillation__forward_kl=1.0)
    facts = derived(config, 8, SHAPE)
    experts, others = 48 * 128 * 3 * 2048 * 768 / 8, (2 * 151936 * 2048 + 48 * 18.9e6) / 4
    gib = 2 * (experts + others) / 2**30
    assert float(facts["teacher_gib_placement_device"].split()[0]) == pytest.approx(gib, rel=0.02)
    assert facts["teacher_gib_placement_host"].endswith("during its pass and 0.145 between passes")
    # 128 sequences over two data-parallel and four tensor-parallel ranks, 2,048 bf16 values for each position.
    assert facts["teacher_states_gib"].startswith(f"{128 * 32768 / 8 * 2048 * 2 / 2**30:.3g} a step")
    assert "at most" not in facts["teacher_states_gib"]  # packs may be uneven over the ranks
    assert not any(key.startswith(("teacher_gib", "teacher_states")) for key in derived(make(**PAPER), 8, SHAPE))


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
        (PIPELINE | {"model__overrides": DEFERRED}, 2),  # Megatron-Core's own output layer and loss
        (STAGE_2, 1),
        (STAGE_2 | VIRTUAL | {"dataset__packing": True, "rollout__routing_replay": True}, 2),
        (STAGE_2 | {"rollout__steps_per_rollout": 4, "rollout__max_staleness": 3}, 1),
        (SERVER | CONTEXT, 2),
        (SERVER | {"rollout__reload": None, "rollout__max_staleness": 9}, 1),
        (SAMPLED, 1),
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
    assert derived(config, 2, SHAPE)["layers_per_stage"] == "0 + 18 | 30 + 0"


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
        "moe_router_topk_scaling_factor",
    ],
)
def test_overrides_do_not_make_another_model(name: str) -> None:
    problem = only(find_problems(make(model__overrides={name: 1}), world_size=1, hf_config=SHAPE))
    assert problem.keys == (f"model.overrides.{name}",)
    assert "the checkpoint decides it" in str(problem) and "config.json" in problem.fix


@pytest.mark.parametrize("name", ["softmax_scale", "mscale", "window_size"])
def test_overrides_that_are_in_no_checkpoint_are_not_looked_for_in_one(name: str) -> None:
    problem = only(find_problems(make(model__overrides={name: 1}), world_size=1, hf_config=SHAPE))
    assert problem.rule == "override_decided" and problem.fix == "remove it"
    assert "no family of this version has it" in str(problem)


def test_overrides_of_layout_performance_and_regularisation_pass() -> None:
    overrides = {"moe_grouped_gemm": True, "attention_dropout": 0.1, "hidden_dropout": 0.1, "moe_router_fusion": True}
    assert find_problems(make(model__overrides=overrides), world_size=1, hf_config=SHAPE) == []


def test_every_default_that_is_the_model_is_a_field_of_megatron() -> None:
    """A name that Megatron-Core renames must not silently stop being refused."""
    from megatron_zeda.zero_experts import ZeroExpertMLATransformerConfig

    assert {
        f.name for f in fields(ZeroExpertMLATransformerConfig)
    } >= MODEL_DEFAULTS | OVERRIDE_REFUSALS.keys() | OVERRIDABLE


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


@pytest.mark.parametrize(
    ("values", "topk"),
    [
        ({"zero_experts__method": "net"}, 4),
        ({"zero_experts__method": "net", "zero_experts__target_skip_rate": 0.25, "train__trainable": "router"}, 6),
        ({"zero_experts__method": "dynamic_skipping", "zero_experts__target_skip_rate": 0.4}, 8),
    ],
)
def test_methods_without_zero_experts_start_from_the_original_model(values: dict[str, Any], topk: int) -> None:
    assert find_problems(make(**values), hf_config=STATIC) == []
    facts = derived(make(**values), 1, STATIC)
    assert (facts["num_experts_per_tok"], facts["teacher_num_experts_per_tok"]) == (topk, 8)
    assert "zero_expert_weight" not in facts


def test_an_unknown_family_is_a_problem_of_the_model() -> None:
    problem = only(find_problems(make(model__hf="x"), hf_config={**SHAPE, "model_type": "llama"}))
    assert problem.keys == ("model.hf",)


STATIC = {key: value for key, value in SHAPE.items() if not key.startswith(("zce", "use_zce"))}
STATIC["architectures"] = ["Qwen3MoeForCausalLM"]
ADAMOE = SHAPE | {"zeda_renormalize": True}
COPY = SHAPE | {"zce_types": ["copy"], "zeda_expert_type": "copy"}
# What breaks the rules that UNFIT keeps: the change, the world size and the model's config.json.
ALSO_UNFIT: list[tuple[dict[str, Any], int, dict[str, Any]]] = [
    ({"model__checkpoint": None}, 1, SHAPE),
    ({"dataset__train": []}, 1, SHAPE),
    ({"logger__run_dir": None}, 1, SHAPE),
    ({"model__fp8": "hybrid", "model__fp8_recipe": "delayed"}, 1, SHAPE),
    ({"model__tensor_model_parallel_size": 3, "model__sequence_parallel": True, "model__seq_length": 24}, 3, SHAPE),
    ({"model__overrides": {"softmax_scale": 1.0}}, 1, SHAPE),
    ({"model__overrides": {"no_such_field": 1}}, 1, SHAPE),
    ({"model__overrides": {"moe_router_num_groups": 4}}, 1, SHAPE),
    ({"model__hf": "x"}, 1, {**SHAPE, "model_type": "llama"}),
    ({}, 1, STATIC),
    ({"zero_experts__method": "net", "zero_experts__weight": 3.0}, 1, STATIC),
    ({"zero_experts__method": "dynamic_skipping", "train__trainable": "router"}, 1, STATIC),
    ({"zero_experts__method": "net", "zero_experts__balance_tokens": "response"}, 1, STATIC),
    (SERVER | {"zero_experts__method": "net"}, 1, STATIC),
    (SERVER | {"zero_experts__logit_bias": 0.5}, 1, SHAPE),
    (SERVER | {"zero_experts__method": "copy"}, 1, COPY),
    (SERVER | {"zero_experts__method": "adamoe"}, 1, ADAMOE),
]


@pytest.mark.parametrize(
    ("values", "shape", "key", "words"),
    [
        (SERVER | {"zero_experts__method": "net"}, STATIC, "rollout.export_format", "dense-zeros cannot express"),
        (SERVER | {"zero_experts__method": "adamoe"}, ADAMOE, "rollout.export_format", "use zeda, or"),
        (SERVER | {"zero_experts__method": "copy"}, COPY, "zero_experts.method", "negative weights"),
        (
            {"zero_experts__method": "net", "zero_experts__balance_tokens": "response"},
            STATIC,
            "zero_experts.balance_tokens",
            "response has no effect with method net",
        ),
        (SERVER, SHAPE | {"zeda_zero_logit_bias": 0.5}, "zero_experts.logit_bias", "0.5 with dense-zeros"),
    ],
)
def test_methods_and_the_dial_ask_for_a_form(
    values: dict[str, Any], shape: dict[str, Any], key: str, words: str
) -> None:
    problem = only(find_problems(make(**values), world_size=1, hf_config=shape))
    assert problem.keys[0] == key and words in str(problem)


def test_servers_that_fit() -> None:
    """A form that expresses the method, a family whose selection bias carries the dial, weights that stay."""
    zeda = SERVER | {"rollout__export_format": "zeda"}
    assert not find_problems(make(**zeda, zero_experts__method="adamoe"), world_size=1, hf_config=ADAMOE)
    assert not find_problems(make(**zeda, zero_experts__logit_bias=0.5), world_size=1, hf_config=SHAPE)
    stays = SERVER | {"rollout__reload": None, "rollout__max_staleness": 9}
    assert not find_problems(make(**stays, zero_experts__logit_bias=0.5), world_size=1, hf_config=SHAPE)
    glm = json.loads((Path(__file__).parents[2] / "examples/glm47_flash/config.json").read_text())
    assert not find_problems(make(**SERVER, zero_experts__logit_bias=0.5), world_size=1, hf_config=glm)


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
    modules = (
        config_distillation_rules,
        config_model_rules,
        config_pipeline_rules,
        config_rollout_rules,
        config_rules,
        config_server_rules,
    )
    sources = [Path(module.__file__).read_text() for module in modules]
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
