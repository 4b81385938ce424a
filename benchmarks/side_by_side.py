"""What every benchmark here needs: a description of the machine, interleaved timing, ratios with their spread, targets.

Two things are compared by running them in turn (A B A B) in one process and dividing neighbours, so that a machine that
speeds up or slows down meanwhile does not decide the result.
"""

from __future__ import annotations

import ctypes
import gc
import importlib.metadata
import json
import os
import platform as python_platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

# On a CPU every row count of an expert is a kernel that oneDNN compiles. Its default of 1024 is less than the layers
# compared here need together, so that each would time the compilation of what the other one evicted.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "65536")

import torch

Measurements = dict[str, float]
_CPU_FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


def start(threads: int | None) -> torch.device:
    """Prepare this process: adapter, threads, allocator, one-process Megatron-Core. Returns the device."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from megatron_zeda import platform

    platform.install()
    device = prepare(platform.device(), threads)
    if not torch.distributed.is_initialized():
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group(platform.backend(), rank=0, world_size=1, store=store)
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel()
    torch.manual_seed(1)
    model_parallel_cuda_manual_seed(1)
    return device


def prepare(device: torch.device, threads: int | None) -> torch.device:
    """Select a GPU, or set the threads and the allocator of a CPU run. Returns the device."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(threads or len(os.sched_getaffinity(0)))
        _keep_freed_memory()
    return device


def _keep_freed_memory() -> None:
    """Let glibc keep what is freed, as the caching allocator does on a GPU.

    Otherwise each pass gets its gigabytes from the kernel again, page by page, and the benchmark times page faults.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        m_trim_threshold, m_mmap_max = -1, -4
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, -1)  # never


def seconds(run: Callable[[], None], device: torch.device) -> float:
    """Duration of one call: wall clock on a CPU, CUDA events on a GPU."""
    if device.type != "cuda":
        begin = time.perf_counter()
        run()
        return time.perf_counter() - begin
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    first.record()
    run()
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last) / 1000.0


def interleaved(
    runs: Sequence[tuple[str, Callable[[], None]]],
    *,
    rounds: int,
    device: torch.device,
    before: Callable[[], None] = lambda: None,
) -> dict[str, list[float]]:
    """Time ``runs`` in their order, again and again. A name that occurs twice is run (and recorded) twice a round.

    Args:
        runs: names and functions; every function is called twice untimed first.
        rounds: how often the whole sequence is timed.
        device: see :func:`seconds`.
        before: called untimed before every call (to drop the gradients of the last one).

    Returns:
        Durations in seconds by name, in the order of the calls.
    """
    for _ in range(2):
        for run in dict(runs).values():
            before()
            run()
    durations: dict[str, list[float]] = {name: [] for name, _ in runs}
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for name, run in runs:
                before()
                durations[name].append(seconds(run, device))
    finally:
        gc.enable()
    return durations


def spread(values: Sequence[float]) -> Measurements:
    """Median, smallest and largest value."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def ratio(ours: Sequence[float], theirs: Sequence[float], offset: float = 0.0) -> Measurements:
    """Spread of the pairwise ratios, after subtracting ``offset`` from both (a part that both contain)."""
    return spread([(a - offset) / (b - offset) for a, b in zip(ours, theirs, strict=True)])


@dataclass(frozen=True)
class Target:
    """A limit, from above unless ``at_least``, and what was measured."""

    name: str
    limit: float
    measured: float
    at_least: bool = False

    @property
    def met(self) -> bool:
        return self.measured >= self.limit if self.at_least else self.measured <= self.limit

    def __str__(self) -> str:
        rule = f"at {'least' if self.at_least else 'most'} {self.limit:.5g}"
        return f"{self.name}: {self.measured:.3f} ({rule}): {'met' if self.met else 'MISSED'}"


def machine() -> dict[str, Any]:
    """What the figures depend on: processor, memory, threads, load, versions, revision and date."""
    packages = ("torch", "transformers", "megatron-core", "transformer-engine")
    installed = {d.metadata["Name"] for d in importlib.metadata.distributions()}
    description: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="minutes"),
        "cpu": _proc("/proc/cpuinfo", "model name"),
        "cpu_features": [name for name in _CPU_FEATURES if name in _proc("/proc/cpuinfo", "flags").split()],
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "onednn_primitive_cache_capacity": int(os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"]),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "load_average_1_min": os.getloadavg()[0],
        "python": python_platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in packages if name in installed},
        "revision": _revision(),
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        description["gpu"] = {
            "name": properties.name,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "cuda": torch.version.cuda,
        }
    return description


def _proc(path: str, key: str) -> str:
    """The first value of ``key`` in a file of ``key : value`` lines."""
    for line in Path(path).read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return "unknown"


def _revision() -> str:
    """The commit of this checkout, with ``+changes`` when the code differs from it."""
    here = Path(__file__).parent
    try:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True)
        changed = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", "../megatron_zeda", "."], cwd=here)
    except FileNotFoundError:
        return "unknown"
    if commit.returncode:
        return "unknown"
    return commit.stdout.strip() + ("+changes" if changed.returncode else "")


def write(output: Path | None, benchmark: str, settings: dict[str, Any], results: Any, targets: list[Target]) -> None:
    """Print the targets, and write everything with the machine and the command as JSON.

    The command is this process's; of the output only the name is kept.
    """
    for target in targets:
        print(target)
    if output is None:
        return
    arguments = [f"benchmarks/results/{output.name}" if word == str(output) else word for word in sys.argv[1:]]
    script = Path(sys.argv[0])
    folder = "benchmarks/serving" if script.parent.name == "serving" else "benchmarks"
    command = " ".join(["python", f"{folder}/{script.name}", *arguments])
    record = {
        "benchmark": benchmark,
        "command": command,
        "machine": machine(),
        "settings": settings,
        "results": results,
        "targets": [asdict(target) | {"met": target.met} for target in targets],
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(_rounded(record), indent=1) + "\n")
    print(f"wrote {output}")


def _rounded(value: Any) -> Any:
    """Floats with the digits that mean something."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list | tuple) else value
