"""Checkpoints in and out: Hugging Face <-> Hugging Face dynamic <-> Megatron, streaming, exact, complete or absent."""

from megatron_zeda.conversion.exporting import megatron_to_hf
from megatron_zeda.conversion.importing import hf_to_megatron
from megatron_zeda.conversion.injecting import inject_zero_experts
from megatron_zeda.conversion.verification import verify_checkpoint

__all__ = ["hf_to_megatron", "inject_zero_experts", "megatron_to_hf", "verify_checkpoint"]
