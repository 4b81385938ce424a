"""New router rows and selection biases for zero experts, drawn from the statistics of the old ones.

Shape suffixes: E real experts, Z zero experts, H hidden.
"""

from __future__ import annotations

import hashlib
from typing import Literal, get_args

import torch

Init = Literal["gaussian", "teacher-mean", "zeros", "experts"]
INITS: tuple[Init, ...] = get_args(Init)
"""How new rows come about: drawn from each column's mean and standard deviation over the old rows (the paper's way);
that mean itself; zeros; copies of old rows, drawn without replacement as long as there are any."""


def default_num_zero_experts(num_experts: int) -> int:
    """The paper's choice: half as many zero experts as real ones."""
    return num_experts // 2


def draw_zero_rows(
    gate_weight: torch.Tensor, num_zero_experts: int, *, seed: int, name: str, init: Init = "gaussian"
) -> torch.Tensor:
    """Draw the router rows of the zero experts of one layer.

    Every hidden column gets its own Gaussian, with the mean and the (unbiased) standard deviation of that column over
    the old rows. The draw depends on ``seed`` and ``name`` alone: not on the order of layers, the device or the number
    of ranks.

    Args:
        gate_weight: ``[E, H]`` router weight of the static model, any floating dtype.
        num_zero_experts: Z > 0.
        seed: the user's seed.
        name: the tensor's name in the checkpoint; gives each layer rows of its own.
        init: another way than the Gaussian, see :data:`INITS`.

    Returns:
        ``[Z, H]`` in the dtype of ``gate_weight``, on the CPU.

    Raises:
        ValueError: if the weight is not a matrix of at least two finite rows, ``num_zero_experts`` is not positive, or
            ``init`` is unknown.
    """
    if gate_weight.dim() != 2 or gate_weight.shape[0] < 2:
        raise ValueError(
            f"{name}: a router weight is [experts, hidden] with 2 or more experts, got {tuple(gate_weight.shape)}"
        )
    if num_zero_experts < 1:
        raise ValueError(f"num_zero_experts must be positive, got {num_zero_experts}")
    rows_EH = gate_weight.detach().cpu().double()
    if not torch.isfinite(rows_EH).all():
        raise ValueError(f"{name}: the router's values are not all finite")
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    if init == "gaussian":
        noise_ZH = torch.randn(num_zero_experts, rows_EH.shape[1], generator=generator, dtype=torch.float64)
        zero_rows_ZH = rows_EH.mean(dim=0) + rows_EH.std(dim=0) * noise_ZH
    elif init == "teacher-mean":
        zero_rows_ZH = rows_EH.mean(dim=0).expand(num_zero_experts, -1)
    elif init == "zeros":
        zero_rows_ZH = rows_EH.new_zeros(num_zero_experts, rows_EH.shape[1])
    elif init == "experts":
        order = torch.randperm(rows_EH.shape[0], generator=generator)
        zero_rows_ZH = rows_EH[order.repeat(-(-num_zero_experts // len(order)))[:num_zero_experts]]
    else:
        raise ValueError(f"init must be one of {', '.join(INITS)}, got {init!r}")
    return zero_rows_ZH.to(gate_weight.dtype).contiguous()


def draw_zero_entries(
    bias: torch.Tensor, num_zero_experts: int, *, seed: int, name: str, init: Init = "gaussian"
) -> torch.Tensor:
    """Draw the selection biases of the zero experts of one layer.

    A selection bias means something relative to the others only: a constant added to all of them changes nothing. So
    the new ones stand where the old ones do, drawn from their mean and (unbiased) standard deviation, as the method's
    reference implementation (TsinghuaC3I/ZEDA) does. At a fixed value, zero experts would always win or never,
    depending on where a checkpoint's biases lie.

    Args:
        bias: ``[E]`` selection bias of the static model, any floating dtype.
        num_zero_experts: Z > 0.
        seed: the user's seed.
        name: the tensor's name in the checkpoint.
        init: as the rows'; with ``zeros`` the mean of the old ones, because a bias of 0 means nothing by itself.

    Returns:
        ``[Z]`` in the dtype of ``bias``, on the CPU.

    Raises:
        ValueError: if the bias is not a vector of at least two finite entries, or ``num_zero_experts`` is not positive.
    """
    if bias.dim() != 1 or bias.shape[0] < 2:
        raise ValueError(f"{name}: a selection bias is [experts] with 2 or more experts, got {tuple(bias.shape)}")
    init = "teacher-mean" if init == "zeros" else init
    return draw_zero_rows(bias[:, None], num_zero_experts, seed=seed, name=name, init=init)[:, 0].contiguous()


def widen_gate(gate_weight: torch.Tensor, num_zero_experts: int, *, seed: int, name: str) -> torch.Tensor:
    """``[E, H]`` -> ``[E + Z, H]``: the old rows bit for bit, then :func:`draw_zero_rows`."""
    return torch.cat([gate_weight.cpu(), draw_zero_rows(gate_weight, num_zero_experts, seed=seed, name=name)])
