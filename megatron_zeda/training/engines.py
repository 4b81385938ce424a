"""Who answers the prompts of stage 2: the training processes, or a server that gets new weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch.distributed as dist

from megatron_zeda.config import Config
from megatron_zeda.conversion.megatron_io import HF_FOLDER
from megatron_zeda.data import BatchBuilder
from megatron_zeda.errors import ZedaError
from megatron_zeda.rollout.engine import RolloutEngine
from megatron_zeda.rollout.first_rank import from_first
from megatron_zeda.rollout.megatron_engine import MegatronEngine
from megatron_zeda.rollout.openai_engine import OpenAIEngine
from megatron_zeda.rollout.weight_sync import WeightSync, export_weights
from megatron_zeda.training import checkpoint
from megatron_zeda.training.on_policy import PromptSet, Rollouts
from megatron_zeda.training.rollout_files import steps_of


def build_rollouts(
    config: Config,
    prompts: PromptSet,
    builder: BatchBuilder,
    chunks: list[Any],
    train_iters: int,
    *,
    stopping: Callable[[], bool],
) -> Rollouts:
    """The rollouts of a run with the engine that ``rollout.engine`` names; a collective call.

    Args:
        config: the configuration of the run.
        prompts: what is asked.
        builder: makes batches.
        chunks: the student's model chunks.
        train_iters: steps of the whole run.
        stopping: whether this rank wants to stop.

    Raises:
        ZedaError: on every rank, when a server cannot be used.
    """
    rollout = config.rollout
    if rollout.engine == "megatron":
        engine: RolloutEngine = MegatronEngine(
            chunks,
            eos_ids=prompts.codec.eos_ids,
            context=prompts.codec.context,
            batch_size=rollout.batch_size,
            record_routing=rollout.routing_replay,
        )
        return Rollouts(config, prompts, builder, engine, train_iters=train_iters, stopping=stopping)
    server = _server(config, prompts)
    begin = _sync(config, server, chunks)
    return Rollouts(config, prompts, builder, server, train_iters=train_iters, begin=begin, stopping=stopping)


def _server(config: Config, prompts: PromptSet) -> Any:
    """The server's engine on the first rank, and what stands for it on the others."""
    rollout = config.rollout
    engine: Any = None
    found: tuple[str, ZedaError | None] = ("", None)
    if dist.get_rank() == 0:
        try:
            engine = OpenAIEngine(
                str(rollout.url),
                prompts.codec,
                vocab_size=prompts.vocab_size,
                served_model=rollout.served_model,
                concurrency=rollout.batch_size,
                timeout_minutes=rollout.timeout_minutes,
                max_retries=rollout.max_retries,
                kind=rollout.engine,
            )
            found = (engine.name, None)
        except ZedaError as error:
            found = ("", error)
    name, trouble = from_first(found)
    if trouble is not None:
        raise trouble
    return engine or SimpleNamespace(name=name, collective=False, url=rollout.url, weights_version=None)


def _sync(config: Config, server: Any, chunks: list[Any]) -> Callable[[str], None]:
    """What brings the student's weights to the server before it is asked."""
    assert config.model.checkpoint is not None  # the rules of the configuration demand it
    if dist.get_rank() == 0:  # with the method and the dial of the run
        checkpoint.write_hf_folder(config, Path(config.model.checkpoint) / HF_FOLDER)

    def export(folder: Path) -> None:
        export_weights(chunks, folder, hf=config.save_dir / HF_FOLDER, format=config.rollout.export_format)

    sync = WeightSync(config.run_dir / "rollout_weights", server, export, reload=config.rollout.reload)
    return lambda version: sync(steps_of(version))
