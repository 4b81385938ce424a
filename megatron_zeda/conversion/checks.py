"""What every converter checks of the weights that pass through it."""

from __future__ import annotations

from pathlib import Path

import torch

from megatron_zeda.errors import InputError


def require_finite(tensor: torch.Tensor, name: object, where: str | Path) -> None:
    """Refuse NaN and infinity.

    Raises:
        InputError: names the tensor and the file.
    """
    if not tensor.numel():
        return
    if tensor.dtype.itemsize == 1:
        tensor = tensor.to(torch.bfloat16)  # exact, and has the operations that FP8 lacks
    low, high = tensor.aminmax()  # NaN if there is one, and one pass over the values
    if not (low.isfinite() and high.isfinite()):
        bad = int((~tensor.isfinite()).sum())
        raise InputError(
            f"{name} has values that are not finite",
            where=where,
            value=f"{bad} of {tensor.numel()}",
            rule="weights are numbers",
            fix="download the file again, or ask where the checkpoint comes from",
        )
