"""What the first rank does for all of them, such as talking to a server."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, TypeVar

import torch.distributed as dist

from megatron_zeda.errors import ZedaError

T = TypeVar("T")

# Far below any limit on how long a collective may take (``dist.distributed_timeout_minutes``).
_HEARTBEAT_SECONDS = 10.0


def from_first(value: Any) -> Any:
    """The first rank's value, on every rank; a collective call, and a no-op without other ranks."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def on_first[T](work: Callable[[], T]) -> T:
    """Do something on the first rank alone, however long it takes; a collective call.

    The others hear every few seconds that it is not done yet, so that no collective waits too long.

    Args:
        work: called on the first rank, in a thread if there are others.

    Returns:
        What it returned, on every rank.

    Raises:
        ZedaError: on every rank, what it raised.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return work()
    with ThreadPoolExecutor(max_workers=1) as pool:
        future = pool.submit(work) if dist.get_rank() == 0 else None
        while (outcome := from_first(None if future is None else _outcome(future))) is None:
            pass
    result, failure = outcome
    if failure is not None:
        raise failure
    return result  # type: ignore[no-any-return]


def _outcome[T](future: Future[T]) -> tuple[T | None, ZedaError | None] | None:
    """What it returned or raised, None as long as that takes."""
    if not wait([future], timeout=_HEARTBEAT_SECONDS).done:
        return None
    try:
        return future.result(), None
    except ZedaError as error:
        return None, error
