"""Configurations that break one rule each, for the tests of every family."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_zeda.config import Config
from megatron_zeda.config_refusals import Problem

SHAPE = json.loads((Path(__file__).parents[1] / "examples/qwen3_30b_a3b/config.json").read_text())


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


PAPER = {
    "model__tensor_model_parallel_size": 4,
    "model__sequence_parallel": True,
    "model__expert_model_parallel_size": 8,
}
# What is changed, the number of processes, the setting that is named first, and words of the message.
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
STAGE_2 = {
    "train__stage": 2,
    "dataset__train": [],
    "rollout__prompts": ["p"],
    "teacher__checkpoint": "t",
}
SERVER = STAGE_2 | {
    "rollout__engine": "vllm",
    "rollout__url": "http://localhost:8000/v1",
    "rollout__reload": "vllm",
}
SAMPLED = STAGE_2 | {"distillation__estimator": "sampled"}
TEACHER = {"teacher__checkpoint": "original"}
DEFERRED = {"defer_embedding_wgrad_compute": True, "gradient_accumulation_fusion": True}
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
    (
        {"zero_experts__skip_rate_gain": 0.1, "zero_experts__balance_coeff": 0.0},
        1,
        "zero_experts.skip_rate_gain",
        "coefficient is 0",
    ),
    ({"zero_experts__method": "net"}, 1, "zero_experts.method", "this model is one of method `zeda`"),
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
    ({"distillation__forward_kl": 0.5}, 1, "teacher.checkpoint", "not given, and distillation.forward_kl is 0.5"),
    ({"distillation__reverse_kl": 1.0}, 1, "teacher.checkpoint", "not given, and distillation.reverse_kl is 1"),
    (
        TEACHER | {"distillation__reverse_kl": 1.0, "distillation__estimator": "sampled"},
        1,
        "distillation.estimator",
        "sampled in stage 1, whose tokens the student did not sample",
    ),
    ({"distillation__temperature": 2.0}, 1, "distillation.temperature", "2.0 has no effect without a KL"),
    ({"distillation__chunk_size": 8}, 1, "distillation.chunk_size", "no effect without a KL in the objective"),
    (
        TEACHER | {"distillation__forward_kl": 1.0, "distillation__estimator": "topk"},
        1,
        "distillation.estimator",
        "topk has no effect without a reverse KL",
    ),
    (
        TEACHER | {"distillation__reverse_kl": 1.0, "distillation__topk": 8},
        1,
        "distillation.topk",
        "8 has no effect without a reverse KL with estimator topk",
    ),
    ({"distillation__importance_cap": 0.5}, 1, "distillation.importance_cap", "0.5 has no effect without responses"),
    (
        TEACHER | PIPELINE | {"distillation__forward_kl": 1.0, "model__overrides": DEFERRED},
        2,
        "model.overrides.defer_embedding_wgrad_compute",
        "leaves nothing to defer; remove it",
    ),
    (
        STAGE_2 | {"distillation__reverse_kl": 0.0, "distillation__cross_entropy": 1.0},
        1,
        "distillation.reverse_kl",
        "without a KL nothing of the teacher is in them",
    ),
    ({"teacher__fp8_recipe": "blockwise"}, 1, "teacher.fp8_recipe", "blockwise has no effect with teacher.fp8 model"),
    ({"teacher__fp8": "hybrid", "model__bf16": False}, 1, "teacher.fp8", "computes in bf16; set model.bf16=true"),
    (
        FP8 | {"teacher__fp8": "e4m3", "teacher__fp8_recipe": "mxfp8"},
        1,
        "teacher.fp8_recipe",
        "mxfp8, and model.fp8_recipe is tensorwise; use null",
    ),
    (
        TEACHER | FOR_32_RANKS | {"teacher__fp8": "hybrid"},
        32,
        "teacher.fp8",
        "units of an expert are 24 wide on a rank, and tensorwise takes multiples of 16",
    ),
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
    ({"rollout__prompts": ["p"], "rollout__top_p": 0.9}, 1, "rollout.prompts", "no effect in stage 1"),
    (STAGE_2 | {"rollout__prompts": []}, 1, "rollout.prompts", "no prompts to answer; name one or more jsonl files"),
    (STAGE_2 | {"dataset__train": ["t"]}, 1, "dataset.train", "no effect in stage 2"),
    (STAGE_2 | {"rollout__samples_per_prompt": 3}, 1, "rollout.samples_per_prompt", "3 does not divide global_batch"),
    (SERVER | {"rollout__url": None}, 1, "rollout.url", "not given, and rollout.engine is vllm"),
    (STAGE_2 | {"rollout__url": "http://localhost:8000/v1"}, 1, "rollout.url", "which is no server; remove it"),
    (STAGE_2 | {"rollout__reload": "vllm"}, 1, "rollout.reload", "no effect with rollout.engine megatron"),
    (STAGE_2 | CONTEXT, 2, "model.context_parallel_size", "a new token cannot be split; use 1, or a server"),
    (SERVER | {"rollout__routing_replay": True}, 1, "rollout.routing_replay", "does not tell how it routed"),
    (
        STAGE_2 | {"rollout__routing_replay": True, "model__overrides": {"moe_router_fusion": True}},
        1,
        "model.overrides.moe_router_fusion",
        "the fused router ignores recorded routing without a word",
    ),
    (
        STAGE_2 | {"rollout__routing_replay": True, "rollout__steps_per_rollout": 2, "rollout__max_staleness": 1},
        1,
        "rollout.routing_replay",
        "true with steps_per_rollout 2",
    ),
    (STAGE_2 | {"rollout__top_p": 0.0}, 1, "rollout.top_p", "leaves no token"),
    (STAGE_2 | {"rollout__temperature": 0.0}, 1, "rollout.temperature", "2 greedy responses to a prompt are the same"),
    (
        SAMPLED | {"rollout__temperature": 0.0, "rollout__samples_per_prompt": 1},
        1,
        "rollout.temperature",
        "temperature 0 and top_p 1 with estimator sampled",
    ),
    (SAMPLED | {"rollout__top_p": 0.9}, 1, "rollout.temperature", "use distillation.estimator=full"),
    (STAGE_2 | {"rollout__steps_per_rollout": 4}, 1, "rollout.max_staleness", "with steps_per_rollout 4"),
    (SERVER | {"rollout__reload": None}, 1, "rollout.reload", "after 1 of 10 steps its responses are too old"),
    (
        SERVER | {"rollout__reload": None, "train__train_iters": None, "train__train_epochs": 1},
        1,
        "rollout.reload",
        "too old after one step",
    ),
    (SERVER | {"rollout__url": "localhost:8000"}, 1, "rollout.url", "'localhost:8000' is no address of a server"),
    (SERVER | {"rollout__url": "http://[::1"}, 1, "rollout.url", "is no address of a server"),
    (SERVER | {"rollout__reload": "sglang"}, 1, "rollout.reload", "whose server has no such call"),
]
