"""Which tokens a context-parallel rank holds: Megatron's zigzag order, without Transformer Engine.

Every sequence is cut into 2 * CP equal chunks, and rank r holds chunks r and 2 * CP - 1 - r, which gives causal
attention the same work on every rank. In a pack each sequence is cut by itself, so that a rank's part is again a pack,
with sequences CP times as short. This is what Transformer Engine's ``thd_get_partitioned_indices`` and Megatron-Core's
``get_batch_on_this_cp_rank`` do.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch


def thd_partition_indices(
    cu_seqlens: torch.Tensor, total: int, cp_size: int, cp_rank: int, device: torch.device | None = None
) -> torch.Tensor:
    """Positions, in the whole pack, of the tokens that one context-parallel rank holds, in its order.

    A batch that is not packed is one sequence: ``cu_seqlens = [0, S]``.

    Args:
        cu_seqlens: ``[sequences + 1]`` where every sequence begins, padding included, and the end of the last.
        total: tokens in the pack, over all ranks.
        cp_size: context-parallel size.
        cp_rank: this rank.
        device: where the result is needed; default: where ``cu_seqlens`` is.

    Returns:
        ``[total / cp_size]`` int64, for ``index_select`` along the sequence dimension.

    Raises:
        ValueError: a sequence cannot be cut into 2 * CP chunks, or the sequences are not the whole pack.
    """
    device = cu_seqlens.device if device is None else device
    boundaries = check_boundaries(cu_seqlens.tolist(), total, cp_size)
    if cp_size == 1:
        return torch.arange(total, device=device)
    parts = []
    for start, end in pairwise(boundaries):
        chunk = (end - start) // (2 * cp_size)
        for number in (cp_rank, 2 * cp_size - 1 - cp_rank):
            parts.append(torch.arange(start + number * chunk, start + (number + 1) * chunk, device=device))
    return torch.cat(parts)


def check_boundaries(cu_seqlens: Sequence[int], total: int, cp_size: int) -> list[int]:
    """``cu_seqlens``, once it is known to fit ``total`` tokens and ``cp_size`` ranks.

    Raises:
        ValueError: as :func:`thd_partition_indices`.
    """
    boundaries = list(cu_seqlens)
    if len(boundaries) < 2 or boundaries[0] != 0 or boundaries[-1] != total or boundaries != sorted(boundaries):
        raise ValueError(
            f"cu_seqlens {boundaries} do not cover a pack of {total} tokens: they must rise from 0 to {total}; "
            "make the padding behind the last sequence a sequence of its own"
        )
    if cp_size > 1:
        for start, end in pairwise(boundaries):
            if (end - start) % (2 * cp_size):
                raise ValueError(
                    f"a sequence of {end - start} tokens cannot be cut into {2 * cp_size} chunks for context "
                    f"parallelism {cp_size}; pad every sequence to a multiple of {2 * cp_size}"
                )
    return boundaries
