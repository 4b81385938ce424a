"""What the machine offers, and the adapter that lets Megatron-Core run without a GPU.

This package is the one place in the project that patches anything. On a machine with CUDA :func:`install` does nothing.
"""

from __future__ import annotations

import importlib.util
import os
from functools import cache
from typing import Any

import torch

__all__ = [
    "backend",
    "device",
    "have_fused_weight_gradient",
    "have_transformer_engine",
    "install",
    "transformer_config_overrides",
]


def install() -> None:
    """Make Megatron-Core usable on this machine. Idempotent; nothing is patched where CUDA is available."""
    if not torch.cuda.is_available():
        from megatron_zeda.platform import cpu

        cpu.install()


def device() -> torch.device:
    """The device of this process: ``cuda:LOCAL_RANK``, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def backend() -> str:
    """The ``torch.distributed`` backend that goes with :func:`device`."""
    return "nccl" if torch.cuda.is_available() else "gloo"


@cache
def have_transformer_engine() -> bool:
    """Whether Transformer Engine can be used: installed, and with a GPU (its modules cannot be built without)."""
    return torch.cuda.is_available() and importlib.util.find_spec("transformer_engine") is not None


@cache
def have_fused_weight_gradient() -> bool:
    """Whether apex's fused weight-gradient kernel is there (``gradient_accumulation_fusion`` depends on it)."""
    return torch.cuda.is_available() and importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None


def transformer_config_overrides() -> dict[str, Any]:
    """``TransformerConfig`` settings that this machine decides: which fused kernels there are.

    Megatron-Core's fused paths are CUDA only, and some defaults ask for Transformer Engine or apex without a fall-back.
    """
    # Megatron's own linear layers (the output layer, also beside Transformer Engine) need apex's kernel for it.
    overrides: dict[str, Any] = {"gradient_accumulation_fusion": have_fused_weight_gradient()}
    if not have_transformer_engine():
        overrides.update(
            transformer_impl="local", moe_permute_fusion=False, moe_grouped_gemm=False, persist_layer_norm=False
        )
    if not torch.cuda.is_available():
        overrides.update(
            use_cpu_initialization=True,
            masked_softmax_fusion=False,
            bias_activation_fusion=False,
            bias_dropout_fusion=False,
            apply_rope_fusion=False,
        )
    return overrides
