"""The CPU adapter: CUDA's names mean the CPU, and nothing else changes."""

from __future__ import annotations

import pytest
import torch

from megatron_zeda import platform

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the adapter is for machines without a GPU")


@pytest.fixture(autouse=True)
def _installed() -> None:
    platform.install()
    platform.install()  # idempotent


def test_cuda_names_mean_the_cpu() -> None:
    tensors = [
        torch.zeros(2, device="cuda"),
        torch.tensor([1.0], device=torch.device("cuda", 0)),
        torch.empty(2, device=torch.cuda.current_device()),
        torch.ones(2).cuda(),
        torch.ones(2).to("cuda"),
        torch.ones(2).to(device="cuda", dtype=torch.float64),
    ]
    assert {tensor.device.type for tensor in tensors} == {"cpu"}
    assert tensors[-1].dtype == torch.float64
    assert torch.zeros(2, dtype=torch.bfloat16).type() == "torch.cuda.BFloat16Tensor"
    assert torch.zeros(2).type(torch.int64).dtype == torch.int64


def test_nothing_is_pinned() -> None:
    # Megatron-Core pins what it copies to a GPU, positions of context-parallel ranks among it.
    tensors = [torch.tensor([1], device="cpu", pin_memory=True), torch.empty(2, pin_memory=True), torch.ones(2)]
    assert [tensor.pin_memory().is_pinned() for tensor in tensors] == [False] * 3


def test_other_devices_and_dtypes_are_left_alone() -> None:
    assert torch.zeros(2, device="meta").device.type == "meta"
    with torch.device("meta"):
        assert torch.zeros(2).device.type == "meta"
        assert torch.arange(3).device.type == "meta"
    assert torch.ones(2).to(torch.int32).dtype == torch.int32
    assert torch.ones(2).to("cpu").device.type == "cpu"


def test_random_states_of_the_tracker_are_their_own() -> None:
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    tracker = CudaRNGStatesTracker()
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    tracker.add("experts", 5)
    with tracker.fork("experts"):
        first = torch.rand(3)
    assert torch.equal(torch.rand(3), expected)  # the default generator did not notice
    with tracker.fork("experts"):
        second = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(3), first) and torch.equal(torch.rand(3), second)


def test_overrides_name_real_settings() -> None:
    from dataclasses import fields

    from megatron_zeda.zero_experts import ZeroExpertTransformerConfig

    assert platform.transformer_config_overrides().keys() <= {
        field.name for field in fields(ZeroExpertTransformerConfig)
    }
    assert platform.backend() == "gloo" and platform.device().type == "cpu"
    assert not platform.have_transformer_engine() and not platform.have_fused_weight_gradient()
