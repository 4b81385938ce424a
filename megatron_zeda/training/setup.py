"""From a configuration to everything a step needs: processes, data, model, optimizer, schedule."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_zeda import platform
from megatron_zeda.config import Config, num_warmup_iters
from megatron_zeda.config_megatron import length_multiple, micro_batch_multiple
from megatron_zeda.data import (
    BatchBuilder,
    BatchLayout,
    PackedBatchBuilder,
    Sample,
    SampleStatistics,
    load_samples,
    load_tokenizer,
)
from megatron_zeda.distillation import Objective
from megatron_zeda.errors import InputError
from megatron_zeda.launch import ranks_from_environment
from megatron_zeda.models import build_gpt_model
from megatron_zeda.training.on_policy import PromptSet, load_prompts

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


# ---- processes ------------------------------------------------------------------------------------------------------


def start_processes(config: Config) -> bool:
    """Create the default process group and Megatron-Core's groups, and seed every generator.

    Returns:
        Whether this call created the default group (the caller then ends it).
    """
    platform.install()
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    ranks = ranks_from_environment()
    if torch.cuda.is_available():
        torch.cuda.set_device(platform.device())
    created = not dist.is_initialized()
    minutes = config.dist.distributed_timeout_minutes
    if created:
        dist.init_process_group(
            platform.backend(),
            rank=ranks.rank,
            world_size=ranks.world_size,
            # One process needs no address. (Exported, but the stub does not say so.)
            store=dist.HashStore() if ranks.world_size == 1 else None,  # type: ignore[attr-defined]
            timeout=timedelta(minutes=minutes),
        )
    model = config.model
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=model.tensor_model_parallel_size,
        pipeline_model_parallel_size=model.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=model.virtual_pipeline_model_parallel_size,
        context_parallel_size=model.context_parallel_size,
        expert_model_parallel_size=model.expert_model_parallel_size,
        expert_tensor_parallel_size=model.expert_tensor_parallel_size,
        distributed_timeout_minutes=minutes,
    )
    # As in Megatron-LM: pipeline stages draw differently, data-parallel ranks alike.
    seed = config.train.seed + 100 * parallel_state.get_pipeline_model_parallel_rank()
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)
    return created


def end_processes(created: bool) -> None:
    """Undo :func:`start_processes`."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    if created:
        dist.destroy_process_group()


# ---- data -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Data:
    """The samples of a run as batch builders of this rank, and what was read.

    Attributes:
        train: of stage 1 with all its samples, of stage 2 without any.
        validation: with all held-out samples; None where there are none.
        statistics: of ``train`` and ``validation``, where they have samples.
        num_samples: samples of one pass over the data: of stage 2 the responses to all prompts.
        prompts: of stage 2.
    """

    train: BatchBuilder
    validation: BatchBuilder | None
    statistics: dict[str, SampleStatistics]
    num_samples: int
    prompts: PromptSet | None = None


def load_data(config: Config, hf_config: dict[str, Any]) -> Data:
    """Read and tokenise ``dataset.train`` and ``dataset.validation``, in stage 2 ``rollout.prompts``."""
    from megatron.core import parallel_state

    model, train = config.model, config.train
    tokenizer = load_tokenizer(config.tokenizer_path)
    layout = BatchLayout(
        data_parallel_rank=parallel_state.get_data_parallel_rank(),
        data_parallel_size=parallel_state.get_data_parallel_world_size(),
        context_parallel_rank=parallel_state.get_context_parallel_rank(),
        context_parallel_size=parallel_state.get_context_parallel_world_size(),
        length_multiple=length_multiple(config),
        micro_batch_multiple=micro_batch_multiple(config),
    )

    def builder(samples: list[Sample]) -> BatchBuilder:
        batch, device = train.global_batch_size, platform.device()
        if config.dataset.packing:
            length = train.micro_batch_size * model.seq_length
            return PackedBatchBuilder(
                samples, pack_length=length, global_batch_size=batch, layout=layout, device=device
            )
        return BatchBuilder(
            samples, micro_batch_size=train.micro_batch_size, global_batch_size=batch, layout=layout, device=device
        )

    prompts = load_prompts(config, hf_config) if train.stage == 2 else None
    builders: dict[str, BatchBuilder] = {} if prompts is None else {"train": builder([])}
    statistics: dict[str, SampleStatistics] = {}
    for name, paths in (("train", config.dataset.train), ("validation", config.dataset.validation)):
        if paths:
            samples: list[Sample] = []
            for path in paths:
                samples += load_samples(
                    Path(path), seq_length=model.seq_length, vocab_size=hf_config["vocab_size"], tokenizer=tokenizer
                )
            builders[name], statistics[name] = builder(samples), SampleStatistics.of(samples)
    return Data(
        train=builders["train"],
        validation=builders.get("validation"),
        statistics=statistics,
        num_samples=(
            len(builders["train"].samples) if prompts is None else len(prompts.ids) * config.rollout.samples_per_prompt
        ),
        prompts=prompts,
    )


# ---- model ----------------------------------------------------------------------------------------------------------


