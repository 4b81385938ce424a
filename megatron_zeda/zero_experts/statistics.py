"""How much was skipped, and how balanced the two groups are, per layer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch


class RouterCounts:
    """Running sums of one router on its device; nothing is read on the host before :func:`router_statistics`.

    One small operation per pass and sum: on a GPU each is a kernel in every layer.
    """

    # [selections of zero experts, tokens, balance loss (this rank's part), micro-steps of training with a token]
    SIZE = 4

    def __init__(self) -> None:
        self.sums: torch.Tensor | None = None

    def _buffer(self, like: torch.Tensor) -> torch.Tensor:
        if self.sums is None or self.sums.device != like.device:
            # Not an inference tensor, even if the first pass is an evaluation under torch.inference_mode: training
            # goes on with it. fp64 holds every count below 2^53 exactly, on CPU and GPU alike.
            with torch.inference_mode(False):
                self.sums = torch.zeros(self.SIZE, dtype=torch.float64, device=like.device)
        return self.sums

    def add_selections(self, zero_and_tokens: torch.Tensor) -> None:
        """Add one pass: ``[selections of zero experts, tokens]``, both of tokens that are not padding."""
        self._buffer(zero_and_tokens)[:2].add_(zero_and_tokens)

    def add_balance_loss(self, loss: torch.Tensor, num_tokens: torch.Tensor) -> None:
        """Add this rank's part of one micro-step's balancing loss (without alpha); one without a token has none.

        Args:
            loss: scalar.
            num_tokens: tokens of all ranks that are not padding.
        """
        sums = self._buffer(loss)
        sums[2].add_(loss)
        sums[3].add_(num_tokens > 0)

    def reset(self) -> None:
        """Forget everything."""
        self.sums = None


@dataclass(frozen=True)
class RouterStatistics:
    """What the routers of a whole model did since the last reset, over all ranks.

    Layers without a zero-expert router are left out. A rate over no selection at all is NaN.
    """

    layer_numbers: tuple[int, ...]
    """1-based global numbers of the layers below, ascending."""
    num_zero_selections: tuple[int, ...]
    num_selections: tuple[int, ...]
    """Per layer: tokens (padding left out) times K."""
    balance_loss_per_layer: tuple[float, ...]
    """Mean over micro-steps with a token, without alpha; 1.0 with both groups on their target, NaN without any."""

    @property
    def skip_rate_per_layer(self) -> list[float]:
        """Per layer, the share of selections that were zero experts."""
        pairs = zip(self.num_zero_selections, self.num_selections, strict=True)
        return [zero / total if total else float("nan") for zero, total in pairs]

    @property
    def skip_rate(self) -> float:
        """Mean over layers of :attr:`skip_rate_per_layer`."""
        return _mean(self.skip_rate_per_layer)

    @property
    def balance_loss(self) -> float:
        """Mean over layers of :attr:`balance_loss_per_layer`."""
        return _mean(self.balance_loss_per_layer)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")


def router_statistics(
    model: torch.nn.Module | Iterable[torch.nn.Module], *, reset: bool = True, pg_collection: Any = None
) -> RouterStatistics:
    """Read the counts of all routers of a model, summed over tensor-, data-, context- and pipeline-parallel ranks.

    A collective call: every rank must make it. Training passes count once, recomputed or not; evaluation passes count
    too, so read (and thereby reset) before and after an evaluation.

    Args:
        model: the model, or this rank's list of (virtual pipeline) chunks.
        reset: start counting anew afterwards.
        pg_collection: process groups with ``tp_dp_cp`` and ``pp``; default: Megatron's global ones.
    """
    from megatron.core import parallel_state

    from megatron_zeda.zero_experts.router import zero_expert_routers

    routers = zero_expert_routers(model)
    if pg_collection is None:
        group = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
        pipeline = parallel_state.get_pipeline_model_parallel_group()
    else:
        group, pipeline = pg_collection.tp_dp_cp, pg_collection.pp

    num_layers = torch.tensor([max((router.layer_number for router in routers), default=0)])
    device = routers[0].weight.device if routers else torch.device("cpu")
    num_layers = num_layers.to(_collective_device(device, pipeline))
    torch.distributed.all_reduce(num_layers, op=torch.distributed.ReduceOp.MAX, group=pipeline)
    # One more column: K, which marks the layers that exist (a stage may hold layers without a router).
    table = torch.zeros(int(num_layers), RouterCounts.SIZE + 1, dtype=torch.float64, device=num_layers.device)
    for router in routers:
        row = table[router.layer_number - 1]
        row[-1] = router.topk
        if router.counts.sums is not None:
            row[:-1] = router.counts.sums
        if reset:
            router.counts.reset()
    torch.distributed.all_reduce(table, group=group)
    torch.distributed.all_reduce(table, group=pipeline)
    rows = [(number + 1, row) for number, row in enumerate(table.tolist()) if row[-1]]
    size = torch.distributed.get_world_size(group)
    return RouterStatistics(
        layer_numbers=tuple(number for number, _ in rows),
        num_zero_selections=tuple(round(row[0]) for _, row in rows),
        num_selections=tuple(round(row[1] * row[-1] / size) for _, row in rows),
        # Every rank added its part of the loss, and one per micro-step.
        balance_loss_per_layer=tuple(row[2] * size / row[3] if row[3] else float("nan") for _, row in rows),
    )


def _collective_device(device: torch.device, group: Any) -> torch.device:
    """Where tensors of a collective over ``group`` live; a pipeline stage without routers has none to go by."""
    if torch.distributed.get_backend(group) == "nccl":
        return device if device.type == "cuda" else torch.device("cuda", torch.cuda.current_device())
    return device
