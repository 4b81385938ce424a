"""Run a function in several gloo processes: the one helper of all distributed tests."""

from __future__ import annotations

import gc
import os
import socket
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.multiprocessing as mp

# Processes are forked from a server that has done the long imports; eight processes that import for themselves take
# half a minute on two cores. The server starts no thread and no process group, so every process begins clean.
_context = mp.get_context("forkserver")
_context.set_forkserver_preload(["megatron_zeda.training", "megatron_zeda.zero_experts", "megatron.core.models.gpt"])


def free_port() -> int:
    """A port that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _worker(
    rank: int,
    fn: Callable[..., Any],
    world_size: int,
    port: int,
    environ: dict[str, str],
    results: Any,
    args: tuple[Any, ...],
) -> None:
    os.environ.clear()  # the server's are as old as the server
    os.environ.update(
        environ,
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_USE_AGENT_STORE="True",  # the parent's store, as under torchrun
    )
    torch.set_num_threads(1)
    gc.freeze()  # walking what the server imported takes a second, and Megatron-Core collects at every save
    from megatron_zeda import platform

    platform.install()
    _light_checkpoint_helper()
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world_size, timeout=timedelta(hours=1))
    try:
        results[rank] = fn(rank, world_size, *args)
    except BaseException:
        # Printed here as well: the parent shows one rank's traceback, and it may be a neighbour's broken connection.
        traceback.print_exc()
        raise
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def _light_checkpoint_helper() -> None:
    """Start the process through which Megatron-Core's checkpoint writers report to themselves, once for this process.

    By itself a save starts it afresh, and it imports torch again: three seconds for each rank of each launch, more than
    a small training run. It is forked while this process has one thread only.
    """
    from megatron.core.dist_checkpointing.strategies.filesystem_async import get_write_results_queue

    get_write_results_queue("fork")


def run_distributed(fn: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """Call ``fn(rank, world_size, *args)`` in ``world_size`` new processes with a gloo default group.

    ``fn`` must be importable (a module-level function of a test file); what it returns must be picklable.

    Returns:
        The ranks' return values, by rank.
    """
    # The parent keeps the store, so that no port is looked for first and taken by another test process meanwhile.
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with _context.Manager() as manager:
        results = manager.dict()
        mp.start_processes(
            _worker,
            args=(fn, world_size, store.port, dict(os.environ), results, args),
            nprocs=world_size,
            start_method="forkserver",
        )
        return [results[rank] for rank in range(world_size)]


def initialize_megatron(seed: int = 1234, **sizes: Any) -> None:
    """Megatron-Core's process groups and random states on top of the default group; sizes as its own keywords."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    end_megatron()
    parallel_state.initialize_model_parallel(**sizes)
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)


def end_megatron() -> None:
    """Destroy Megatron-Core's process groups; it only forgets them.

    Every gloo group polls in a thread of its own, a hundred times a second: sixty for each initialisation. Models in
    reference cycles hold groups too.
    """
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    for group in list(torch.distributed.distributed_c10d._world.pg_map):
        if group is not torch.distributed.group.WORLD:
            torch.distributed.destroy_process_group(group)
    gc.collect()