def build_chunks(hf_config: dict[str, Any], model_config: Any) -> list[Any]:
    """This rank's model chunks on the device, in bf16 if asked for, without gradients' buffers and without weights.

    Raises:
        InputError: the settings need a library that is not installed.
    """
    from megatron.core import parallel_state
    from megatron.core.transformer.module import Float16Module

    num_stages = model_config.virtual_pipeline_model_parallel_size
    chunks = []
    for vp_stage in range(num_stages or 1):
        stage = vp_stage if num_stages else None
        place = {"ignore_virtual": False, "vp_stage": stage}
        try:
            chunk = build_gpt_model(
                hf_config,
                model_config,
                pre_process=parallel_state.is_pipeline_first_stage(**place),
                post_process=parallel_state.is_pipeline_last_stage(**place),
                vp_stage=stage,
            ).to(platform.device())
        except ImportError as error:
            raise InputError(
                f"the model needs a library that is not there: {error}",
                where="model",
                fix="install it, or choose settings that do without (moe_token_dispatcher_type: alltoall)",
            ) from error
        chunks.append(Float16Module(model_config, chunk) if model_config.bf16 else chunk)
    return chunks


def unwrap(chunk: Any) -> Any:
    """The ``GPTModel`` inside DDP and ``Float16Module``."""
    while hasattr(chunk, "module"):
        chunk = chunk.module
    return chunk


def wrap_for_training(config: Config, chunks: list[Any]) -> list[Any]:
    """Megatron's DDP around every chunk, and the hooks its schedules call."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads

    ddp_config = DistributedDataParallelConfig(
        use_distributed_optimizer=config.optimizer.use_distributed_optimizer, **asdict(config.ddp)
    )
    model_config = chunks[0].config
    wrapped = [
        # Gradients of later chunks are ready first; only the first chunk's buckets are worth splitting (Megatron-LM).
        DistributedDataParallel(model_config, ddp_config, chunk, disable_bucketing=index > 0)
        for index, chunk in enumerate(chunks)
    ]
    model_config.finalize_model_grads_func = finalize_model_grads
    if config.ddp.overlap_grad_reduce:
        no_sync = [chunk.no_sync for chunk in wrapped]
        model_config.no_sync_func = no_sync[0] if len(no_sync) == 1 else no_sync
    for chunk in wrapped:
        chunk.broadcast_params()
    return wrapped


def build_objective(config: Config) -> Objective:
    """What a step minimises beside the balancing loss."""
    settings = config.distillation
    return Objective(
        cross_entropy=config.cross_entropy,
        forward_kl=settings.forward_kl,
        reverse_kl=config.reverse_kl,
        estimator=settings.estimator,
        topk=settings.topk,
        temperature=settings.temperature,
        clip_ratio_low=settings.clip_ratio_low,
        clip_ratio_high=settings.clip_ratio_high,
        importance_cap=settings.importance_cap,
        chunk_size=settings.chunk_size,
    )


def release(chunks: list[Any]) -> None:
    """Let the chunks that :func:`wrap_for_training` returned be freed when nobody refers to them any more.

    Megatron's DDP holds the gradient accumulators and their hooks hold DDP; the model's configuration holds the
    optimizer, whose views of parameters hold the accumulators too; dispatchers hold the last weights of experts, and
    with them the last step's graph if nothing was evaluated since. All of it in C++, where no garbage collection looks:
    the model, its buffers and all process groups with their threads would stay until the process ends.
    """
    for chunk in chunks:
        chunk.grad_accs.clear()
        chunk.config.grad_scale_func = None
        unwrap(chunk).config.grad_scale_func = None
        for module in chunk.modules():
            if hasattr(module, "token_dispatcher"):
                module.token_dispatcher = None


@contextmanager
def whole_parameters(chunks: list[Any]) -> Iterator[None]:
    """Within the block every rank holds all its parameters, and nothing gathers them behind our back.

    With ``ddp.overlap_param_gather`` they are gathered by the training forward pass that follows an update, which
    neither a checkpoint nor a pass that uses weights outside their modules can wait for.
    """
    overlapped = [chunk for chunk in chunks if chunk.ddp_config.overlap_param_gather]
    for chunk in overlapped:
        chunk.disable_forward_pre_hook()
    try:
        yield
    finally:
        for chunk in overlapped:
            chunk.enable_forward_pre_hook()


# ---- optimizer ------------------------------------------------------------------------------------------------------


def build_optimizer(config: Config, chunks: list[Any], *, train_iters: int) -> tuple[Any, Any]:
    """Megatron-Core's optimizer and learning-rate schedule, the latter counting optimizer steps."""
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    settings = asdict(config.optimizer)
    for name in ("exp_avg_dtype", "exp_avg_sq_dtype"):
        settings[name] = _DTYPES[settings[name]]
    if not settings["optimizer_cpu_offload"]:
        settings["optimizer_offload_fraction"] = 0.0
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            **settings,
            bf16=config.model.bf16,
            params_dtype=torch.bfloat16 if config.model.bf16 else torch.float32,
            overlap_param_gather=config.ddp.overlap_param_gather,
            # Its checkpoints would hold the low halves of the master weights, which cannot be loaded.
            store_param_remainders=False,
        ),
        chunks,
    )
    chunks[0].config.grad_scale_func = optimizer.scale_loss
    decay = config.scheduler.lr_decay_iters or train_iters
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=config.optimizer.lr,
        min_lr=config.optimizer.min_lr,
        lr_warmup_steps=min(num_warmup_iters(config, train_iters), decay - 1),
        lr_decay_steps=decay,
        lr_decay_style=config.scheduler.lr_decay_style,
        start_wd=config.optimizer.weight_decay,
        end_wd=config.optimizer.weight_decay,
        wd_incr_steps=train_iters,
        wd_incr_style="constant",
        # On resuming, what the configuration says now counts, not what it said when the checkpoint was written.
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
    return optimizer, scheduler
