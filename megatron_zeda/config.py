"""Every setting of a run and its default. This is the only place that has a default.

The sections and keys follow Megatron-Core's and Megatron-Bridge's own spelling wherever they have the
setting; the paper's terms name the rest. A YAML file and ``section.key=value`` overrides are merged onto
these defaults by :mod:`.config_io`; the rules that involve more than one setting are in :mod:`.config_rules`.
Relative paths are relative to the current directory.

A setting is listed here only if some part of the program consumes it, or if
:data:`.config_refusals.NOT_IN_THIS_VERSION` refuses every value but its default.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import ceil, lcm
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

Count = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
OpenShare = Annotated[float, Field(gt=0, lt=1)]
NoNaN = Annotated[float, Field(lt=float("inf"))]


class Section:
    """What all sections share: unknown keys are errors, nothing is converted silently (read by pydantic)."""

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid", "strict": True}


@dataclass(kw_only=True)
class ModelSettings(Section):
    """The student: where it comes from, how it is laid out over the processes, and how it computes."""

    hf: str | None = None
    """Hugging Face folder of the dynamic model: family, shape, tokenizer. null: ``hf`` in ``checkpoint``."""
    checkpoint: str | None = None
    """Megatron folder to start from (``checkpoint_tools/hf_to_megatron.py`` writes it)."""
    tensor_model_parallel_size: Count = 1
    pipeline_model_parallel_size: Count = 1
    virtual_pipeline_model_parallel_size: Count | None = None
    """Parts of the model on each pipeline stage (Megatron's interleaved schedule). null: one."""
    account_for_embedding_in_pipeline_split: bool = False
    """Deal out the layers as if the embedding were one more, before the first (docs/layouts.md)."""
    account_for_loss_in_pipeline_split: bool = False
    """As if the output layer and its loss were one more, behind the last."""
    num_layers_in_first_pipeline_stage: Count | None = None
    """Layers on the first pipeline stage, the others sharing the rest equally. null: as many as the others."""
    num_layers_in_last_pipeline_stage: Count | None = None
    """Layers on the last pipeline stage."""
    pipeline_model_parallel_layout: str | None = None
    """Every part written out: ``Ettt|tttt|tttL`` (embedding, layers, loss; ``t*4`` and ``(tt|)*3`` repeat)."""
    context_parallel_size: Count = 1
    """Ranks that share every sequence, each with two chunks of it."""
    expert_model_parallel_size: Count = 1
    expert_tensor_parallel_size: Count = 1
    """1 keeps each expert whole (the paper's layout); Megatron-LM's default is the TP size."""
    sequence_parallel: bool = False
    """On exactly when ``tensor_model_parallel_size`` is above 1: Megatron trains MoE with TP only so."""
    seq_length: Count = 4096
    """Tokens of one sequence, prompt and response together."""
    moe_token_dispatcher_type: Literal["alltoall", "allgather", "flex"] = "alltoall"
    moe_permute_fusion: bool | None = None
    """Transformer Engine's kernels sort tokens by expert. null: where it is there, as for ``moe_grouped_gemm``."""
    moe_router_dtype: Literal["fp32", "fp64"] = "fp32"
    recompute_granularity: Literal["full", "selective"] | None = None
    recompute_method: Literal["uniform", "block"] | None = None
    recompute_num_layers: Count | None = None
    recompute_modules: list[str] | None = None
    bf16: bool = True
    """Parameters and activations in bfloat16, master weights and Adam states in fp32; false: all in fp32."""
    fp8: Literal["e4m3", "hybrid"] | None = None
    """Linear layers compute in FP8 (Transformer Engine); parameters and checkpoints stay in bf16."""
    fp8_recipe: Literal["tensorwise", "delayed", "mxfp8", "blockwise"] | None = None
    """tensorwise: one current scale per tensor; blockwise: one per 128 values or 128 x 128 weights."""
    overrides: dict[str, Any] = field(default_factory=dict)
    """Any other field of Megatron-Core's ``TransformerConfig``, by its own name."""


@dataclass(kw_only=True)
class ZeroExpertSettings(Section):
    """The zero experts and the group balancing loss that sets how often they are chosen."""

    num_zero_experts: Count | None = None
    """Zero experts per layer, Z. null: what the checkpoint has; a number must agree with it."""
    weight: PositiveFloat = 2.0
    """w of the group balancing loss; the skip rate settles near w Z / (N + w Z)."""
    balance_coeff: NonNegativeFloat = 0.1
    """alpha, the coefficient of the group balancing loss."""
    target_skip_rate: OpenShare | None = None
    """Sets ``weight`` from the skip rate that is wanted: w = r N / (Z (1 - r))."""
    logit_bias: NoNaN | None = None
    """Added to the zero experts' logits before the softmax; ``-.inf`` turns them off. null: as in ``config.json``."""
    balance_tokens: Literal["all", "response"] = "all"
    """Which tokens the group balancing loss and the training skip rate are about: all but padding, or the positions
    that predict a response token."""
    skip_rate_gain: NonNegativeFloat = 0.0
    """Gain of the integral controller that moves w, so that the measured skip rate goes to its target: every step
    log w += gain (target - measured). 0: w stays as it is."""
    method: Literal["zeda", "net", "adamoe", "dynamic_skipping", "copy"] = "zeda"
    """What is trained (docs/methods.md): zero experts; a static model with half of K (NET); zero experts with the
    weights renormalised over the real ones (AdaMoE); nothing, small weights dropped (Dynamic Skipping); identity
    experts in place of zero ones."""


@dataclass(kw_only=True)
class TeacherSettings(Section):
    """The frozen original model."""

    checkpoint: str | None = None
    """Megatron folder of the teacher. null: no teacher, so no KL on held-out batches."""
    placement: Literal["device", "host"] = "device"
    """Where its weights are between passes: beside the student's, or in (pinned) host memory, from where every pass
    brings them in."""
    fp8: Literal["model", "none", "e4m3", "hybrid"] = "model"
    """FP8 of the teacher's linear layers; ``model``: as the student's."""
    fp8_recipe: Literal["tensorwise", "mxfp8", "blockwise"] | None = None
    """null: the student's, else tensorwise."""


@dataclass(kw_only=True)
class DistillationSettings(Section):
    """The terms of the objective, each in nats per response token, and their weights."""

    cross_entropy: NonNegativeFloat | None = None
    """null: 1 in stage 1, 0 in stage 2."""
    forward_kl: NonNegativeFloat = 0.0
    """KL(teacher || student), over the whole vocabulary."""
    reverse_kl: NonNegativeFloat | None = None
    """KL(student || teacher). null: 0 in stage 1, 1 in stage 2."""
    estimator: Literal["full", "topk", "sampled"] = "full"
    """Of the reverse KL: over the whole vocabulary; over the student's ``topk`` most probable tokens and the rest as
    one; or the paper's policy gradient of the sampled tokens (stage 2)."""
    topk: Count = 64
    temperature: PositiveFloat = 1.0
    """Divides both models' logits in the KL terms (no T^2 factor)."""
    clip_ratio_low: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """``sampled``: the probability ratio of a token is clipped to [1 - low, 1 + high], as in PPO."""
    clip_ratio_high: NonNegativeFloat = 0.28
    importance_cap: PositiveFloat | None = 2.0
    """Stage 2: a token weighs min(p_trainer / p_engine, cap), p the probability of the token when it was sampled, as
    the trainer and as the rollout engine compute it. null: 1."""
    chunk_size: Count | None = None
    """Tokens whose logits exist at a time. null: a quarter of the hidden size, or what fits in 64 MiB of fp32 if
    that is more."""


@dataclass(kw_only=True)
class DatasetSettings(Section):
    """Jsonl files, one conversation a line. One path or a list of paths."""

    train: list[str] = field(default_factory=list)
    validation: list[str] = field(default_factory=list)
    tokenizer: str | None = None
    """Hugging Face folder or sentencepiece ``.model`` file. null: the model's folder."""
    packing: bool = False
    """Lay conversations behind each other: a micro-batch is then one row of at most ``micro_batch_size`` x
    ``seq_length`` tokens (docs/packing.md)."""
    num_workers: Natural = 0
    """Processes that tokenise in advance; 0: the training process does it."""
    seed: Natural = 1234
    """Seed of the order in which the conversations are seen."""


@dataclass(kw_only=True)
class RolloutSettings(Section):
    """Where the responses of stage 2 come from (``zeda rollout`` has flags of the same names)."""

    engine: Literal["megatron", "vllm", "openai"] = "megatron"
    """megatron: generated by the training processes with the training weights. vllm, openai: by a server at ``url``,
    which gets new weights by ``reload``."""
    prompts: list[str] = field(default_factory=list)
    samples_per_prompt: Count = 2
    max_new_tokens: Count = 4096
    temperature: NonNegativeFloat = 1.0
    top_p: Share = 1.0
    stop_token_ids: list[int] | None = None
    """Tokens that end a response. null: those of the model's generation_config.json, config.json or tokenizer."""
    batch_size: Count = 32
    """Responses that one data-parallel rank generates together, or that are under way at a server."""
    steps_per_rollout: Count = 1
    """Steps whose responses are generated at once: the last of them trains on responses that old."""
    max_staleness: Natural = 0
    """Most updates between the weights a response was sampled with and the step that trains on it."""
    max_logprob_gap: PositiveFloat | None = 0.5
    """Largest mean of |log p_trainer - log p_engine| over the tokens of responses that were sampled with the present
    weights; above it the run stops, because the engine computes with others. null: no limit."""
    routing_replay: bool = False
    """Training routes the tokens of a response as the rollout did (engine ``megatron``)."""
    cut_responses: Literal["train", "drop"] = "train"
    """What happens to responses that ended at ``max_new_tokens``. They are counted either way."""
    url: str | None = None
    """``http://host:port/v1`` of the server."""
    served_model: str | None = None
    """The model's name at the server. null: the only one it has."""
    reload: Literal["vllm", "sglang"] | None = None
    """How the server is told to load new weights. null: it is not, and keeps those it was started with."""
    export_format: Literal["zeda", "dense-zeros", "vllm-mone"] = "dense-zeros"
    """The form of the weights that a server gets, which is the one it was started with (docs/export_formats.md)."""
    timeout_minutes: PositiveFloat = 10.0
    """Longest wait for one response of a server."""
    max_retries: Natural = 3


@dataclass(kw_only=True)
class TrainSettings(Section):
    """How long and in which batches."""

    stage: Literal[1, 2] = 1
    train_iters: Count | None = None
    """Optimizer steps. Give this or ``train_epochs``."""
    train_epochs: Count | None = None
    """Passes over ``dataset.train``; the last global batch of a pass may reach into the next one."""
    micro_batch_size: Count = 1
    """Sequences of one forward pass; with ``dataset.packing`` the most ``seq_length`` that one pack may hold."""
    global_batch_size: Count = 128
    """Conversations per optimizer step, over all data-parallel ranks and micro-batches, packed or not."""
    trainable: Literal["all", "router"] = "all"
    """Which parameters are trained: all, or those of the routers alone."""
    max_skipped_steps: Count = 10
    """Steps in a row without a finite loss and gradient after which the run stops."""
    exit_duration_in_mins: PositiveFloat | None = None
    """Save and stop after this many minutes."""
    seed: Natural = 1234


@dataclass(kw_only=True)
class OptimizerSettings(Section):
    """Megatron-Core's ``OptimizerConfig``; the defaults are the paper's stage 1."""

    optimizer: Literal["adam"] = "adam"
    lr: PositiveFloat = 2e-5
    min_lr: NonNegativeFloat = 0.0
    weight_decay: NonNegativeFloat = 0.1
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.98
    adam_eps: PositiveFloat = 1e-8
    clip_grad: NonNegativeFloat = 1.0
    """Largest global gradient norm; 0 turns clipping off."""
    use_distributed_optimizer: bool = True
    """Shard the Adam states over data-parallel ranks (sets Megatron's DDP field of the same name too)."""
    use_precision_aware_optimizer: bool = False
    exp_avg_dtype: Literal["fp32", "bf16"] = "fp32"
    exp_avg_sq_dtype: Literal["fp32", "bf16"] = "fp32"
    optimizer_cpu_offload: bool = False
    optimizer_offload_fraction: Share = 1.0
    """Share of the Adam states kept in host memory when ``optimizer_cpu_offload`` is on."""
    overlap_cpu_optimizer_d2h_h2d: bool = False


@dataclass(kw_only=True)
class SchedulerSettings(Section):
    """Megatron-Core's ``OptimizerParamScheduler``, in optimizer steps."""

    lr_decay_style: Literal["cosine", "linear", "constant"] = "cosine"
    lr_warmup_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of ``lr_decay_iters`` spent warming up from 0; ``lr_warmup_iters`` takes its place when given."""
    lr_warmup_iters: Natural | None = None
    lr_decay_iters: Count | None = None
    """Step at which ``optimizer.min_lr`` is reached. null: the last step."""


@dataclass(kw_only=True)
class DDPSettings(Section):
    """Megatron-Core's ``DistributedDataParallelConfig``."""

    grad_reduce_in_fp32: bool = True
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False
    average_in_collective: bool = False
    check_for_nan_in_grad: bool = False


@dataclass(kw_only=True)
class CheckpointSettings(Section):
    """Saving and resuming."""

    save: str | None = None
    """Folder of the run's checkpoints. null: ``<logger.run_dir>/checkpoints``."""
    load: str | None = None
    """Folder to resume from. null: ``save``, where a run that was stopped goes on by itself."""
    save_interval: Count = 100
    """Optimizer steps between checkpoints; one is always saved at the end."""
    keep_last: Count | None = None
    """How many checkpoints stay on disk. null: all."""
    async_save: bool = False
    export_hf: bool = True
    """After the last step, write the student as a Hugging Face folder to ``<logger.run_dir>/hf``."""


@dataclass(kw_only=True)
class ValidationSettings(Section):
    """Cross entropy, KL to the teacher and skip rate on ``dataset.validation``."""

    eval_interval: Count = 100
    """Optimizer steps between evaluations."""
    eval_iters: Count = 1
    """Global batches per evaluation; never more than one pass over the files."""


@dataclass(kw_only=True)
class LoggerSettings(Section):
    """What a run leaves: ``config.yaml``, ``metrics.jsonl``, ``tensorboard/``, ``checkpoints/``, ``hf/``."""

    run_dir: str | None = None
    """Folder of the run. A run that is started again with the same folder goes on where it was."""
    log_interval: Count = 1
    """Optimizer steps between lines on the console and points in TensorBoard; ``metrics.jsonl`` has all."""
    tensorboard: bool = True
    wandb_project: str | None = None


@dataclass(kw_only=True)
class DistSettings(Section):
    """The process group."""

    distributed_timeout_minutes: Count = 30


@dataclass(kw_only=True)
class Config(Section):
    """All sections of one run."""

    model: ModelSettings = field(default_factory=ModelSettings)
    zero_experts: ZeroExpertSettings = field(default_factory=ZeroExpertSettings)
    teacher: TeacherSettings = field(default_factory=TeacherSettings)
    distillation: DistillationSettings = field(default_factory=DistillationSettings)
    dataset: DatasetSettings = field(default_factory=DatasetSettings)
    rollout: RolloutSettings = field(default_factory=RolloutSettings)
    train: TrainSettings = field(default_factory=TrainSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    scheduler: SchedulerSettings = field(default_factory=SchedulerSettings)
    ddp: DDPSettings = field(default_factory=DDPSettings)
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    validation: ValidationSettings = field(default_factory=ValidationSettings)
    logger: LoggerSettings = field(default_factory=LoggerSettings)
    dist: DistSettings = field(default_factory=DistSettings)

    @property
    def cross_entropy(self) -> float:
        """Weight of the cross entropy (``distillation.cross_entropy``, whose default depends on the stage)."""
        weight = self.distillation.cross_entropy
        return (1.0 if self.train.stage == 1 else 0.0) if weight is None else weight

    @property
    def reverse_kl(self) -> float:
        """Weight of the reverse KL (``distillation.reverse_kl``, whose default depends on the stage)."""
        weight = self.distillation.reverse_kl
        return (0.0 if self.train.stage == 1 else 1.0) if weight is None else weight

    @property
    def distils(self) -> bool:
        """Whether a divergence from the teacher is in the objective, so that it runs in every step."""
        return self.distillation.forward_kl > 0 or self.reverse_kl > 0

    @property
    def teacher_fp8(self) -> tuple[str | None, str | None]:
        """FP8 format and recipe of the teacher's linear layers (``teacher.fp8``, which may name the student's)."""
        asked, model = self.teacher, self.model
        if asked.fp8 == "none" or (asked.fp8 == "model" and model.fp8 is None):
            return None, None
        fp8 = model.fp8 if asked.fp8 == "model" else asked.fp8
        return fp8, asked.fp8_recipe or model.fp8_recipe or "tensorwise"

    @property
    def run_dir(self) -> Path:
        """Folder of the run (``logger.run_dir``, which a loaded configuration always has)."""
        if self.logger.run_dir is None:
            raise ValueError("logger.run_dir is not set")
        return Path(self.logger.run_dir)

    @property
    def save_dir(self) -> Path:
        """Folder that checkpoints are written to."""
        return Path(self.checkpoint.save) if self.checkpoint.save else self.run_dir / "checkpoints"

    @property
    def load_dir(self) -> Path:
        """Folder to resume from if it holds a checkpoint; else the run starts from ``model.checkpoint``."""
        return Path(self.checkpoint.load) if self.checkpoint.load else self.save_dir

    @property
    def hf_dir(self) -> Path | None:
        """Folder with the model's ``config.json`` and tokenizer; None when neither source is named."""
        if self.model.hf is not None:
            return Path(self.model.hf)
        return Path(self.model.checkpoint) / "hf" if self.model.checkpoint is not None else None

    @property
    def tokenizer_path(self) -> Path:
        """Folder or file of the tokenizer."""
        path = Path(self.dataset.tokenizer) if self.dataset.tokenizer is not None else self.hf_dir
        if path is None:
            raise ValueError("neither dataset.tokenizer nor the model is set")
        return path


def smallest_world_size(config: Config) -> int:
    """Return the smallest number of processes that the parallel sizes allow."""
    model = config.model
    dense = model.tensor_model_parallel_size * model.context_parallel_size
    expert = model.expert_tensor_parallel_size * model.expert_model_parallel_size
    return lcm(dense, expert) * model.pipeline_model_parallel_size


def zero_expert_weight(config: Config, num_experts: int, num_zero_experts: int) -> float:
    """Return w of the group balancing loss: ``zero_experts.weight``, or what ``target_skip_rate`` asks for.

    Args:
        config: the configuration.
        num_experts: real experts per layer, N.
        num_zero_experts: zero experts per layer, Z, at least 1.
    """
    target = config.zero_experts.target_skip_rate
    if target is None:
        return config.zero_experts.weight
    return target * num_experts / (num_zero_experts * (1.0 - target))


def num_train_iters(config: Config, num_samples: int | None) -> int | None:
    """Return the number of optimizer steps, or None when it depends on a data set that is not there.

    Args:
        config: the configuration.
        num_samples: conversations in ``dataset.train``, where known.
    """
    if config.train.train_iters is not None or config.train.train_epochs is None:
        return config.train.train_iters
    if num_samples is None:
        return None
    return ceil(config.train.train_epochs * num_samples / config.train.global_batch_size)


def num_warmup_iters(config: Config, train_iters: int) -> int:
    """Return the number of warm-up steps of a run of ``train_iters`` steps."""
    if config.scheduler.lr_warmup_iters is not None:
        return config.scheduler.lr_warmup_iters
    return int(config.scheduler.lr_warmup_fraction * (config.scheduler.lr_decay_iters or train_iters))


def derived(config: Config, world_size: int, hf_config: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the facts that follow from a valid configuration.

    Args:
        config: a configuration without problems.
        world_size: number of processes.
        hf_config: the model's ``config.json``; adds what depends on the model's shape.
    """
    model, train = config.model, config.train
    stages = model.pipeline_model_parallel_size
    dense = model.tensor_model_parallel_size * model.context_parallel_size * stages
    expert = model.expert_tensor_parallel_size * model.expert_model_parallel_size * stages
    data_parallel_size = world_size // dense
    facts: dict[str, Any] = {
        "world_size": world_size,
        "data_parallel_size": data_parallel_size,
        "expert_data_parallel_size": world_size // expert,
    }
    if config.dataset.packing:  # how many packs there are depends on the conversations of the step
        facts["tokens_per_pack"] = train.micro_batch_size * model.seq_length
    else:
        facts["tokens_per_step"] = train.global_batch_size * model.seq_length
        facts["num_micro_batches"] = train.global_batch_size // (train.micro_batch_size * data_parallel_size)
    if train.stage == 2:
        facts["prompts_per_step"] = train.global_batch_size // config.rollout.samples_per_prompt
    iters = num_train_iters(config, None)
    if iters is not None:
        facts["train_iters"] = iters
        facts["lr_warmup_iters"] = num_warmup_iters(config, iters)
    if config.logger.run_dir is not None:
        facts["run_dir"], facts["checkpoint_dir"] = str(config.run_dir), str(config.save_dir)
    if hf_config is not None:
        facts |= _model_facts(config, hf_config)
        if config.distils:
            facts |= _teacher_facts(config, hf_config, world_size)
    return facts


def teacher_states_bytes(config: Config, world_size: int, hidden_size: int) -> int:
    """Return about how many bytes a step's hidden states of the teacher take on a rank of the last pipeline stage.

    That is with every position a response token and responses spread evenly over the data-parallel ranks; each
    tensor-parallel rank keeps its share. While the loss of a micro-batch is made, its states are there as a whole too.

    Args:
        config: a configuration without problems.
        world_size: number of processes.
        hidden_size: H of the model.
    """
    model, train = config.model, config.train
    ranks = world_size // model.pipeline_model_parallel_size  # over data, context and tensor parallelism
    positions = train.global_batch_size * model.seq_length
    return ceil(positions / ranks) * hidden_size * (2 if model.bf16 else 4)


def _teacher_facts(config: Config, hf_config: Mapping[str, Any], world_size: int) -> dict[str, Any]:
    """What a teacher that runs in every step takes, estimated: layers are counted as if they were spread evenly."""
    from megatron_zeda.models import family_for

    model = config.model
    family = family_for(dict(hf_config), where="model.hf")
    experts = output = rest = 0
    for row in family.weight_table(dict(hf_config)):
        if ".mlp.experts." in row.key:
            experts += row.numel
        else:
            rest += row.numel
        if row.key == "output_layer.weight":
            output = row.numel
    stages, tensor = model.pipeline_model_parallel_size, model.tensor_model_parallel_size
    of_experts = stages * model.expert_model_parallel_size * model.expert_tensor_parallel_size
    unit = (2 if model.bf16 else 4) / 2**30
    weights, output_layer = (experts / of_experts + rest / (stages * tensor)) * unit, output / tensor * unit
    states = teacher_states_bytes(config, world_size, family.transformer_config_kwargs(dict(hf_config))["hidden_size"])
    return {
        "teacher_gib_placement_device": f"{weights:.3g} on the device",
        "teacher_gib_placement_host": f"{weights:.3g} in host memory, on the device {weights:.3g} during its pass and "
        f"{output_layer:.3g} between passes",
        "teacher_states_gib": f"{states / 2**30:.3g} a step on a rank of the last stage, if every position counts",
    }


def _model_facts(config: Config, hf_config: Mapping[str, Any]) -> dict[str, Any]:
    from megatron_zeda.models import family_for, teacher_topk, with_method

    family, zero = family_for(dict(hf_config), where="model.hf"), config.zero_experts
    student = with_method(dict(hf_config), zero.method, target_skip_rate=zero.target_skip_rate)
    num_experts, num_zero = family.num_experts(student), family.num_zero_experts(student)
    facts: dict[str, Any] = {"family": family.name, "num_experts": num_experts, "num_zero_experts": num_zero}
    facts |= {"method": zero.method, "num_experts_per_tok": student["num_experts_per_tok"]}
    facts["teacher_num_experts_per_tok"] = teacher_topk(student)
    facts["experts_per_rank"] = num_experts // config.model.expert_model_parallel_size
    if config.model.pipeline_model_parallel_size > 1:
        from megatron_zeda.config_megatron import layers_per_stage

        num_layers = family.transformer_config_kwargs(dict(hf_config))["num_layers"]
        stages = layers_per_stage(config, num_layers)
        facts["layers_per_stage"] = " | ".join(" + ".join(map(str, parts)) for parts in stages)
    if num_zero:
        weight = zero_expert_weight(config, num_experts, num_zero)
        facts["zero_expert_weight"] = weight
        facts["target_skip_rate"] = weight * num_zero / (num_experts + weight * num_zero)
    return facts
