"""examples/stock_megatron_loop.py, run as its docstring says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from spawn import free_port

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
EXAMPLE = Path(__file__).parents[2] / "examples" / "stock_megatron_loop.py"


@pytest.mark.parametrize("num_processes", [1, 2])
def test_loop_learns_and_skips(num_processes: int) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_processes)]
    command = [*torchrun, str(EXAMPLE)] if num_processes > 1 else [sys.executable, str(EXAMPLE)]
    environment = {**os.environ, "MASTER_PORT": str(free_port())}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    found = re.findall(r"step (\d+): loss ([\d.]+), skip rate ([\d.]+)", result.stdout)
    steps, losses, rates = zip(*((int(a), float(b), float(c)) for a, b, c in found), strict=True)
    assert steps == (5, 10, 15, 20)
    # Eight equally likely tokens out of 128: an untrained model is at ln 128 = 4.85 or above, the best is ln 8 = 2.08.
    assert losses[0] > 2.5 > 2.25 > losses[-1] > 2.0
    assert 0.1 < rates[-1] < 0.9
