"""Routing replay: a training pass routes tokens to the experts they were routed to when they were sampled.

Megatron-Core's ``RouterReplay`` chooses in every router whose configuration has ``moe_enable_routing_replay``; zero
experts are columns like others. This module hands it the choices of each micro-batch, and those of earlier ones to
layers that are computed again in the backward pass.

Shapes: B micro-batch, s this context-parallel rank's part of the sequence, L MoE layers of the whole model, K choices.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.router_replay import RouterReplayAction


@contextmanager
def replayed_routing(chunk: torch.nn.Module, routing_BsLK: torch.Tensor | None) -> Iterator[None]:
    """Within the block the forward pass of a model chunk routes as it is told.

    Afterwards, until the chunk's next pass, layers that are computed again take the choices of the micro-batches in
    their order. :func:`forget_routing` ends that.

    Args:
        chunk: wrapped or plain.
        routing_BsLK: expert numbers; None leaves the routers alone.

    Raises:
        ValueError: the routers cannot replay, or the model has another number of MoE layers or choices.
    """
    if routing_BsLK is None:
        yield
        return
    routers = _routers(chunk)
    for router in routers:
        replay: Any = router.router_replay
        if replay is None:
            raise ValueError("the model was built without moe_enable_routing_replay")
        replay.set_target_indices(_choices(router, routing_BsLK))
        replay.set_router_replay_action(RouterReplayAction.REPLAY_FORWARD)
    try:
        yield
    finally:
        for router in routers:
            _replay(router).set_router_replay_action(RouterReplayAction.REPLAY_BACKWARD)


def forget_routing(chunks: Iterable[torch.nn.Module]) -> None:
    """Let all routers choose by themselves again."""
    for router in (router for chunk in chunks for router in _routers(chunk)):
        if router.router_replay is not None:
            _replay(router).clear_indices()
            _replay(router).clear_router_replay_action()


def _replay(router: TopKRouter) -> Any:
    return router.router_replay


def _routers(chunk: torch.nn.Module) -> list[TopKRouter]:
    return [module for module in chunk.modules() if isinstance(module, TopKRouter) and not module.is_mtp_layer]


def _choices(router: TopKRouter, routing_BsLK: torch.Tensor) -> torch.Tensor:
    """What a router is to choose, ``[T, K]``: of its layer, its tensor-parallel rank's part of the sequence."""
    config: Any = router.config
    number = int(router.layer_number or 0)
    frequency = config.moe_layer_freq
    is_moe = [index % frequency == 0 for index in range(config.num_layers)] if isinstance(frequency, int) else frequency
    if routing_BsLK.shape[2:] != (sum(is_moe), config.moe_router_topk):
        raise ValueError(
            f"routing of {routing_BsLK.shape[2]} layers and {routing_BsLK.shape[3]} choices for a model of "
            f"{sum(is_moe)} MoE layers and {config.moe_router_topk} choices"
        )
    choices_sBK = routing_BsLK[:, :, sum(is_moe[: number - 1])].transpose(0, 1)
    if config.sequence_parallel:
        size = parallel_state.get_tensor_model_parallel_world_size()
        choices_sBK = choices_sBK.chunk(size)[parallel_state.get_tensor_model_parallel_rank()]
    return choices_sBK.reshape(-1, config.moe_router_topk).long()
