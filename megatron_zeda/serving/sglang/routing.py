"""Choosing among N + Z experts where the engine has N: what takes the place of SGLang's choice.

Shapes: T tokens, D hidden, N real experts, Z zero experts, K slots.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Choose = Callable[[Tensor, Tensor, int, bool, "Tensor | None"], tuple[Tensor, Tensor]]
"""``choose(hidden [T, D], logits [T, N + Z], K, renormalize, bias [N + Z] or None)`` -> weights and ids ``[T, K]``."""


class ZeroExpertRouting:
    """A ``custom_routing_function`` of SGLang's ``TopK``.

    The choice itself is the engine's own, over N + Z experts. What follows takes the weight of slots that fell on a
    zero expert away, and names for them either no expert (-1: SGLang's Triton kernels compute nothing) or a real one
    that the token did not choose (kernels without a number for nothing: exact, and nothing is saved).
    """

    def __init__(
        self, choose: Choose, num_real: int, *, drop: bool, bias: Tensor | None = None, offset: Tensor | None = None
    ) -> None:
        """Set up.

        Args:
            choose: the engine's choice.
            num_real: N.
            drop: slots of zero experts get the id -1.
            bias: ``[N + Z]``, selection bias of a sigmoid router.
            offset: ``[N + Z]``, the dial: added to the bias, or to the logits where there is none.
        """
        self._choose, self._num_real, self.drop = choose, num_real, drop
        self._bias, self._offset = bias, offset

    def __call__(
        self, hidden_states: Tensor, gating_output: Tensor, topk: int, renormalize: bool
    ) -> tuple[Tensor, Tensor]:
        """``[T, D]``, ``[T, N + Z]`` -> weights ``[T, K]`` in float32 and ids ``[T, K]`` in int32."""
        logits, bias = gating_output, self._bias
        if self._offset is not None and bias is None:
            logits = logits.float() + self._offset
        elif self._offset is not None and bias is not None:
            bias = bias + self._offset
        weights, ids = self._choose(hidden_states, logits, topk, renormalize, bias)
        zero = ids >= self._num_real
        weights = weights.float().masked_fill(zero, 0.0)
        ids = ids.masked_fill(zero, -1) if self.drop else with_unchosen(ids, self._num_real)
        return weights, ids.to(torch.int32)


def with_unchosen(ids: Tensor, num_real: int) -> Tensor:
    """Ids ``[T, K]`` with those of N and more replaced by ids below N that the same token has nowhere else.

    Kernels that sort slots by expert may count a token that names an expert twice only once.
    """
    zero = ids >= num_real
    free = torch.ones(ids.shape[0], num_real + 1, dtype=torch.int8, device=ids.device)
    free.scatter_(1, ids.long().clamp(max=num_real), 0)
    spare = free[:, :num_real].topk(ids.shape[1], dim=1).indices
    return torch.where(zero, spare.gather(1, (zero.cumsum(1) - 1).clamp(min=0)).to(ids.dtype), ids)
