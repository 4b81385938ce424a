"""The controller of w: an integral controller that brings the measured skip rate to its target."""

from __future__ import annotations

from typing import Any

from megatron_zeda.config import Config
from megatron_zeda.training.checkpoint import Progress
from megatron_zeda.zero_experts import controlled_weight, set_zero_expert_weight, target_skip_rate


def start_weight(config: Config, chunks: list[Any], progress: Progress) -> None:
    """Give the routers the w that the run goes on with: the controller's, or the configuration's.

    Args:
        config: the configuration of the run; ``zero_experts.skip_rate_gain`` 0 means no controller.
        chunks: this rank's model chunks.
        progress: of the run; its ``zero_expert_weight`` is what a checkpoint keeps of the controller.
    """
    if config.zero_experts.skip_rate_gain == 0.0:
        progress.zero_expert_weight = None
        return
    if progress.zero_expert_weight is None:
        progress.zero_expert_weight = chunks[0].config.zero_expert_weight
    set_zero_expert_weight(chunks, progress.zero_expert_weight)


def weight_of(chunks: list[Any], progress: Progress) -> float | None:
    """w of the next step; None for a model without zero experts."""
    if progress.zero_expert_weight is not None:
        return progress.zero_expert_weight
    model_config = chunks[0].config
    return model_config.zero_expert_weight if model_config.num_zero_experts else None


def control_weight(config: Config, chunks: list[Any], progress: Progress, measured: float) -> None:
    """Move w after a step that updated the weights.

    Args:
        config: the configuration of the run.
        chunks: this rank's model chunks.
        progress: of the run.
        measured: the step's skip rate, the same on every rank.
    """
    if progress.zero_expert_weight is None:
        return
    model_config = chunks[0].config
    initial = model_config.zero_expert_weight
    progress.zero_expert_weight = controlled_weight(
        progress.zero_expert_weight,
        initial=initial,
        target=target_skip_rate(model_config.num_moe_experts, model_config.num_zero_experts, initial),
        measured=measured,
        gain=config.zero_experts.skip_rate_gain,
    )
    set_zero_expert_weight(chunks, progress.zero_expert_weight)
