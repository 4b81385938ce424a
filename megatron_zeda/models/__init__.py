"""Model families: Hugging Face configuration <-> Megatron-Core, and the names of every weight in both worlds."""

from megatron_zeda.models.base import ExpertLayout, Family, HfPiece, Packing, WeightRow
from megatron_zeda.models.build import (
    build_gpt_model,
    build_transformer_config,
    draft_transformer_config,
    parallel_problems,
    unknown_fields,
)
from megatron_zeda.models.hf_config import HfConfig, load_hf_config
from megatron_zeda.models.methods import METHODS, STATIC_METHODS, Method, method_of, teacher_topk, with_method
from megatron_zeda.models.registry import FAMILIES, family_for

__all__ = [
    "FAMILIES",
    "METHODS",
    "STATIC_METHODS",
    "ExpertLayout",
    "Family",
    "HfConfig",
    "HfPiece",
    "Method",
    "Packing",
    "WeightRow",
    "build_gpt_model",
    "build_transformer_config",
    "draft_transformer_config",
    "family_for",
    "load_hf_config",
    "method_of",
    "parallel_problems",
    "teacher_topk",
    "unknown_fields",
    "with_method",
]
