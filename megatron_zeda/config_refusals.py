"""What configurations are refused, as tables: the rules of :mod:`.config_rules`, settings and overrides.

``docs/generate_refusals.py`` writes docs/refusals.md from them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Rule:
    """What settings must fit together.

    Attributes:
        settings: dotted keys; every problem is reported at one of them.
        rule: what must be true.
        fix: what to do where it is not, a clause without a full stop.
    """

    settings: tuple[str, ...]
    rule: str
    fix: str


@dataclass(frozen=True)
class Problem:
    """One broken rule.

    Attributes:
        rule: its id in :data:`RULES`.
        keys: the settings involved, the one to look at first.
        message: what is wrong, with the values, a clause without a full stop.
        fix: what to write instead.
    """

    rule: str
    keys: tuple[str, ...]
    message: str
    fix: str = ""

    def __str__(self) -> str:
        return f"{self.keys[0]}: {self.message}" + (f"; {self.fix}" if self.fix else "")


@dataclass(frozen=True)
class Refusal:
    """A setting (or a whole section) that is known but not served: only ``accepted`` values pass.

    Attributes:
        key: dotted key; of a section, every setting in it is meant.
        reason: why, a clause without a full stop.
        fix: what to do instead.
        accepted: the values that pass; empty: the default only.
    """

    key: str
    reason: str
    fix: str = ""
    accepted: tuple[Any, ...] = ()


# By the id that problems name.
RULES: dict[str, Rule] = {
    "not_served": Rule(("<section>.<setting>",), "has a value that is served (next table)", "use one of those"),
    "checkpoint": Rule(("model.checkpoint",), "is given", "write one with `checkpoint_tools/hf_to_megatron.py`"),
    "training_data": Rule(("dataset.train",), "in stage 1 names a file or more", "name one or more jsonl files"),
    "run_dir": Rule(("logger.run_dir",), "is given", "name a folder of its own"),
    "run_length": Rule(("train.train_iters", "train.train_epochs"), "exactly one is given", "give exactly one"),
    "objective": Rule(("distillation.cross_entropy",), "a term of the objective has a weight above 0", "use 1.0"),
    "teacher_needed": Rule(
        ("teacher.checkpoint",), "given when a KL is in the objective", "name the Megatron folder of the original model"
    ),
    "deferred_output_gradient": Rule(
        ("model.overrides.defer_embedding_wgrad_compute",),
        "false when a KL is in the objective: the output layer is not called then, and Megatron-Core ends the first "
        "step with an error because nothing was deferred",
        "remove it",
    ),
    "stage_2_objective": Rule(
        ("distillation.reverse_kl",),
        "in stage 2 a KL is in the objective: the student's own responses teach it nothing else",
        "use 1.0",
    ),
    "sampled": Rule(
        ("distillation.estimator", "distillation.temperature"),
        "`sampled` in stage 2 only, with temperature 1: it needs tokens that the student sampled as it is",
        "use full",
    ),
    "term_settings": Rule(
        (
            "distillation.temperature",
            "distillation.chunk_size",
            "distillation.estimator",
            "distillation.topk",
            "distillation.clip_ratio_low",
            "distillation.clip_ratio_high",
            "distillation.importance_cap",
        ),
        "given only with the term they are about: the first two with a KL, the estimator with a reverse KL, the others "
        "with their estimator, the cap in stage 2",
        "remove it",
    ),
    "teacher_fp8": Rule(
        ("teacher.fp8", "teacher.fp8_recipe"),
        "a recipe only with e4m3 or hybrid, and the student's if that has one; both with `model.bf16` only",
        "use null, or set model.bf16=true",
    ),
    "sequence_parallel": Rule(
        ("model.sequence_parallel", "model.tensor_model_parallel_size"),
        "on exactly when the size is above 1: so Megatron-Core trains MoE layers",
        "turn it on, or off",
    ),
    "seq_length_multiple": Rule(
        ("model.seq_length",),
        "a multiple of what micro-batches are padded to: `context_parallel_size` times the least common multiple of 8 "
        "and `tensor_model_parallel_size`; with FP8 both sizes times 16 (mxfp8 32, blockwise 128)",
        "use one of the two multiples that the message names",
    ),
    "world_size": Rule(
        ("model.tensor_model_parallel_size", "model.expert_model_parallel_size"),
        "the world size is a multiple of tensor x context x pipeline sizes, and of expert x expert tensor x pipeline "
        "sizes",
        "change the sizes, or start a multiple of the number that the message names",
    ),
    "global_batch_size": Rule(
        ("train.global_batch_size",),
        "without packing, a multiple of `micro_batch_size` x data-parallel size; with virtual pipeline stages also "
        "x the micro-batches that they work on in turn (Megatron-Core also takes a smaller last group)",
        "use one of the two multiples that the message names",
    ),
    "virtual_stages": Rule(
        ("model.virtual_pipeline_model_parallel_size",),
        "2 or more, and `pipeline_model_parallel_size` too",
        "use null",
    ),
    "overlap_p2p": Rule(
        ("model.overrides.overlap_p2p_comm",),
        "with several pipeline stages, true only with virtual ones",
        "remove it",
    ),
    "batch_p2p": Rule(
        ("model.overrides.batch_p2p_comm",),
        "with virtual stages, true only with `overlap_p2p_comm` false and more than two processes in the pipeline: two "
        "would receive each other's messages in the wrong order",
        "remove it",
    ),
    "micro_batch_group": Rule(
        ("model.overrides.microbatch_group_size_per_vp_stage",),
        "with virtual stages, a whole number not below `pipeline_model_parallel_size`",
        "raise it, or remove it",
    ),
    "pipeline_split": Rule(
        (
            "model.account_for_embedding_in_pipeline_split",
            "model.account_for_loss_in_pipeline_split",
            "model.num_layers_in_first_pipeline_stage",
            "model.num_layers_in_last_pipeline_stage",
            "model.pipeline_model_parallel_layout",
        ),
        "with several pipeline stages only, and one way of the three (count as layers, sizes of the ends, all written "
        "out); both ends not with two stages that have virtual ones, where Megatron-Core cannot place the layers",
        "keep one of them",
    ),
    "cp_comm_type": Rule(
        ("model.overrides.cp_comm_type",),
        "p2p, all_gather or a2a: `a2a+p2p` needs groups for context parallelism that the trainer does not create",
        "use one of the three",
    ),
    "cp_a2a": Rule(
        ("model.overrides.cp_comm_type",),
        "with a2a, `context_parallel_size` divides the heads, of queries and of keys, of a tensor-parallel rank",
        "use p2p or all_gather",
    ),
    "fp8_recipe": Rule(
        ("model.fp8_recipe",),
        "given exactly when `model.fp8` is",
        "use tensorwise (from Hopper on), blockwise (Hopper) or mxfp8 (Blackwell)",
    ),
    "fp8_bf16": Rule(
        ("model.fp8",),
        "with `model.bf16` only: the check that the student starts as its teacher holds fp32 models to 1e-5",
        "set model.bf16=true",
    ),
    "fp8_widths": Rule(
        ("model.fp8", "teacher.fp8"),
        "every width of a linear layer on one rank (hidden states, attention and its latent vectors, experts, shared "
        "experts, dense layers) is a multiple of 16, mxfp8 32",
        "lower the parallel size, or do without FP8",
    ),
    "recompute_full": Rule(
        ("model.recompute_method", "model.recompute_num_layers"),
        "given exactly when `recompute_granularity` is full",
        "remove it, or set recompute_granularity; use uniform and 1",
    ),
    "recompute_modules": Rule(
        ("model.recompute_modules",),
        "given only when `recompute_granularity` is selective",
        "remove it, or set recompute_granularity",
    ),
    "min_lr": Rule(("optimizer.min_lr",), "not above `optimizer.lr`", "lower it"),
    "optimizer_needs": Rule(
        (
            "optimizer.use_precision_aware_optimizer",
            "optimizer.optimizer_cpu_offload",
            "optimizer.overlap_cpu_optimizer_d2h_h2d",
            "ddp.overlap_param_gather",
        ),
        "the first needs `use_distributed_optimizer`, the second the first, the third the second, the last "
        "`use_distributed_optimizer` and `overlap_grad_reduce`",
        "turn on what is needed",
    ),
    "adam_dtypes": Rule(
        ("optimizer.exp_avg_dtype", "optimizer.exp_avg_sq_dtype"),
        "bf16 with `use_precision_aware_optimizer` only, and without `optimizer_cpu_offload`",
        "use fp32",
    ),
    "offload_bf16": Rule(
        ("optimizer.optimizer_cpu_offload",),
        "with `model.bf16` only: Megatron-Core cannot load such Adam states of fp32 parameters again",
        "set model.bf16=true, or turn it off",
    ),
    "offload_fraction": Rule(
        ("optimizer.optimizer_offload_fraction",),
        "above 0 with `optimizer_cpu_offload`, 1 without",
        "remove it, or turn offloading on or off",
    ),
    "warmup": Rule(("scheduler.lr_warmup_iters",), "below `lr_decay_iters` (else `train_iters`)", "lower it"),
    "override_own": Rule(("model.overrides.<field>",), "is no setting of `model`", "set `model.<field>`"),
    "override_owned": Rule(
        ("model.overrides.<field>",), "is decided by no other setting (last table)", "set that, or remove it"
    ),
    "override_refused": Rule(("model.overrides.<field>",), "is served (last table)", "remove it"),
    "override_decided": Rule(
        ("model.overrides.<field>",),
        "is not decided by the checkpoint: what its config.json says, and what is Megatron-Core's default (last table)",
        "remove it, or edit the checkpoint's config.json before converting",
    ),
    "override_unknown": Rule(
        ("model.overrides.<field>",), "is a field of Megatron-Core's `TransformerConfig`", "correct the name"
    ),
    "zero_experts_refused": Rule(
        ("model.<field>", "model.overrides.<field>"), "is served with zero experts (first table)", "as there"
    ),
    "skip_rate_target": Rule(
        ("zero_experts.target_skip_rate",), "not with `zero_experts.weight`, which it sets", "give one of the two"
    ),
    "skip_rate_gain": Rule(
        ("zero_experts.skip_rate_gain",), "0 unless `zero_experts.balance_coeff` is above 0", "raise that, or use 0"
    ),
    "method": Rule(
        ("zero_experts.method",),
        "net and dynamic_skipping start from the original model, the others from an injected one, and each from a "
        "checkpoint of its own",
        "start from another model",
    ),
    "method_without_zero_experts": Rule(
        (
            "zero_experts.num_zero_experts",
            "zero_experts.weight",
            "zero_experts.balance_coeff",
            "zero_experts.logit_bias",
            "zero_experts.skip_rate_gain",
            "zero_experts.balance_tokens",
        ),
        "not given with the methods net and dynamic_skipping, which have no zero experts (`balance_tokens`: with net)",
        "remove it",
    ),
    "skipping_target": Rule(
        ("zero_experts.target_skip_rate",), "given with the method dynamic_skipping", "give a share below 1 - 1/K"
    ),
    "skipping_training": Rule(
        ("zero_experts.method", "train.stage", "train.trainable"),
        "stage 1 and all with the method dynamic_skipping, which trains nothing",
        "use these",
    ),
    "family": Rule(("model.hf",), "its config.json is a supported model's", "use a model of a supported family"),
    "dynamic_model": Rule(
        ("model.hf",),
        "the model has zero experts",
        "run `checkpoint_tools/inject_zero_experts.py` and convert its output",
    ),
    "num_zero_experts": Rule(
        ("zero_experts.num_zero_experts",), "null, or what the model has", "use that or null, or inject others"
    ),
    "divisors": Rule(
        (
            "model.expert_model_parallel_size",
            "model.tensor_model_parallel_size",
            "model.expert_tensor_parallel_size",
        ),
        "the first divides the experts, the second the attention heads, the vocabulary and the units of dense layers "
        "and shared experts, the last the units of an expert",
        "use a divisor",
    ),
    "layers": Rule(
        (
            "model.pipeline_model_parallel_size",
            "model.num_layers_in_first_pipeline_stage",
            "model.num_layers_in_last_pipeline_stage",
            "model.pipeline_model_parallel_layout",
        ),
        "the stages (times `virtual_pipeline_model_parallel_size`) divide the layers, with what counts as one; those "
        "between the ends divide the rest; a layout has all layers and as many parts as there are stages",
        "use a divisor, or one of the ways to deal out layers unequally ([layouts.md](layouts.md))",
    ),
    "kv_heads": Rule(
        ("model.tensor_model_parallel_size",), "a multiple or a divisor of the key-value heads", "use one that is"
    ),
    "positions": Rule(("model.seq_length",), "not above the model's positions", "lower it"),
    "rollout_stage": Rule(("rollout.<setting>",), "in stage 2 only", "remove it, or set `train.stage=2`"),
    "prompts": Rule(("rollout.prompts",), "in stage 2 names a file or more", "name one or more jsonl files"),
    "stage_2_data": Rule(("dataset.train",), "in stage 1 only: stage 2 trains on its own responses", "use []"),
    "samples_per_prompt": Rule(
        ("rollout.samples_per_prompt",), "divides `train.global_batch_size`, the responses of a step", "use a divisor"
    ),
    "server": Rule(
        (
            "rollout.url",
            "rollout.served_model",
            "rollout.reload",
            "rollout.export_format",
            "rollout.timeout_minutes",
            "rollout.max_retries",
        ),
        "`rollout.url` with engines that are servers, and none of these with `megatron`",
        "give the url, or remove the setting",
    ),
    "megatron_engine": Rule(
        ("model.context_parallel_size",),
        "1 with `rollout.engine=megatron` in stage 2: a new token cannot be split",
        "use 1, or a server",
    ),
    "routing_replay": Rule(
        ("rollout.routing_replay",),
        "with `rollout.engine=megatron` and `steps_per_rollout=1` only (routing is in no file), and without the fused "
        "router (first table)",
        "turn it off",
    ),
    "top_p": Rule(("rollout.top_p",), "above 0", "use a share above 0"),
    "greedy_samples": Rule(
        ("rollout.temperature",),
        "above 0 with several samples of a prompt, which would be the same",
        "raise it, or set `rollout.samples_per_prompt=1`",
    ),
    "sampled_distribution": Rule(
        ("rollout.temperature",),
        "1, and `rollout.top_p` too, with `distillation.estimator=sampled`: it estimates the KL from tokens of the "
        "student's own distribution",
        "set both to 1, or use `distillation.estimator=full`",
    ),
    "rollout_age": Rule(
        ("rollout.max_staleness",),
        "`steps_per_rollout` - 1 or more: the last of these steps uses responses that old",
        "raise it, or lower `steps_per_rollout`",
    ),
    "server_weights": Rule(
        ("rollout.reload",),
        "given with engines that are servers, unless `max_staleness` lets every step use responses of the first "
        "weights",
        "use vllm or sglang",
    ),
    "server_url": Rule(("rollout.url",), "begins with http:// or https:// and names a host", "use http://host:port/v1"),
    "server_reload": Rule(("rollout.reload",), "the engine's own: not sglang with engine vllm", "use vllm"),
    "server_method": Rule(
        ("zero_experts.method", "rollout.export_format"),
        "one that the server's form of the weights expresses: copy none, adamoe and net only zeda",
        "use rollout.engine=megatron",
    ),
    "server_dial": Rule(
        ("zero_experts.logit_bias",),
        "0 with a server, unless its form of the weights has a place for it: zeda, or a family with a selection bias",
        "use 0, or rollout.export_format=zeda",
    ),
}

# Methods whose model has no zero experts (as megatron_zeda.models.methods has them, without its imports).
STATIC_METHODS = ("net", "dynamic_skipping")

# Rows go when the code that serves the setting comes.
NOT_IN_THIS_VERSION: tuple[Refusal, ...] = (
    Refusal("dataset.num_workers", "the training process tokenises by itself in this version", "use 0"),
    Refusal(
        "model.fp8_recipe",
        "delayed scaling takes its scales from earlier passes, which checkpoints do not hold (a resumed run would be "
        "another one) and which the teacher's and the evaluation's passes would change",
        "use tensorwise, blockwise or mxfp8",
        accepted=(None, "tensorwise", "blockwise", "mxfp8"),
    ),
    Refusal(
        "ddp.average_in_collective",
        "the loss is normalised by the tokens of the global batch, which Megatron-Core does not average",
        "use false",
    ),
    Refusal("checkpoint.async_save", "checkpoints are written synchronously in this version", "use false"),
    Refusal("logger.wandb_project", "Weights & Biases is not in this version", "use logger.tensorboard"),
)

# TransformerConfig fields that a setting of ours or the trainer itself decides.
OVERRIDE_OWNERS = {
    "num_zero_experts": "zero_experts.num_zero_experts",
    "zero_expert_type": "zero_experts.method",
    "zero_expert_renormalize": "zero_experts.method",
    "dynamic_skipping_beta": "zero_experts.method",
    "teacher_router_topk": "zero_experts.method",
    "zero_expert_weight": "zero_experts.weight",
    "zero_expert_balance_coeff": "zero_experts.balance_coeff",
    "zero_expert_logit_bias": "zero_experts.logit_bias",
    "moe_enable_routing_replay": "rollout.routing_replay",
    "params_dtype": "model.bf16",
    "pipeline_dtype": "model.bf16",
    "autocast_dtype": "model.bf16",
    "fp16": "model.bf16",
    "calculate_per_token_loss": "",
    "finalize_model_grads_func": "",
    "grad_scale_func": "",
    "no_sync_func": "",
    "grad_sync_func": "",
    "param_sync_func": "",
}

_NOT_EXPORTED = "the export routes without it, and would not be the model that was trained"

# TransformerConfig fields that the trainer cannot serve.
OVERRIDE_REFUSALS = {
    "fp8_param": "parameters and checkpoints stay in bf16: FP8 is compute only",
    "fp8_dot_product_attention": "attention in FP8 keeps scales of earlier passes, which checkpoints do not hold",
    "fp8_multi_head_attention": "attention in FP8 keeps scales of earlier passes, which checkpoints do not hold",
    "fp4": "batches are not aligned to what FP4 GEMMs take",
    "cache_mla_latents": "it serves Megatron-Core's inference engine, and the first training step would fail",
    "mla_down_proj_fusion": "its attention gives the latent norms the epsilon of all others, and saves weights under "
    "other names than checkpoints have",
    "hierarchical_context_parallel_sizes": "the trainer creates one group for context parallelism",
    "hybrid_context_parallel": "all packs of a step are split over the whole context-parallel group",
    "moe_expert_capacity_factor": _NOT_EXPORTED,
    "moe_token_drop_policy": _NOT_EXPORTED,
    "moe_input_jitter_eps": _NOT_EXPORTED,
    "moe_router_force_biased": _NOT_EXPORTED,
    "moe_router_force_load_balancing": _NOT_EXPORTED,
}

# What a family sets and an override may change all the same: regularisation of the training, not part of the model.
OVERRIDABLE = frozenset({"attention_dropout", "hidden_dropout"})

# What a family sets because one of Megatron-Core's kernels is not for it, and why.
KERNELS = {"apply_rope_fusion": "Megatron-Core's kernel is not for the rotary embeddings of this model"}

# TransformerConfig fields that no family sets, because Megatron-Core's default is the model; another value is another
# model, which the teacher would share (so the parity gate would pass) and the export would not.
MODEL_DEFAULTS = frozenset(
    {
        "activation_func_clamp_value",
        "add_qkv_bias",
        "apply_query_key_layer_scaling",
        "apply_residual_connection_post_layernorm",
        "attention_output_gate",
        "beta_fast",
        "beta_slow",
        "experimental_attention_variant",
        "glu_linear_offset",
        "layernorm_zero_centered_gamma",
        "linear_attention_freq",
        "moe_apply_probs_on_input",
        "moe_latent_size",
        "moe_layer_freq",
        "moe_router_enable_expert_bias",
        "moe_router_topk_limited_devices",
        "moe_router_topk_scaling_factor",
        "moe_shared_expert_gate",
        "moe_shared_expert_intermediate_size",
        "mscale",
        "mscale_all_dim",
        "mtp_num_layers",
        "mtp_use_repeated_layer",
        "multi_latent_attention",
        "no_rope_freq",
        "original_max_position_embeddings",
        "qk_l2_norm",
        "rotary_interleaved",
        "softmax_scale",
        "softmax_type",
        "use_mup",
        "window_attn_skip_freq",
        "window_size",
    }
)

# Those that a family of this version sets for its checkpoints. No checkpoint that is accepted has the others.
SET_BY_SOME_FAMILY = frozenset(
    {
        "add_qkv_bias",
        "moe_layer_freq",
        "moe_router_enable_expert_bias",
        "moe_router_topk_scaling_factor",
        "moe_shared_expert_intermediate_size",
        "multi_latent_attention",
    }
)
