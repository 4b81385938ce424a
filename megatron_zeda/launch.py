"""Which process this is: the ranks that torchrun sets, or the same from what srun sets."""

from __future__ import annotations

import os
import re
from collections.abc import MutableMapping
from dataclasses import dataclass

from megatron_zeda.errors import InputError


@dataclass(frozen=True)
class Ranks:
    """The place of this process among all.

    Attributes:
        rank: 0 to ``world_size`` - 1.
        world_size: number of processes.
        local_rank: 0 to the number of processes on this machine - 1; the index of its GPU.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0


def ranks_from_environment(environment: MutableMapping[str, str] | None = None) -> Ranks:
    """Read the ranks, and complete the variables that ``torch.distributed`` reads.

    torchrun's variables win. Otherwise, inside an srun step, ``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``, ``MASTER_ADDR``
    (the first host of the step) and ``MASTER_PORT`` (from the job's number) are set from Slurm's. A batch script that
    starts us without srun is one process, whatever it has allocated.

    Args:
        environment: the variables, completed in place; None: those of this process.

    Raises:
        InputError: a variable is not a number, or torchrun's are incomplete.
    """
    env = os.environ if environment is None else environment
    if "RANK" not in env and "SLURM_STEP_ID" in env and "SLURM_PROCID" in env:
        env["RANK"] = env["SLURM_PROCID"]
        env["WORLD_SIZE"] = env.get("SLURM_STEP_NUM_TASKS") or env.get("SLURM_NTASKS", "1")
        env["LOCAL_RANK"] = env.get("SLURM_LOCALID", "0")
        nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST", "")
        env.setdefault("MASTER_ADDR", first_host(nodes) or "localhost")
        env.setdefault("MASTER_PORT", str(_port(env)))
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    if "RANK" not in env:
        return Ranks()
    numbers = []
    for name, default in zip(names, (None, None, "0"), strict=True):
        value = env.get(name, default)
        if value is None or not value.isdecimal():
            fix = "start with torchrun or srun, or unset RANK"
            raise InputError("not a number", where=f"environment variable {name}", value=value, fix=fix)
        numbers.append(int(value))
    return Ranks(*numbers)


def first_host(nodes: str) -> str:
    """Return the first host of a Slurm node list such as ``gpu[03-05,9],cpu1``; empty for an empty list."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first.group()) if first else ""


def _port(env: MutableMapping[str, str]) -> int:
    """A port that all tasks of a job agree on and that differs between jobs on one machine."""
    return 20000 + int(env.get("SLURM_JOB_ID", "0")) % 20000
