"""What the serving benchmarks compare: transformers models and MoE blocks of real width with random weights.

    static        the stock model, N experts
    ours          the modelling file that travels with exports: N experts, a router of N + Z rows, skipped slots dropped
    dense zeros   the stock block with Z more experts that are all-zero, and computed
    expert 0      our router before the stock block's N experts: a skipped slot becomes (expert 0, weight 0), which is
                  what engines make of identity experts

All but *dense zeros* share their weights; its experts are copies.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))

from side_by_side import prepare

QWEN3: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    "max_position_embeddings": 40960,
    "tie_word_embeddings": False,
}
GLM47_FLASH: dict[str, Any] = {
    "model_type": "glm4_moe_lite",
    "vocab_size": 154880,
    "hidden_size": 2048,
    "intermediate_size": 10240,
    "num_hidden_layers": 47,
    "num_attention_heads": 20,
    "num_key_value_heads": 20,
    "q_lora_rank": 768,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 192,
    "qk_rope_head_dim": 64,
    "v_head_dim": 256,
    "moe_intermediate_size": 1536,
    "n_routed_experts": 64,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "routed_scaling_factor": 1.8,
    "norm_topk_prob": True,
    "first_k_dense_replace": 1,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    "max_position_embeddings": 202752,
    "tie_word_embeddings": False,
}
SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 16,
}
TINY_LATENTS = {"q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 16}
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-30b-a3b": QWEN3,
    "glm-4.7-flash": GLM47_FLASH,
    "tiny-qwen3": QWEN3 | SMALL | {"num_key_value_heads": 2, "head_dim": 8, "num_experts": 16},
    "tiny-glm": GLM47_FLASH
    | SMALL
    | TINY_LATENTS
    | {"num_key_value_heads": 4, "intermediate_size": 48, "n_routed_experts": 16},
}
ZERO_EXPERT_KEYS = {"zce_types": ["zero"], "use_zce_mask": False, "zeda_zero_logit_bias": 0.0}


def start(threads: int | None) -> torch.device:
    """Prepare this process for inference and return its device."""
    device = prepare(torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu"), threads)
    torch.set_grad_enabled(False)
    torch.manual_seed(1)
    return device


def num_experts(shape: str) -> int:
    """N of a shape."""
    values = SHAPES[shape]
    return int(values.get("num_experts") or values["n_routed_experts"])


def hf_values(shape: str, *, num_zero: int = 0, **changes: Any) -> dict[str, Any]:
    """``config.json`` of a shape, with ``num_zero`` zero experts."""
    zero = {"zce_nums": [num_zero], **ZERO_EXPERT_KEYS} if num_zero else {}
    return SHAPES[shape] | zero | changes


def hf_config(shape: str, implementation: str, **changes: Any) -> Any:
    """The stock configuration object of a shape; see :func:`hf_values`."""
    from transformers import AutoConfig

    values = hf_values(shape, **changes)
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    config._experts_implementation, config._attn_implementation = implementation, "sdpa"
    return config


def classes(shape: str) -> tuple[Any, Any, Any, Any, Any]:
    """Of a family: stock block, stock model, and our router, experts and model."""
    if SHAPES[shape]["model_type"] == "qwen3_moe":
        from transformers.models.qwen3_moe import modeling_qwen3_moe as qwen

        from megatron_zeda.serving import modeling_zeda_qwen3_moe as ours

        return (
            qwen.Qwen3MoeSparseMoeBlock,
            qwen.Qwen3MoeForCausalLM,
            ours.ZedaTopKRouter,
            ours.ZedaExperts,
            ours.Qwen3MoePlusPlusForCausalLM,
        )
    from transformers.models.glm4_moe_lite import modeling_glm4_moe_lite as glm

    from megatron_zeda.serving import modeling_zeda_glm4_moe_lite as glm_ours

    return (
        glm.Glm4MoeLiteMoE,
        glm.Glm4MoeLiteForCausalLM,
        glm_ours.ZedaTopkRouter,
        glm_ours.ZedaExperts,
        glm_ours.Glm4MoeLitePlusPlusForCausalLM,
    )


def draw(module: torch.nn.Module) -> None:
    """Random matrices of a usual size; norms stay at 1."""
    for parameter in module.parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=0.02)


def blocks(shape: str, num_zero: int, implementation: str, device: torch.device) -> dict[str, Any]:
    """The four blocks of one layer, in bf16, by the names at the top of this file."""
    block_class, _, router, experts, _ = classes(shape)
    static_config = hf_config(shape, implementation)
    config = hf_config(shape, implementation, num_zero=num_zero)
    real = num_experts(shape)
    key = "num_experts" if "num_experts" in SHAPES[shape] else "n_routed_experts"
    with torch.device(device):
        static = block_class(static_config).to(torch.bfloat16)
        draw(static)
        dense = block_class(hf_config(shape, implementation, **{key: real + num_zero})).to(torch.bfloat16)
        ours, rewritten = block_class(static_config).to("meta"), block_class(static_config).to("meta")
        ours.gate, ours.experts = router(config).to(torch.bfloat16), experts(config).to("meta")
    for name in ("gate_up_proj", "down_proj"):
        weight = getattr(static.experts, name)
        for block in (ours, rewritten):
            setattr(block.experts, name, weight)
        getattr(dense.experts, name).zero_()[:real] = weight
    rewritten.gate = ToExpertZero(ours.gate)
    for block in (ours, rewritten, dense):
        if hasattr(static, "shared_experts"):
            block.shared_experts = static.shared_experts
    gate = ours.gate
    gate.weight.normal_(std=0.02)
    gate.weight[:real] = static.gate.weight
    return {"static": static, "ours": ours, "dense zeros": dense, "expert 0": rewritten}


class ToExpertZero(torch.nn.Module):
    """Our router, whose skipped slots become (expert 0, weight 0)."""

    def __init__(self, gate: torch.nn.Module) -> None:
        super().__init__()
        self.gate = gate

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits, scores, indices = self.gate(hidden_states)
        return logits, scores, indices.masked_fill(scores == 0, 0)


def set_rate(gate: Any, hidden: torch.Tensor, skip_rate: float) -> float:
    """Change the zero experts' part of a router so that it skips ``skip_rate`` of its slots for ``hidden [T, D]``.

    With a selection bias its entries are moved, otherwise the zero rows are scaled: the larger they are, the more often
    one of them is among the largest. The dial stays at 0, as in an export. Returns the rate that was reached.
    """
    zero = slice(gate.num_real, None)
    bias = getattr(gate, "e_score_correction_bias", None)
    if not hasattr(gate, "drawn"):
        gate.drawn = gate.weight[zero].clone()

    def rate(value: float) -> float:
        if bias is not None:
            bias[zero] = value
        else:
            gate.weight[zero] = gate.drawn * value
        scores = gate.forward(hidden)[1]  # not a call: this may run inside one of its hooks
        return float((scores == 0).double().mean())

    low, high = (-2.0, 2.0) if bias is not None else (0.0, 64.0)
    if skip_rate == 0.0:
        found = rate(low)
    else:
        for _ in range(30):
            middle = (low + high) / 2
            found = rate(middle)
            low, high = (middle, high) if found < skip_rate else (low, middle)
        found = rate(high)
    return found


def gates(model: torch.nn.Module) -> Iterator[Any]:
    """The routers of our model, first layer first."""
    return (module for module in model.modules() if hasattr(module, "num_real"))


def models(shape: str, num_zero: int, implementation: str, layers: int, device: torch.device) -> tuple[Any, Any]:
    """The static model and ours, in bf16, with all weights in common but the routers' zero rows."""
    _, static_class, _, _, our_class = classes(shape)
    sizes = {"num_hidden_layers": layers}
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            ours = our_class(hf_config(shape, implementation, num_zero=num_zero, **sizes))
        with torch.device(device):
            static = static_class(hf_config(shape, implementation, **sizes))
    finally:
        torch.set_default_dtype(before)
    draw(static)
    static_modules = dict(static.named_modules())
    for name, module in ours.named_modules():
        like = static_modules[name]
        if hasattr(module, "num_real"):
            move_router(module, like, device)
            continue
        for kind in ("_parameters", "_buffers"):
            for key in getattr(module, kind):
                getattr(module, kind)[key] = getattr(like, kind)[key]
    return static.eval(), ours.eval()


def move_router(gate: Any, static: Any, device: torch.device) -> None:
    """Bring one of our routers from the meta device, with the static router's rows before random zero rows."""
    gate.to_empty(device=device)
    gate.zero_expert_marker.zero_()
    gate.weight.normal_(std=0.02)
    gate.weight[: gate.num_real] = static.weight
    if hasattr(gate, "e_score_correction_bias"):
        gate.e_score_correction_bias.zero_()


def set_rates(model: Any, ids: torch.Tensor, skip_rate: float) -> float:
    """:func:`set_rate` for every layer, each with the input that the layers before it make of ``ids [B, S]``."""
    reached = []

    def adjust(gate: Any, inputs: tuple[torch.Tensor]) -> None:
        reached.append(set_rate(gate, inputs[0].reshape(-1, inputs[0].shape[-1]), skip_rate))

    hooks = [gate.register_forward_pre_hook(adjust) for gate in gates(model)]
    model(ids, logits_to_keep=1, use_cache=False)
    for hook in hooks:
        hook.remove()
    return sum(reached) / len(reached)
