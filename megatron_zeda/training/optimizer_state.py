"""Optimizer states in checkpoints: how they are stored, and how they come back into an optimizer of another layout.

Where neither Transformer Engine nor apex brings an Adam, Megatron-Core uses torch's AdamW. Its ``DistributedOptimizer``
can save that but not load it: it looks for the step count before there is a state, then for a saved tensor of every
entry of the state, step counts included, and leaves one step count shared by all parameters.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

# Stored in the shape of whole parameters, so that another layout can load them. Hand out copies: Megatron-Core adds the
# process group of the moment to what it is given.
METADATA = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": False,
    "chained_optim_avoid_prefix": True,
    "singleton_local_shards": False,
}

_NO_PARAMETER: Any = "no parameter"


def _torch_adams(optimizer: Any) -> Iterator[tuple[int, Any, torch.optim.AdamW]]:
    for index, part in enumerate(getattr(optimizer, "chained_optimizers", [optimizer])):
        if isinstance(part.optimizer, torch.optim.AdamW):
            yield index, part, part.optimizer


def allocate_adam_states(optimizer: Any) -> None:
    """Give Adam the state it would get in its first step, where it has none: to be loaded into, or to be saved."""
    for offloaded in _offloaded_adams(optimizer):
        if not offloaded.state:
            _allocate_offloaded(offloaded)
    for _, _, inner in _torch_adams(optimizer):
        for parameter in (parameter for group in inner.param_groups for parameter in group["params"]):
            if not inner.state[parameter]:
                inner.state[parameter] = {
                    "step": torch.tensor(0.0),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
    count_steps_without_parameters(optimizer)


def allocate_to_save(optimizer: Any) -> None:
    """:func:`allocate_adam_states`, and what Megatron-Core allocates of other Adams itself, but only to load into."""
    allocate_adam_states(optimizer)
    known = {index for index, _, _ in _torch_adams(optimizer)}
    for index, part in enumerate(getattr(optimizer, "chained_optimizers", [optimizer])):
        if index not in known and part.optimizer is not None and not part.optimizer.state:
            part.init_state_fn(part.optimizer, part.config)


def _allocate_offloaded(offloaded: Any) -> None:
    """States in host memory come into being by a step with random gradients (upstream's way), here without effect."""
    rates = [group["lr"] for group in offloaded.param_groups]
    for group in offloaded.param_groups:
        group["lr"] = 0.0
    offloaded.dummy_step()
    for group, rate in zip(offloaded.param_groups, rates, strict=True):
        group["lr"] = rate
    for part in (offloaded, *offloaded.sub_optimizers):
        for group in part.param_groups:
            group.pop("step", None)
    for values in offloaded.state.values():
        for name in ("step", "exp_avg", "exp_avg_sq"):
            if name in values:
                values[name].zero_()


def count_steps_without_parameters(optimizer: Any) -> None:
    """Give a count of steps to every ``DistributedOptimizer`` on torch's AdamW that has no parameter on this rank.

    Experts have an optimizer of their own where they are split over ranks, also on a pipeline stage that has none
    (dense layers, an embedding or a loss alone). Megatron-Core reads the count from the state of some parameter, and
    fails on saving without one. The key of this entry belongs to no parameter, so that nothing else comes of it.
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    adams = list(_torch_adams(optimizer))
    counts = [values["step"] for _, _, inner in adams for values in inner.state.values() if "step" in values]
    for _, part, inner in adams:
        if isinstance(part, DistributedOptimizer) and not any(group["params"] for group in inner.param_groups):
            inner.state[_NO_PARAMETER] = {"step": max(counts, default=torch.tensor(0.0)).clone()}


def _offloaded_adams(optimizer: Any) -> Iterator[Any]:
    """The optimizers of a chain that keep Adam states in host memory."""
    from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer

    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if isinstance(part.optimizer, HybridDeviceOptimizer):
            yield part.optimizer


def only_data(state: dict[Any, Any]) -> dict[Any, Any]:
    """Take the classes out of what an optimizer saves: a checkpoint holds data alone.

    An optimizer with states in host memory has its two parts' classes among the settings of its parameter groups.
    """
    for part in (state, *state.values()):
        if isinstance(part, dict) and "optimizer" in part:
            for group in part["optimizer"]["param_groups"]:
                for key in [key for key, value in group.items() if isinstance(value, type)]:
                    del group[key]
    return state


def _optimizer_states(optimizer: Any, state: dict[Any, Any]) -> list[dict[str, Any]]:
    """One state per optimizer of the chain, whatever chain the checkpoint was written with.

    Experts have an optimizer of their own where they are split over ranks, so the chain depends on the layout. The
    tensors were asked for and found under today's structure; of the rest only the step count is needed.
    """
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    saved = [
        value
        for value in (state, *state.values())
        if isinstance(value, dict) and "param_groups" in value.get("optimizer", ())
    ]
    states = []
    for index, part in enumerate(parts):
        own = state if len(parts) == 1 else state.get(index, {})
        if "optimizer" not in own and "param_state" in own and saved:
            own = part.state_dict() | {key: own[key] for key in own if str(key).startswith("param_state")}
            own["param_state_sharding_type"] = METADATA["distrib_optim_sharding_type"]
            for group in own["optimizer"]["param_groups"]:
                group["step"] = saved[0]["optimizer"]["param_groups"][0]["step"]
        states.append(own)
    return states


def load_optimizer(optimizer: Any, state: dict[Any, Any]) -> None:
    """``optimizer.load_state_dict(state)``, with the tensors of a torch AdamW loaded while its step counts are away."""
    states = _optimizer_states(optimizer, state)
    tensors = {index: states[index].pop("param_state", None) for index, _, _ in _torch_adams(optimizer)}
    optimizer.load_state_dict(states[0] if len(states) == 1 else dict(enumerate(states)))
    for index, part, inner in _torch_adams(optimizer):
        steps = {parameter: values.pop("step") for parameter, values in inner.state.items()}
        if tensors[index] is not None:
            part.load_parameter_state_from_fully_reshardable(tensors[index])
        for parameter, step in steps.items():
            inner.state[parameter]["step"] = step.clone()
    for offloaded in _offloaded_adams(optimizer):
        for values in offloaded.state.values():
            if "step" in values:
                values["step"] = values["step"].clone()
        # Before every step it is copied over the count of the states that stayed on the GPU, which would stand still.
        for group in offloaded.param_groups:
            group.pop("step", None)
