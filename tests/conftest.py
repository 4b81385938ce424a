"""Shared fixtures. Everything runs on the CPU, offline, with one thread per process; `make test-gpu` uses the GPU."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile

if os.environ.get("ZEDA_TEST_GPU") != "1":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Where transformers copies the modelling files of the folders that tests load.
if "HF_MODULES_CACHE" not in os.environ:
    os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="zeda-test-modules-")
    atexit.register(shutil.rmtree, os.environ["HF_MODULES_CACHE"], ignore_errors=True)

from collections.abc import Iterator

import pytest
import torch
from spawn import _free_port, initialize_megatron

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def _default_process_group() -> Iterator[None]:
    from megatron_zeda import platform

    platform.install()
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, init_method=f"tcp://127.0.0.1:{_free_port()}")
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.fixture
def megatron(_default_process_group: None) -> Iterator[None]:
    """Megatron-Core initialised in this process: TP = PP = EP = CP = DP = 1, seeded."""
    from megatron.core import parallel_state

    initialize_megatron()
    yield
    parallel_state.destroy_model_parallel()
