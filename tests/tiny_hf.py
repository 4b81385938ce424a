"""Tiny folders with a tokenizer, made in a second, for tests of what reads exported models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import (
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    Glm4MoeLiteConfig,
    Glm4MoeLiteForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
SPECIAL = ["<unk>", "<eos>", "<user>", "<assistant>", "<system>"]
VOCABULARY = SPECIAL + list("abcdefghijklmnopqrstuvwxyz0123456789 .,?=+")
EOS = SPECIAL.index("<eos>")


def save_tokenizer(folder: Path) -> None:
    """One token per character, and a chat template."""
    tokenizer = Tokenizer(WordLevel({token: i for i, token in enumerate(VOCABULARY)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Split(Regex("<[a-z]+>|."), behavior="isolated")
    tokenizer.decoder = Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>", additional_special_tokens=SPECIAL[2:]
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)


def save_static(folder: Path, *, family: str = "qwen3_moe", seed: int = 0, **overrides: Any) -> Path:
    """A static model with weights large enough that its choices are clear ones."""
    torch.manual_seed(seed)
    config_class, model_class, own = _FAMILIES[family]
    settings: dict[str, Any] = {
        "vocab_size": len(VOCABULARY),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 16,
        "intermediate_size": 32,
        "norm_topk_prob": True,
        "max_position_embeddings": 96,
        "initializer_range": 0.25,
        "bos_token_id": None,
        "eos_token_id": EOS,
        "tie_word_embeddings": False,
    }
    model = model_class(config_class(**settings | own | overrides))
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_(0.0, 0.1)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


_FAMILIES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "qwen3_moe": (
        Qwen3MoeConfig,
        Qwen3MoeForCausalLM,
        {"num_key_value_heads": 2, "head_dim": 8, "num_experts": 8},
    ),
    "glm4_moe": (
        Glm4MoeConfig,
        Glm4MoeForCausalLM,
        {
            "num_hidden_layers": 3,
            "first_k_dense_replace": 1,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "n_routed_experts": 8,
            "attention_bias": True,
            "use_qk_norm": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.5},
        },
    ),
    "glm4_moe_lite": (
        Glm4MoeLiteConfig,
        Glm4MoeLiteForCausalLM,
        {
            "num_hidden_layers": 3,
            "first_k_dense_replace": 1,
            "num_key_value_heads": 4,
            "n_routed_experts": 8,
            "q_lora_rank": 24,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 12,
            "qk_rope_head_dim": 8,
            "v_head_dim": 16,
        },
    ),
}


def save_dynamic(static: Path, folder: Path, *, num_zero_experts: int = 4, dial: float = 0.0) -> Path:
    """The static folder with random router rows for zero experts, written by hand."""
    folder.mkdir()
    config = json.loads((static / "config.json").read_text())
    if config["model_type"] == "qwen3_moe":
        config["num_experts"] = config.pop("num_local_experts", config.get("num_experts"))
    prefix = {"qwen3_moe": "Qwen3Moe", "glm4_moe_lite": "Glm4MoeLite", "glm4_moe": "Glm4Moe"}[config["model_type"]]
    config |= {
        "architectures": [f"{prefix}PlusPlusForCausalLM"],
        "zce_nums": [num_zero_experts],
        "zce_types": ["zero"],
        "use_zce_mask": False,
        "zeda_zero_logit_bias": dial,
        "auto_map": {"AutoModelForCausalLM": f"modeling_that_must_not_run.{prefix}PlusPlusForCausalLM"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling_that_must_not_run.py").write_text("raise RuntimeError('code from a folder was run')\n")
    tensors = load_file(static / "model.safetensors")
    generator = torch.Generator().manual_seed(7)
    for name, tensor in tensors.items():
        if name.endswith("mlp.gate.weight"):
            rows = torch.randn(num_zero_experts, tensor.shape[1], generator=generator) * tensor.std()
            tensors[name] = torch.cat([tensor, rows])
        elif name.endswith("e_score_correction_bias"):
            tensors[name] = torch.cat([tensor, torch.zeros(num_zero_experts)])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    save_tokenizer(folder)
    return folder


def write_lines(path: Path, lines: list[Any]) -> Path:
    """A jsonl file."""
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path
