"""Shared fixtures. Everything runs on the CPU, offline, with one thread per process; `make test-gpu` uses the GPU."""

from __future__ import annotations

import atexit
import gc
import os
import shutil
import tempfile
from collections.abc import Iterator

if os.environ.get("ZEDA_TEST_GPU") != "1":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Where transformers copies the modelling files of the folders that tests load, for each process of pytest-xdist.
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="zeda-test-modules-")

import pytest
import torch
from spawn import end_megatron, initialize_megatron

torch.set_num_threads(1)
atexit.register(shutil.rmtree, os.environ["HF_MODULES_CACHE"], ignore_errors=True)


def pytest_collection_finish() -> None:
    """Leave the imported modules out of all collections: walking them takes a second, and Megatron-Core collects at
    every save."""
    gc.collect()
    gc.freeze()


def _num_threads() -> int:
    return len(os.listdir("/proc/self/task"))


@pytest.fixture(autouse=True)
def _no_left_over_groups(request: pytest.FixtureRequest) -> Iterator[None]:
    """Tests that use `megatron` share its groups while they follow each other; any other test starts without."""
    if "megatron" not in request.fixturenames and torch.distributed.is_initialized():
        end_megatron()
        torch.distributed.destroy_process_group()
    before = _num_threads()
    yield
    if _num_threads() > before + 30 and not torch.distributed.is_initialized():
        gc.collect()  # models in reference cycles hold their groups, and every gloo group polls in a thread of its own


@pytest.fixture
def megatron() -> None:
    """Megatron-Core initialised in this process: TP = PP = EP = CP = DP = 1, seeded anew."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from megatron_zeda import platform

    platform.install()
    if not torch.distributed.is_initialized():
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group(platform.backend(), rank=0, world_size=1, store=store)
    if not parallel_state.model_parallel_is_initialized():
        initialize_megatron()
    torch.manual_seed(1234)
    model_parallel_cuda_manual_seed(1234)
