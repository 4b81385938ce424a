"""Who answers the prompts of ``zeda rollout``: one function per engine."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megatron_zeda.errors import InputError
from megatron_zeda.models import HfConfig, method_of
from megatron_zeda.models.hf_config import where_of
from megatron_zeda.platform import device as platform_device
from megatron_zeda.rollout.codec import Codec
from megatron_zeda.rollout.hf_folder import read_config, resolve_dtype, weights_version
from megatron_zeda.rollout.run import Source
from megatron_zeda.rollout.transformers_engine import TransformersEngine

if TYPE_CHECKING:
    from megatron_zeda.config import Config

# Prompts are sorted by length within a window of this many batches: little padding, and lines still reach the file in
# the order of the prompts while the run goes on. A run that is stopped loses its window: large models keep it small.
_WINDOW_BATCHES = 16
_WINDOW_BATCHES_LARGE = 1


def transformers_source(
    model: Path,
    *,
    batch_size: int = 128,
    dtype: str = "auto",
    trust_remote_code: bool = False,
    device: torch.device | None = None,
) -> Source:
    """A Hugging Face folder, static or dynamic, in this process.

    Args:
        model: the folder.
        batch_size: responses generated together.
        dtype: see :func:`megatron_zeda.rollout.hf_folder.resolve_dtype`.
        trust_remote_code: run modelling code found in the folder.
        device: where to compute; the GPU if there is one.

    Raises:
        InputError: a folder that cannot be loaded, or settings out of range.
    """
    _check_batch(batch_size)
    engine = TransformersEngine(
        model, dtype=dtype, device=device, batch_size=batch_size, trust_remote_code=trust_remote_code
    )
    return Source(engine, engine.codec, weights_version(model), batch_size * _WINDOW_BATCHES)


@contextmanager
def megatron_source(
    model: Path, *, sizes: Mapping[str, Any], batch_size: int = 32, dtype: str = "auto"
) -> Iterator[Source]:
    """A Megatron folder (an import, or the checkpoints of a run), in the processes of this job, within the block.

    Args:
        model: the folder.
        sizes: ``tensor_model_parallel_size`` and the other parallel sizes of the configuration's ``model`` section.
        batch_size: responses that one data-parallel replica generates together.
        dtype: as for :func:`transformers_source`.

    Raises:
        InputError: a folder that cannot be loaded, or sizes that do not fit the model or the number of processes.
    """
    from megatron_zeda.config import Config, ModelSettings
    from megatron_zeda.config_megatron import transformer_config
    from megatron_zeda.conversion.megatron_io import HF_FOLDER, latest_checkpoint_dir
    from megatron_zeda.launch import ranks_from_environment
    from megatron_zeda.models import load_hf_config
    from megatron_zeda.rollout.megatron_engine import MegatronEngine
    from megatron_zeda.training import checkpoint, setup

    _check_batch(batch_size)
    iteration = latest_checkpoint_dir(model)
    hf = model / HF_FOLDER
    hf_config = load_hf_config(hf)
    codec = Codec(hf, hf_config)
    bf16 = resolve_dtype(dtype, hf_config, platform_device()) == torch.bfloat16
    tensor = sizes.get("tensor_model_parallel_size", 1)
    config = Config(model=ModelSettings(**sizes, bf16=bf16, sequence_parallel=tensor > 1))
    replicas = _replicas(config, ranks_from_environment().world_size)
    created = setup.start_processes(config)
    try:
        chunks = setup.build_chunks(hf_config, transformer_config(config, hf_config, where=hf))
        checkpoint.load_weights(chunks, model)
        engine = MegatronEngine(chunks, eos_ids=codec.eos_ids, context=codec.context, batch_size=batch_size)
        version = checkpoint_version(iteration) if torch.distributed.get_rank() == 0 else ""
        yield Source(engine, codec, version, batch_size * replicas * _WINDOW_BATCHES_LARGE)
    finally:
        setup.end_processes(created)


def vllm_source(model: Path, *, batch_size: int = 128, dtype: str = "auto", trust_remote_code: bool = False) -> Source:
    """A Hugging Face folder in vLLM, in this process.

    Args:
        model: the folder, in a form that vLLM runs (docs/export_formats.md).
        batch_size: responses generated together at most.
        dtype: as for :func:`transformers_source`.
        trust_remote_code: let vLLM run modelling code found in the folder.

    Raises:
        InputError: vLLM is not installed or cannot run the model, or no server runs the model's method.
    """
    from megatron_zeda.rollout.vllm_engine import VLLMEngine

    _check_batch(batch_size)
    config = read_config(model)
    _check_method(config, "vllm")
    codec = Codec(model, config)
    engine = VLLMEngine(
        model,
        codec,
        dtype=resolve_dtype(dtype, config, platform_device()),
        batch_size=batch_size,
        trust_remote_code=trust_remote_code,
    )
    return Source(engine, codec, weights_version(model), batch_size * _WINDOW_BATCHES_LARGE)


def openai_source(
    model: Path,
    url: str,
    *,
    served_model: str | None = None,
    batch_size: int = 128,
    timeout_minutes: float = 10.0,
    max_retries: int = 3,
) -> Source:
    """A server that speaks OpenAI's completions protocol.

    Args:
        model: the Hugging Face folder that it serves: tokenizer, special tokens, and the version of the weights.
        url: ``http://host:port/v1``.
        served_model: the model's name at the server; None: the only one it has.
        batch_size: requests under way at once.
        timeout_minutes: longest wait for one response.
        max_retries: how often a request is sent again.

    Raises:
        InputError: the server cannot be used, or none runs the model's method.
        ZedaError: it cannot be reached.
    """
    from megatron_zeda.rollout.openai_engine import OpenAIEngine

    _check_batch(batch_size)
    config = read_config(model)
    _check_method(config, "openai")
    codec = Codec(model, config)
    engine = OpenAIEngine(
        url,
        codec,
        vocab_size=int(config["vocab_size"]),
        served_model=served_model,
        concurrency=batch_size,
        timeout_minutes=timeout_minutes,
        max_retries=max_retries,
    )
    codec.context = engine.context  # the server's may be smaller; prompts are judged before anything is asked
    return Source(engine, codec, weights_version(model), batch_size)


def checkpoint_version(iteration: Path) -> str:
    """A hash of the names and bytes of a ``torch_dist`` checkpoint's files, as ``sha256:<64 hex digits>``."""
    total = hashlib.sha256()
    for path in sorted(path for path in iteration.iterdir() if path.is_file()):
        with path.open("rb") as file:
            total.update(path.name.encode() + b"\0" + hashlib.file_digest(file, "sha256").digest())
    return f"sha256:{total.hexdigest()}"


def _replicas(config: Config, world_size: int) -> int:
    """How many data-parallel replicas there are."""
    model = config.model
    dense = model.tensor_model_parallel_size * model.pipeline_model_parallel_size
    expert = model.expert_model_parallel_size * model.expert_tensor_parallel_size * model.pipeline_model_parallel_size
    for name, size in (("tensor x pipeline", dense), ("expert x expert tensor x pipeline", expert)):
        if world_size % size:
            raise InputError(
                f"{name} parallel size {size} does not divide the number of processes",
                where="zeda rollout",
                value=world_size,
                fix="start another number of processes with torchrun, or change the sizes",
            )
    return world_size // dense


def _check_batch(batch_size: int) -> None:
    if batch_size < 1:
        raise InputError("out of range", where="batch_size", value=batch_size, rule="at least 1")


def _check_method(config: HfConfig, engine: str) -> None:
    """Refuse what would be another model there: with a folder's own code, vLLM puts its own experts into the blocks."""
    method = method_of(config)
    if method in ("copy", "dynamic_skipping"):
        raise InputError(
            f"--engine {engine} cannot run method `{method}`",
            where=where_of(config),
            rule="servers run zero experts, not experts that return their input or thresholds",
            fix="use --engine transformers",
        )
