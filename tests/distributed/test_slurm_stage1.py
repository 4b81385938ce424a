"""slurm/zeda_stage1.sh with a stand-in srun that starts two real tasks: two ranks train, save and export."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_hf import save_static

from megatron_zeda.conversion import hf_to_megatron, inject_zero_experts

ROOT = Path(__file__).parents[2]

# Starts the command twice, with what srun tells its tasks; the worse exit code is its own.
SRUN = """#!/usr/bin/env bash
shift  # --kill-on-bad-exit=1
for task in 0 1; do
    SLURM_STEP_ID=0 SLURM_PROCID=$task SLURM_LOCALID=$task SLURM_STEP_NUM_TASKS=2 SLURM_STEP_NODELIST=localhost "$@" &
done
wait -n; first=$?
wait -n; second=$?
exit $((first > second ? first : second))
"""

CONFIG = """
model: {hf: dynamic, checkpoint: dynamic-megatron, expert_model_parallel_size: 2, bf16: false, seq_length: 64}
dataset: {train: chats.jsonl}
train: {train_epochs: 1, global_batch_size: 4, micro_batch_size: 2}
logger: {run_dir: unset}
"""


@pytest.mark.distributed
def test_two_tasks_train_one_model(tmp_path: Path) -> None:
    save_static(tmp_path / "static")
    inject_zero_experts(tmp_path / "static", tmp_path / "dynamic", num_zero_experts=4)
    hf_to_megatron(tmp_path / "dynamic", tmp_path / "dynamic-megatron")
    with (tmp_path / "chats.jsonl").open("w") as file:
        for number in range(12):
            messages = [{"role": "user", "content": f"{number}+1?"}, {"role": "assistant", "content": str(number + 1)}]
            file.write(json.dumps({"messages": messages}) + "\n")
    (tmp_path / "config.yaml").write_text(CONFIG)
    (tmp_path / "bin").mkdir()
    for name, text in (("srun", SRUN), ("scontrol", "#!/usr/bin/env bash\necho localhost\n")):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    environment = {
        name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    }
    environment |= {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "ZEDA_HOME": str(ROOT),
        "ZEDA_PYTHON": sys.executable,
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NODELIST": "localhost",
        "OMP_NUM_THREADS": "1",
    }

    def submit(*overrides: str) -> subprocess.CompletedProcess[str]:
        command = ["bash", str(ROOT / "slurm/zeda_stage1.sh"), "config.yaml", *overrides]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

    done = submit("logger.run_dir=a run", "optimizer.lr=1e-3")
    assert done.returncode == 0, done.stderr
    run = tmp_path / "a run"
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == [1, 2, 3]
    assert (run / "checkpoints/latest_checkpointed_iteration.txt").read_text().strip() == "3"
    assert (run / "hf/config.json").exists()

    refused = submit("logger.run_dir=other run", "optimizer.lr=fast")
    assert refused.returncode == 2
    errors = [line for line in refused.stderr.splitlines() if "error" in line]
    assert len(errors) == 1 and errors[0].startswith("[rank 0] error: optimizer.lr: ")
    assert not (tmp_path / "other run").exists()
