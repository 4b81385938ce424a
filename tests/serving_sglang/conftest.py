"""Collected only where SGLang is installed: ``make test-sglang`` makes an environment for it."""

from __future__ import annotations

from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("sglang") else ["test_*.py"]
