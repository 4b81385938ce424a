"""slurm/zeda_stage1.sh under stand-ins for srun and scontrol: what reaches the tasks, and what comes back."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "slurm/zeda_stage1.sh"

# Records its arguments and its environment, each ended by NUL, and its own process; then exits, or waits for a signal.
SRUN = """#!/usr/bin/env bash
printf '%s\\0' "$@" > "$RECORD/arguments"
env -0 > "$RECORD/environment"
[[ -z ${STAND_IN_WAITS:-} ]] || exec python3 -c '
import os, pathlib, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(17))
pathlib.Path(os.environ["RECORD"], "pid").write_text(str(os.getpid()))
time.sleep(60)'
exit "${STAND_IN_CODE:-0}"
"""

SCONTROL = """#!/usr/bin/env bash
case "$1 $2" in
    "show hostnames") [[ $3 == "gpu[03-04]" ]] && printf 'gpu03\\ngpu04\\n' ;;
    "show job") printf 'JobId=%s JobName=x\\n   Command=%s\\n   WorkDir=/\\n' "$3" "$SUBMITTED" ;;
    *) exit 1 ;;
esac
"""


@dataclass
class Cluster:
    """A folder with the stand-ins, and the environment of a batch job that Slurm runs from its spool folder."""

    folder: Path
    script: Path
    environment: dict[str, str]

    def run(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", str(self.script), *arguments],
            cwd=self.folder,
            env={**self.environment, **environment},
            capture_output=True,
            text=True,
        )

    def arguments(self) -> list[str]:
        """What srun was called with."""
        return (self.folder / "arguments").read_text().split("\0")[:-1]

    def variables(self) -> dict[str, str]:
        """What srun's environment was."""
        lines = (self.folder / "environment").read_text().split("\0")[:-1]
        return dict(line.split("=", 1) for line in lines)


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    stand_ins, spool, work = tmp_path / "bin", tmp_path / "spool/job00042", tmp_path / "work folder"
    for folder in (stand_ins, spool, work):
        folder.mkdir(parents=True)
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (stand_ins / name).write_text(text)
        (stand_ins / name).chmod(0o755)
    script = spool / "slurm_script"
    shutil.copy(SCRIPT, script)
    (work / "my.yaml").write_text("")
    environment = {
        "PATH": f"{stand_ins}:{os.environ['PATH']}",
        "RECORD": str(work),
        "SUBMITTED": str(SCRIPT),
        "SLURM_JOB_ID": "1234567",
        "SLURM_JOB_NODELIST": "gpu[03-04]",
        "SLURM_SUBMIT_DIR": str(work),
    }
    return Cluster(work, script, environment)


def test_arguments_arrive_as_they_were_written(cluster: Cluster) -> None:
    overrides = [
        "logger.run_dir=/a b/c",
        "dataset.train=['x y.jsonl', \"z.jsonl\"]",
        "model.overrides={a: *.yaml, b: $HOME}",
        "--train.seed=1",
        "optimizer.lr=1e-5 # `no`; \\comment\nsecond line",
        "",
    ]
    done = cluster.run("my.yaml", *overrides)
    assert done.returncode == 0, done.stderr
    assert cluster.arguments()[-len(overrides) - 5 :][1:] == ["-m", "megatron_zeda", "train", "my.yaml", *overrides]


def test_without_a_configuration_it_takes_the_full_size_example(cluster: Cluster) -> None:
    example = str(ROOT / "examples/qwen3_30b_a3b/stage1.yaml")
    for overrides in ([], ["train.seed=1"], ["checkpoint.save=a.yaml"]):
        assert cluster.run(*overrides).returncode == 0
        assert cluster.arguments()[-len(overrides) - 2 :] == ["train", example, *overrides]


@pytest.mark.parametrize("home", [True, False])
def test_stage_2_is_the_same_with_its_own_example(cluster: Cluster, home: bool) -> None:
    shutil.copy(SCRIPT.with_name("zeda_stage2.sh"), cluster.script)
    submitted = {"ZEDA_HOME": str(ROOT)} if home else {"SUBMITTED": f"{ROOT}/slurm/zeda_stage2.sh my.yaml"}
    done = cluster.run("train.seed=1", SLURM_CPUS_PER_TASK="6", **submitted)
    assert done.returncode == 0, done.stderr
    example = str(ROOT / "examples/qwen3_30b_a3b/stage2.yaml")
    assert cluster.arguments()[-5:] == ["-m", "megatron_zeda", "train", example, "train.seed=1"]
    assert cluster.variables()["MASTER_ADDR"] == "gpu03" and done.stdout.startswith("zeda_stage2.sh: job ")
    assert cluster.run("my.yaml", "train.seed=1", **submitted).returncode == 0
    assert cluster.arguments()[-2:] == ["my.yaml", "train.seed=1"]
    assert cluster.run("no.yaml", **submitted).returncode == 2
    if not home:
        lost = cluster.run("my.yaml", SUBMITTED="/nowhere")
        assert lost.returncode == 2 and "zeda_stage2.sh: error: the repository was not found" in lost.stderr


def test_a_configuration_may_have_an_equals_sign_in_its_name(cluster: Cluster) -> None:
    (cluster.folder / "lr=3.yaml").write_text("")
    assert cluster.run("lr=3.yaml", "train.seed=1").returncode == 0
    assert cluster.arguments()[-2:] == ["lr=3.yaml", "train.seed=1"]


def test_one_lost_task_ends_the_job_and_the_exit_code_is_srun_s(cluster: Cluster) -> None:
    for code in (0, 1, 2, 130):
        assert cluster.run("my.yaml", STAND_IN_CODE=str(code)).returncode == code
    assert "--kill-on-bad-exit=1" in cluster.arguments()


