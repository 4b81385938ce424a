"""Reads from a running ``transformers`` model how many of its K slots went to zero experts.

The contract is that of the modelling files bundled with exports: the router (``gate``) of each mixture-of-experts block
returns ``(logits, scores [T, K], indices [T, K])`` and the score of a slot that no real expert computes is 0 or less.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from megatron_zeda.errors import ZedaError


def find_gates(model: nn.Module) -> list[nn.Module]:
    """Return the routers of all mixture-of-experts blocks, first layer first."""
    gates = []
    for module in model.modules():
        gate, experts = getattr(module, "gate", None), getattr(module, "experts", None)
        if isinstance(gate, nn.Module) and isinstance(experts, nn.Module):
            gates.append(gate)
    if not gates:
        raise ZedaError("no mixture-of-experts block was found", where=type(model).__name__)
    return gates


class RoutingRecorder:
    """While it is entered, keeps the number of zero slots of every token in every layer of the last forward pass.

    For a static model they are 0 by definition; its routers are not even looked at, so that a routing weight that
    rounds to 0 never counts as skipped.
    """

    def __init__(self, model: Any) -> None:
        """Prepare for ``model``, a ``transformers`` causal language model of this project's families."""
        self.gates = find_gates(model)
        skipping = getattr(model.config, "zeda_dynamic_skipping_beta", None) is not None
        self.dynamic = bool(getattr(model.config, "zce_nums", None)) or skipping
        self.num_layers, self.topk = len(self.gates), int(model.config.num_experts_per_tok)
        self._counts: dict[int, Tensor] = {}
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> Self:
        if self.dynamic:
            for layer, gate in enumerate(self.gates):
                self._handles.append(gate.register_forward_hook(self._hook(layer)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _hook(self, layer: int) -> Any:
        def record(module: nn.Module, args: Any, output: Any) -> None:
            self._counts[layer] = (output[1] <= 0).sum(-1)  # an identity expert's weight comes negated

        return record

    def zero_slots(self, like: Tensor) -> Tensor:
        """Return the counts of the last forward pass and forget them.

        Args:
            like: ``[B, S]``, the token ids of that pass.

        Returns:
            ``[layers, B, S]`` int64, each 0 to K.
        """
        if not self.dynamic:
            return like.new_zeros((self.num_layers, *like.shape), dtype=torch.long)
        if len(self._counts) != self.num_layers:
            raise ZedaError(f"{len(self._counts)} of {self.num_layers} routers ran", where="skip rate")
        counts = torch.stack([self._counts[layer].reshape(like.shape) for layer in range(self.num_layers)])
        self._counts.clear()
        return counts
