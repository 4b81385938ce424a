"""Weights that are in host memory, and on the device only while they are used."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

# Pinned memory is handed out in powers of two: tensors lie side by side in blocks of that many bytes.
_BLOCK_BYTES = 1 << 28
# Tensors of a block begin at multiples of it.
_ALIGNMENT = 256


def tensors_of(chunks: Iterable[Any]) -> list[Tensor]:
    """All parameters and buffers of model chunks, tied ones once."""
    found = {id(t): t for chunk in chunks for t in (*chunk.parameters(), *chunk.buffers())}
    return list(found.values())


class HostWeights:
    """Parameters and buffers of frozen model chunks in host memory (pinned where there is a GPU)."""

    def __init__(self, chunks: Iterable[Any]) -> None:
        """Move the chunks' tensors to host memory; their modules keep the same ``Parameter`` objects."""
        self._tensors = tensors_of(chunks)
        self._devices = [tensor.device for tensor in self._tensors]
        self._host = _side_by_side(self._tensors)
        for tensor, host in zip(self._tensors, self._host, strict=True):
            tensor.data = host

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """Within the block the tensors are on the device they came from; its memory is freed afterwards.

        The copies are thrown away: nothing that happens to them reaches the weights.
        """
        for tensor, host, device in zip(self._tensors, self._host, self._devices, strict=True):
            copy = torch.empty_like(host, device=device)
            tensor.data = copy.copy_(host, non_blocking=True)
        try:
            yield
        finally:
            for tensor, host in zip(self._tensors, self._host, strict=True):
                tensor.data = host


def _side_by_side(tensors: list[Tensor]) -> list[Tensor]:
    """Copies in few large blocks of host memory."""
    pin = torch.cuda.is_available()
    sizes = [-(-tensor.numel() * tensor.element_size() // _ALIGNMENT) * _ALIGNMENT for tensor in tensors]
    copies: list[Tensor] = []
    block, used, left = torch.empty(0, dtype=torch.uint8), 0, sum(sizes)
    for tensor, size in zip(tensors, sizes, strict=True):
        if used + size > block.numel():
            block = torch.empty(max(size, min(left, _BLOCK_BYTES)), dtype=torch.uint8, pin_memory=pin)
            used = 0
        place = block[used : used + tensor.numel() * tensor.element_size()]
        copies.append(place.view(tensor.dtype).view(tensor.shape).copy_(tensor))
        used, left = used + size, left - size
    return copies
