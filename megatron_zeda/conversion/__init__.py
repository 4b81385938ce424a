"""Checkpoints in and out: Hugging Face <-> Hugging Face dynamic <-> Megatron, streaming, exact, complete or absent."""

from megatron_zeda.conversion.injecting import inject_zero_experts

__all__ = ["inject_zero_experts"]
