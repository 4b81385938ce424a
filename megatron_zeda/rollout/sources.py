"""Who answers the prompts of ``zeda rollout``: one function per engine."""

from __future__ import annotations

from pathlib import Path

import torch

from megatron_zeda.errors import InputError
from megatron_zeda.rollout.hf_folder import weights_version
from megatron_zeda.rollout.run import Source
from megatron_zeda.rollout.transformers_engine import TransformersEngine

# Prompts are sorted by length within a window of this many batches: little padding, and lines still reach the file in
# the order of the prompts while the run goes on.
_WINDOW_BATCHES = 16


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


def _check_batch(batch_size: int) -> None:
    if batch_size < 1:
        raise InputError("out of range", where="batch_size", value=batch_size, rule="at least 1")
