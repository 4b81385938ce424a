"""New router rows and selection biases for zero experts, drawn from the statistics of the old ones.

Shape suffixes: E real experts, Z zero experts, H hidden.
"""

from __future__ import annotations

import hashlib

import torch


def default_num_zero_experts(num_experts: int) -> int:
    """The paper's choice: half as many zero experts as real ones."""
    return num_experts // 2


def draw_zero_rows(gate_weight: torch.Tensor, num_zero_experts: int, *, seed: int, name: str) -> torch.Tensor:
    """Draw the router rows of the zero experts of one layer.

    Every hidden column gets its own Gaussian, with the mean and the (unbiased) standard deviation of that column over
    the old rows. The draw depends on ``seed`` and ``name`` alone: not on the order of layers, the device or the number
    of ranks.

    Args:
        gate_weight: ``[E, H]`` router weight of the static model, any floating dtype.
        num_zero_experts: Z > 0.
        seed: the user's seed.
        name: the tensor's name in the checkpoint; gives each layer rows of its own.

    Returns:
        ``[Z, H]`` in the dtype of ``gate_weight``, on the CPU.

    Raises:
        ValueError: if the weight is not a matrix of at least two finite rows, or ``num_zero_experts`` is not positive.
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
    noise_ZH = torch.randn(num_zero_experts, rows_EH.shape[1], generator=generator, dtype=torch.float64)
    zero_rows_ZH = rows_EH.mean(dim=0) + rows_EH.std(dim=0) * noise_ZH
    return zero_rows_ZH.to(gate_weight.dtype)


def draw_zero_entries(bias: torch.Tensor, num_zero_experts: int, *, seed: int, name: str) -> torch.Tensor:
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

    Returns:
        ``[Z]`` in the dtype of ``bias``, on the CPU.

    Raises:
        ValueError: if the bias is not a vector of at least two finite entries, or ``num_zero_experts`` is not positive.
    """
    if bias.dim() != 1 or bias.shape[0] < 2:
        raise ValueError(f"{name}: a selection bias is [experts] with 2 or more experts, got {tuple(bias.shape)}")
    return draw_zero_rows(bias[:, None], num_zero_experts, seed=seed, name=name)[:, 0].contiguous()


def widen_gate(gate_weight: torch.Tensor, num_zero_experts: int, *, seed: int, name: str) -> torch.Tensor:
    """``[E, H]`` -> ``[E + Z, H]``: the old rows bit for bit, then :func:`draw_zero_rows`."""
    return torch.cat([gate_weight.cpu(), draw_zero_rows(gate_weight, num_zero_experts, seed=seed, name=name)])
