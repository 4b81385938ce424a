"""A run that is told to stop saves at the next step boundary, exits 0, and goes on later as if nothing had been."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from training_runs import make_config, make_run

from megatron_zeda.config import Config
from megatron_zeda.config_io import to_yaml
from megatron_zeda.training.signals import StopRequest, helpers_outlive_signals

pytestmark = pytest.mark.slow  # whole training runs: `make test`, not `make check`

RUN = """
import sys
from megatron_zeda.cli import main
if __name__ == "__main__":
    sys.exit(main(["train", sys.argv[1]]))
"""


def test_stop_request_remembers_the_signal_and_then_steps_aside() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest() as stop:
        assert not stop.requested()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested() and stop.reason == "SIGTERM"
        assert signal.getsignal(signal.SIGTERM) == before  # the next one ends the process
    assert signal.getsignal(signal.SIGTERM) == before


def test_helpers_outlive_signals() -> None:
    show = [
        sys.executable,
        "-c",
        "import signal; print(signal.SIGTERM in signal.pthread_sigmask(signal.SIG_BLOCK, ()))",
    ]

    def deaf() -> bool:
        return subprocess.run(show, capture_output=True, text=True, check=True).stdout == "True\n"

    assert not deaf()
    with helpers_outlive_signals():
        assert deaf()
    assert not deaf()


def test_time_is_up() -> None:
    with StopRequest(minutes=1e-9) as stop:
        time.sleep(0.001)
        assert stop.requested()
        assert stop.reason is not None and "exit_duration_in_mins" in stop.reason


def write_run(root: Path, name: str, steps: int) -> tuple[Config, Path]:
    config = make_config(root, name)
    config.teacher.checkpoint, config.dataset.validation = None, []
    config.train.train_iters, config.checkpoint.save_interval = steps, 2
    path = root / f"{name}.yaml"
    path.write_text(to_yaml(config))
    return config, path


def lines_of(config: Config) -> int:
    path = config.run_dir / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


@pytest.mark.slow
def test_sigterm_to_the_whole_job_saves_and_exits_0(tmp_path: Path) -> None:
    make_run(tmp_path)
    (tmp_path / "run.py").write_text(RUN)
    config, path = write_run(tmp_path, "stopped", 100_000)
    # As a scheduler does it: every process of the job gets the signal, the helpers of checkpoints among them.
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "run.py"), str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        # However slow the machine is: two saves have been made, so there are helpers.
        while lines_of(config) < 5 and process.poll() is None:
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGTERM)
        output, _ = process.communicate()
    finally:
        process.kill()
    assert process.returncode == 0, output
    done = int((config.save_dir / "latest_checkpointed_iteration.txt").read_text())
    assert done == lines_of(config) >= 5, output
    assert f"stopping after step {done}: SIGTERM; the same command goes on from here" in output
    assert "step/s" not in output  # no progress bar where there is no terminal

    _, path = write_run(tmp_path, "stopped", done + 2)
    again = subprocess.run([sys.executable, str(tmp_path / "run.py"), str(path)], capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert f"resuming at step {done}" in again.stdout
    steps = [json.loads(line)["step"] for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, done + 3))