def test_the_tasks_find_each_other_and_the_package(cluster: Cluster) -> None:
    assert cluster.run("my.yaml", SLURM_CPUS_PER_TASK="6", PYTHONPATH="/else").returncode == 0
    variables = cluster.variables()
    assert variables["MASTER_ADDR"] == "gpu03" and variables["MASTER_PORT"] == str(20000 + 1234567 % 20000)
    assert variables["PYTHONPATH"] == f"{ROOT}:/else"
    assert variables["CUDA_DEVICE_MAX_CONNECTIONS"] == "1"
    assert variables["SRUN_CPUS_PER_TASK"] == variables["OMP_NUM_THREADS"] == "6"


def test_what_is_given_stays(cluster: Cluster) -> None:
    given = {
        "MASTER_ADDR": "10.0.0.1",
        "MASTER_PORT": "29500",
        "OMP_NUM_THREADS": "2",
        "CUDA_DEVICE_MAX_CONNECTIONS": "32",
        "SLURM_CPUS_PER_TASK": "6",
    }
    assert cluster.run("my.yaml", ZEDA_PYTHON="/opt/my python", **given).returncode == 0
    assert given.items() <= cluster.variables().items()
    assert "/opt/my python" in cluster.arguments()


def test_srun_takes_the_place_of_the_script_so_signals_reach_it(cluster: Cluster) -> None:
    process = subprocess.Popen(
        ["bash", str(cluster.script), "my.yaml"],
        cwd=cluster.folder,
        env={**cluster.environment, "STAND_IN_WAITS": "1"},
        stdout=subprocess.DEVNULL,
    )
    pid = cluster.folder / "pid"
    while not (pid.exists() and pid.read_text()):
        assert process.poll() is None
        time.sleep(0.02)
    assert int(pid.read_text()) == process.pid
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 17


@pytest.mark.parametrize("behind", ["", " my.yaml train.seed=1"])
def test_the_repository_is_the_one_the_job_was_submitted_from(cluster: Cluster, behind: str) -> None:
    """Also where Slurm puts the arguments behind the script, and where the path has spaces."""
    copy = cluster.folder / "my zeda"
    (copy / "slurm").mkdir(parents=True)
    (copy / "megatron_zeda").mkdir()
    shutil.copy(SCRIPT, copy / "slurm")
    done = cluster.run("my.yaml", SUBMITTED=f"{copy}/slurm/zeda_stage1.sh{behind}")
    assert done.returncode == 0, done.stderr
    assert cluster.variables()["PYTHONPATH"] == str(copy)


def test_the_repository_may_be_the_folder_of_submission_or_named(cluster: Cluster) -> None:
    assert cluster.run("my.yaml", SUBMITTED="/gone", SLURM_SUBMIT_DIR=str(ROOT / "slurm")).returncode == 0
    assert cluster.variables()["PYTHONPATH"] == str(ROOT)
    assert cluster.run("my.yaml", SUBMITTED="/gone", ZEDA_HOME=str(ROOT)).returncode == 0
    assert cluster.variables()["PYTHONPATH"] == str(ROOT)


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (["my.yaml"], {"SUBMITTED": "/gone"}, "the repository was not found; set ZEDA_HOME"),
        (["my.yaml"], {"ZEDA_HOME": "/gone"}, "ZEDA_HOME=/gone is not the repository"),
        (["no.yaml"], {}, "no.yaml: the configuration file does not exist"),
        (["my.yaml"], {"ZEDA_CONTAINER_IMAGE": "/gone.sqsh"}, "ZEDA_CONTAINER_IMAGE=/gone.sqsh does not exist"),
        (["my.yaml"], {"ZEDA_CONTAINER_IMAGE": "gone.sqsh"}, "ZEDA_CONTAINER_IMAGE=gone.sqsh does not exist"),
    ],
)
def test_what_is_missing_is_named_before_any_task_starts(
    cluster: Cluster, arguments: list[str], environment: dict[str, str], message: str
) -> None:
    done = cluster.run(*arguments, **environment)
    assert done.returncode == 2
    assert done.stderr.startswith("zeda_stage1.sh: error: ") and message in done.stderr
    assert not (cluster.folder / "arguments").exists()


def test_outside_of_a_job_it_says_what_to_do(cluster: Cluster) -> None:
    del cluster.environment["SLURM_JOB_NODELIST"]
    done = cluster.run("my.yaml")
    assert done.returncode != 0 and "submit this script with sbatch" in done.stderr


def test_container(cluster: Cluster) -> None:
    image = cluster.folder / "an image.sqsh"
    image.write_text("")
    assert cluster.run("my.yaml", ZEDA_CONTAINER_IMAGE=str(image), ZEDA_CONTAINER_MOUNTS="/data:/data").returncode == 0
    work = cluster.folder
    assert cluster.arguments()[1:5] == [
        f"--container-image={image}",
        f"--container-mounts={ROOT}:{ROOT},{work}:{work},/data:/data",
        f"--container-workdir={work}",
        "python3",
    ]
    assert cluster.run("my.yaml", ZEDA_CONTAINER_IMAGE="nvcr.io#nvidia/pytorch:25.09-py3").returncode == 0
    assert "--container-image=nvcr.io#nvidia/pytorch:25.09-py3" in cluster.arguments()


def test_the_header_asks_for_a_task_per_gpu_and_a_warning_before_the_end() -> None:
    header = [line.split()[1] for line in SCRIPT.read_text().splitlines() if line.startswith("#SBATCH")]
    wanted = {"--ntasks-per-node=8", "--gpus-per-node=8", "--signal=TERM@300", "--requeue", "--open-mode=append"}
    assert wanted <= set(header)
