"""Collected only where vLLM is installed: ``make test-vllm`` makes an environment for it."""

from __future__ import annotations

import os
from importlib.util import find_spec

os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported: its own functions look at it then

collect_ignore_glob = [] if find_spec("vllm") else ["test_*.py"]
