"""Where the checks of this folder run, and the numbers they leave.

``make test-gpu`` runs them on one GPU with Transformer Engine. Elsewhere they skip, except that
``ZEDA_TEST_GPU=rehearse`` runs, on the CPU and with Megatron-Core's local layers, those whose arithmetic does not need
the hardware: that shows that a check is right, and nothing about the GPU path.

Every run writes what it measured to ``runs/gpu-checks.json`` (or ``ZEDA_GPU_RESULTS``); docs/verification.md is filled
in from there.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform as python_platform
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_zeda import platform

HERE = Path(__file__).parent
REHEARSAL = os.environ.get("ZEDA_TEST_GPU") == "rehearse"
_results: dict[str, dict[str, Any]] = {}


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "hardware: a check in tests/gpu that cannot be rehearsed on a CPU")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE not in item.path.parents:
            continue
        item.add_marker(pytest.mark.gpu)
        if platform.have_transformer_engine():
            continue
        if not REHEARSAL:
            item.add_marker(pytest.mark.skip(reason="needs a GPU and Transformer Engine (make test-gpu)"))
        elif item.get_closest_marker("hardware"):
            item.add_marker(pytest.mark.skip(reason="cannot be rehearsed without a GPU"))


@pytest.fixture(autouse=True)
def _no_loss_scale_left() -> None:
    """Megatron-Core keeps one for the whole process, in a shape that depends on who needed it first."""
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    MoEAuxLossAutoScaler.main_loss_backward_scale = None


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Iterator[Callable[..., None]]:
    """``record(name=number, ...)``: what this check measured."""
    numbers: dict[str, Any] = {}
    yield numbers.update
    _results.setdefault(request.node.nodeid, {})["numbers"] = numbers


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[Any]:
    report = yield
    if HERE in item.path.parents and (report.when == "call" or report.outcome != "passed"):
        entry = _results.setdefault(item.nodeid, {})
        entry["outcome"] = report.outcome
        if report.failed:
            entry["error"] = str(report.longrepr)[-2000:]
    return report


def pytest_sessionfinish() -> None:
    if not any(entry.get("outcome") in ("passed", "failed") for entry in _results.values()):
        return
    path = Path(os.environ.get("ZEDA_GPU_RESULTS", "runs/gpu-checks.json"))
    path.parent.mkdir(parents=True, exist_ok=True)
    found = _finite({"machine": _machine(), "rehearsal": REHEARSAL, "checks": _results})
    path.write_text(json.dumps(found, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _finite(value: Any) -> Any:
    """The same with NaN and infinities as strings, which JSON has no numbers for."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _machine() -> dict[str, Any]:
    facts: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": python_platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }
    for name in ("megatron-core", "transformer-engine", "apex"):
        try:
            facts[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            facts[name] = None
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        facts |= {
            "gpu": properties.name,
            "gpu memory (GiB)": round(properties.total_memory / 2**30, 1),
            "compute capability": f"{properties.major}.{properties.minor}",
        }
    return facts
