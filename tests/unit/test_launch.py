"""Ranks from torchrun's variables or from srun's."""

from __future__ import annotations

import pytest

from megatron_zeda.errors import InputError
from megatron_zeda.launch import Ranks, first_host, ranks_from_environment

SRUN = {
    "SLURM_JOB_ID": "1234567",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_NTASKS": "8",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "gpu[03-04]",
}


def test_one_process_without_any_variable() -> None:
    env: dict[str, str] = {}
    assert ranks_from_environment(env) == Ranks(0, 1, 0)
    assert env == {}


def test_torchrun() -> None:
    env = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", **SRUN}
    before = dict(env)
    assert ranks_from_environment(env) == Ranks(3, 4, 1)
    assert env == before


def test_srun_fills_in_what_torch_reads() -> None:
    env = dict(SRUN)
    assert ranks_from_environment(env) == Ranks(9, 16, 1)
    assert (env["RANK"], env["WORLD_SIZE"], env["LOCAL_RANK"]) == ("9", "16", "1")
    assert env["MASTER_ADDR"] == "gpu03"
    other = {**SRUN, "SLURM_JOB_ID": "1234568"}
    ranks_from_environment(other)
    assert 20000 <= int(env["MASTER_PORT"]) < 40000 and env["MASTER_PORT"] != other["MASTER_PORT"]
    assert ranks_from_environment(env) == Ranks(9, 16, 1)  # once more, now from its own variables


def test_srun_leaves_a_given_address_alone() -> None:
    env = {**SRUN, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
    ranks_from_environment(env)
    assert (env["MASTER_ADDR"], env["MASTER_PORT"]) == ("10.0.0.1", "29500")


def test_a_batch_script_without_srun_is_one_process() -> None:
    env = {key: value for key, value in SRUN.items() if not key.startswith("SLURM_STEP")}
    assert ranks_from_environment(env) == Ranks()


@pytest.mark.parametrize("env", [{"RANK": "0"}, {"RANK": "x", "WORLD_SIZE": "2"}, {"RANK": "-1", "WORLD_SIZE": "2"}])
def test_broken_variables_are_named(env: dict[str, str]) -> None:
    with pytest.raises(InputError, match="environment variable"):
        ranks_from_environment(env)


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("localhost", "localhost"),
        ("node7,node9", "node7"),
        ("gpu[003-007,12],cpu1", "gpu003"),
        ("gpu[12,3-7]", "gpu12"),
        ("rack[2-3]-node[05,07]", "rack2-node05"),
        ("a-b.c,d", "a-b.c"),
        ("", ""),
    ],
)
def test_first_host(nodes: str, host: str) -> None:
    assert first_host(nodes) == host
