"""Tiny random Qwen3-MoE folders in every form found in the wild, and the oracles they are compared with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

LAYERS, EXPERTS, TOPK, HIDDEN, FFN, VOCAB = 2, 4, 2, 32, 16, 64


def make_hf(
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    shards: bool = False,
    fused: bool = False,
    seed: int = 0,
    **overrides: Any,
) -> Path:
    """Write a static checkpoint with stock transformers; every weight is random, norms included."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    settings: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "moe_intermediate_size": FFN,
        "num_experts": EXPERTS,
        "num_experts_per_tok": TOPK,
        "norm_topk_prob": True,
        "max_position_embeddings": 64,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        "tie_word_embeddings": False,
    }
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**settings | overrides))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = 0.3 * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise + 1 if parameter.dim() == 1 else noise)
    model.to(dtype)
    model.save_pretrained(folder, max_shard_size="20KB" if shards else "1GB")
    if fused:
        tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
        if model.config.tie_word_embeddings:
            del tensors["lm_head.weight"]
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def make_dense_zeros(dynamic: Path, folder: Path) -> Path:
    """The oracle of a dynamic checkpoint: a stock model whose Z extra experts are all-zero matrices."""
    folder.mkdir()
    config = json.loads((dynamic / "config.json").read_text())
    zero = config.pop("zce_nums")[0]
    for key in ("zce_types", "use_zce_mask", "zeda_zero_logit_bias", "auto_map"):
        del config[key]
    real, config["num_experts"] = config["num_experts"], config["num_experts"] + zero
    config["architectures"] = ["Qwen3MoeForCausalLM"]
    (folder / "config.json").write_text(json.dumps(config))
    tensors = read_tensors(dynamic)
    for name, tensor in list(tensors.items()):
        if ".experts.0." in name:
            for expert in range(real, real + zero):
                tensors[name.replace(".experts.0.", f".experts.{expert}.")] = torch.zeros_like(tensor)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder, read with the safetensors library."""
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def assert_same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    """Names, types, shapes and bits."""
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert a[name].shape == b[name].shape, name
        assert a[name].view(torch.uint8).equal(b[name].view(torch.uint8)), name


def edit_config(source: Path, target: Path, **changes: Any) -> Path:
    """A copy of a checkpoint with other configuration values; ``...`` removes a key."""
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text())
    config.update(changes)
    config = {key: value for key, value in config.items() if value is not ...}
    (target / "config.json").write_text(json.dumps(config))
    return target


def load_hf_model(folder: Path, **options: Any) -> Any:
    """A model in eval mode, remote code allowed."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options).eval()


def megatron_model(hf_config: Any, **overrides: Any) -> Any:
    """A ``GPTModel`` in eval mode at the current layout (one stage of it)."""
    from megatron.core import parallel_state

    from megatron_zeda.models import build_gpt_model, build_transformer_config

    config = build_transformer_config(hf_config, **overrides)
    return build_gpt_model(
        hf_config,
        config,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
    ).eval()


def load_megatron(model: Any, iteration_folder: Path) -> None:
    """Megatron-Core's own loader; every weight must come from the checkpoint."""
    from megatron.core import dist_checkpointing

    from megatron_zeda.conversion.megatron_io import drop_extra_state

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    state = dist_checkpointing.load(drop_extra_state(model.sharded_state_dict()), str(iteration_folder))
    model.load_state_dict(state, strict=False)
    assert not any(parameter.isnan().any() for parameter in model.parameters())


def megatron_logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """``[B, S, V]`` of ``ids [B, S]``."""
    positions = torch.arange(ids.shape[1])[None].expand_as(ids)
    with torch.no_grad():
        return model(ids, positions, None).float()


def nothing_beside(folder: Path) -> bool:
    """Whether a failed conversion left no output and no partial folder."""
    return not folder.exists() and not any(".partial" in path.name for path in folder.parent.iterdir())
