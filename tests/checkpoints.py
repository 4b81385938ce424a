"""Tiny random checkpoint folders of every family, in every form found in the wild, and their oracles."""

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
    family: str = "qwen3_moe",
    dtype: torch.dtype = torch.float32,
    shards: bool = False,
    fused: bool = False,
    mtp: bool = False,
    seed: int = 0,
    **overrides: Any,
) -> Path:
    """Write a static checkpoint with stock transformers; every weight is random, norms and selection biases included.

    Args:
        folder: to create.
        family: name in ``megatron_zeda.models.FAMILIES``.
        dtype: of all weights but selection biases, which stay in float32.
        shards: many small files.
        fused: transformers 5's stacked experts instead of one tensor per expert.
        mtp: with the layer that drafts tokens, which transformers does not know (only families that have one).
        seed: of the weights.
        overrides: configuration values.
    """
    config_class, model_class, settings = _family(family)
    model = model_class(config_class(**settings | overrides))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            tensor.copy_(_random(name, tensor.shape, generator))
    model.to(dtype)
    for name, buffer in model.named_buffers():
        if name.endswith(BIAS):
            buffer.data = buffer.data.float()
    model.save_pretrained(folder, max_shard_size="20KB" if shards else "1GB")
    if fused:
        tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
        if model.config.tie_word_embeddings:
            del tensors["lm_head.weight"]
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    if mtp:
        add_mtp(folder, dtype=dtype, generator=generator)
    return folder


BIAS = "e_score_correction_bias"


def _family(name: str) -> tuple[Any, Any, dict[str, Any]]:
    """Stock configuration class, stock model class and a tiny shape."""
    import transformers

    shared = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_experts_per_tok": TOPK,
        "moe_intermediate_size": FFN,
        "norm_topk_prob": True,
        "max_position_embeddings": 64,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        "tie_word_embeddings": False,
    }
    if name == "qwen3_moe":
        own = {"num_key_value_heads": 2, "head_dim": 8, "num_experts": EXPERTS}
        return transformers.Qwen3MoeConfig, transformers.Qwen3MoeForCausalLM, shared | own
    if name == "glm4_moe_lite":
        own = {
            "num_key_value_heads": 4,
            "n_routed_experts": EXPERTS,
            "n_shared_experts": 1,
            "routed_scaling_factor": 1.8,
            "q_lora_rank": 24,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 12,
            "qk_rope_head_dim": 8,
            "v_head_dim": 16,
            "rms_norm_eps": 1e-5,
            "first_k_dense_replace": 1,
            "zeda_latent_norm_eps": 1e-6,  # what stock transformers has, so that it is an oracle
            "bos_token_id": None,
            "eos_token_id": None,
        }
        return transformers.Glm4MoeLiteConfig, transformers.Glm4MoeLiteForCausalLM, shared | own
    if name == "glm4_moe":
        own = {
            "num_key_value_heads": 2,
            "head_dim": 16,
            "n_routed_experts": EXPERTS,
            "n_shared_experts": 1,
            "routed_scaling_factor": 2.5,
            "rms_norm_eps": 1e-5,
            "first_k_dense_replace": 1,
            "attention_bias": True,
            "use_qk_norm": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.5},
            "num_nextn_predict_layers": 1,
            "bos_token_id": None,
            "eos_token_id": None,
        }
        return transformers.Glm4MoeConfig, transformers.Glm4MoeForCausalLM, shared | own
    raise ValueError(f"no maker for family {name!r}")


def _random(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    noise = 0.3 * torch.randn(shape, generator=generator)
    return noise + 1 if len(shape) == 1 and not name.endswith(BIAS) else noise


def add_mtp(folder: Path, *, dtype: torch.dtype = torch.float32, generator: torch.Generator | None = None) -> None:
    """Add the layer that drafts tokens to a folder, in the file that the other weights are in or one of its own."""
    from megatron_zeda.models import family_for, load_hf_config

    config = load_hf_config(folder)
    generator = generator or torch.Generator().manual_seed(1)
    rows = family_for(config).carried_rows(config)
    tensors = {row.key: _random(row.key, row.shape, generator).to(dtype) for row in rows}
    tensors = {name: tensor.float() if name.endswith(BIAS) else tensor for name, tensor in tensors.items()}
    index_path = folder / "model.safetensors.index.json"
    if not index_path.exists():
        tensors |= load_file(folder / "model.safetensors")
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    save_file(tensors, folder / "model-mtp.safetensors", metadata={"format": "pt"})
    index = json.loads(index_path.read_text())
    index["weight_map"] |= dict.fromkeys(tensors, "model-mtp.safetensors")
    index["metadata"]["total_size"] += sum(tensor.nbytes for tensor in tensors.values())
    index_path.write_text(json.dumps(index))


def make_dense_zeros(dynamic: Path, folder: Path) -> Path:
    """The oracle of a dynamic checkpoint: a stock model whose Z extra experts are all-zero matrices.

    The layer that drafts tokens, which a stock model does not have, is left out.
    """
    from megatron_zeda.models import family_for, load_hf_config

    folder.mkdir()
    config = json.loads((dynamic / "config.json").read_text())
    family = family_for(load_hf_config(dynamic))
    zero = config.pop("zce_nums")[0]
    for key in ("zce_types", "use_zce_mask", "zeda_zero_logit_bias", "auto_map"):
        del config[key]
    key = family.num_experts_keys[0]
    real, config[key] = config[key], config[key] + zero
    config["architectures"] = [family.static_architecture]
    (folder / "config.json").write_text(json.dumps(config))
    drafting = f"model.layers.{config['num_hidden_layers']}."
    tensors = {name: tensor for name, tensor in read_tensors(dynamic).items() if not name.startswith(drafting)}
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


def newest_iteration(folder: Path) -> Path:
    """The newest iteration of a Megatron checkpoint folder, by its tracker file alone."""
    name = (folder / "latest_checkpointed_iteration.txt").read_text().strip()
    return folder / (f"iter_{int(name):07d}" if name.isdigit() else name)


def megatron_logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """``[B, S, V]`` of ``ids [B, S]``."""
    positions = torch.arange(ids.shape[1])[None].expand_as(ids)
    with torch.no_grad():
        return model(ids, positions, None).float()


def nothing_beside(folder: Path) -> bool:
    """Whether a failed conversion left no output and no partial folder."""
    return not folder.exists() and not any(".partial" in path.name for path in folder.parent.iterdir())
