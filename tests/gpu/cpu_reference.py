"""What a CPU computes, for comparison with the GPU: ``python cpu_reference.py WHAT FOLDER``, see ``WRITERS``.

A process of its own, because the CPU adapter refuses to run where a GPU is visible. Compiled packages whose kernels
need one are hidden too: Megatron-Core takes apex's Adam and its norms of gradients wherever it can import them.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent.parent

# Head and hidden sizes that fused attention and blocks of 128 values accept.
MODEL: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 128,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "kv_channels": 32,
    "ffn_hidden_size": 128,
    "moe_ffn_hidden_size": 128,
    "init_method_std": 0.05,
}
# GLM-4.7-Flash in small: a dense layer, a shared expert, a selection bias, latent norms with an epsilon of their own.
GLM: dict[str, Any] = {
    "architectures": ["Glm4MoeLitePlusPlusForCausalLM"],
    "model_type": "glm4_moe_lite",
    "vocab_size": 64,
    "hidden_size": 128,
    "intermediate_size": 256,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 96,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 48,
    "qk_rope_head_dim": 16,
    "v_head_dim": 64,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.8,
    "rms_norm_eps": 1e-5,
    "zeda_latent_norm_eps": 0.3,  # large enough that no other value gives the same numbers
    "rope_theta": 1e6,
    "max_position_embeddings": 128,
    "zce_nums": [4],
    "zce_types": ["zero"],
    "use_zce_mask": False,
}
HIDDEN_PACKAGES = ("transformer_engine", "apex", "amp_C", "fused_weight_gradient_mlp_cuda")
RUNS: dict[str, dict[str, Any]] = {
    "cpu": {},
    # Fused attention takes packs in 16 bits only.
    "cpu-packs": {"dataset.packing": True, "model.bf16": True},
}
# By method: what it changes in a run; K is 4.
METHODS: dict[str, dict[str, Any]] = {
    "net": {"zero_experts.method": "net"},
    "adamoe": {"zero_experts.method": "adamoe"},
    "copy": {"zero_experts.method": "copy"},
    "dynamic_skipping": {"zero_experts.method": "dynamic_skipping", "zero_experts.target_skip_rate": 0.4},
    "router": {
        "train.trainable": "router",
        "model.recompute_granularity": "full",
        "model.recompute_method": "uniform",
        "model.recompute_num_layers": 1,
    },
    "controller": {"zero_experts.balance_tokens": "response", "zero_experts.skip_rate_gain": 2.0},
}
# Sizes of linear layers that are multiples of the 128 values which share a scale.
WIDE_SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "head_dim": 32,
    "intermediate_size": 128,
    "moe_intermediate_size": 128,
    "initializer_range": 0.1,
}
LENGTHS = (40, 64, 24)  # sequences of a pack, 128 tokens in all


def call(what: str, folder: Path) -> None:
    """Run this file in a process that sees neither GPU nor Transformer Engine nor apex."""
    path = os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, __file__, what, str(folder)], env=environment, check=True)


def tokens() -> Any:
    """``[1, 128]`` token numbers below 64."""
    import torch

    return torch.randint(0, 64, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(0))


def losses_and_gradients(model: Any, packed: bool = False) -> tuple[Any, dict[str, Any]]:
    """Per-token losses ``[1, 128]`` and the gradients of their mean, by Transformer Engine's names, in fp32 on the CPU.

    One sequence of 128 tokens, or a pack of three.
    """
    import torch
    from attention_models import pack

    from megatron_zeda import platform

    ids = tokens().to(platform.device())
    positions = torch.cat([torch.arange(n) for n in LENGTHS]) if packed else torch.arange(ids.shape[1])
    parameters = {}
    if packed:
        parameters["packed_seq_params"] = pack(*LENGTHS)
        for name in ("cu_seqlens_q", "cu_seqlens_kv"):
            boundaries = getattr(parameters["packed_seq_params"], name).to(ids.device)
            setattr(parameters["packed_seq_params"], name, boundaries)
            setattr(parameters["packed_seq_params"], f"{name}_padded", boundaries)
    losses = model(ids, positions.to(ids.device)[None], None, labels=ids.roll(-1, 1), **parameters)
    losses.float().mean().backward()
    gradients = {
        te_name(name, model.config): p.grad.float().cpu() for name, p in model.named_parameters() if p.grad is not None
    }
    return losses.detach().float().cpu(), gradients


def te_name(name: str, config: Any) -> str:
    """What Transformer Engine's fused modules call a parameter of the local layers."""
    if config.multi_latent_attention:
        for latent in ("q", "kv"):
            name = name.replace(f".{latent}_layernorm.weight", f".linear_{latent}_up_proj.layer_norm_weight")
    else:
        name = name.replace("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight")
    if isinstance(config.moe_layer_freq, list):
        for layer, kind in enumerate(config.moe_layer_freq):
            if not kind:
                norm = f"layers.{layer}.pre_mlp_layernorm.weight"
                name = name.replace(norm, f"layers.{layer}.mlp.linear_fc1.layer_norm_weight")
    if "local_experts." not in name:
        return name
    before, after = name.split("local_experts.")
    number, _, rest = after.partition(".")
    return f"{before}{rest}{number}"


def build_glm(**overrides: Any) -> Any:
    """A GLM model whose parameters nobody has set."""
    from megatron_zeda.models import build_gpt_model, build_transformer_config

    return build_gpt_model(GLM, build_transformer_config(GLM, **overrides))


def write_model(folder: Path, what: str = "model") -> None:
    """A model of the local layers: its checkpoint, its losses and gradients."""
    import torch
    from attention_models import build_model, fill
    from layers import layer_config
    from megatron.core import dist_checkpointing
    from spawn import initialize_megatron

    from megatron_zeda import platform
    from megatron_zeda.conversion import megatron_io

    platform.install()
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
    initialize_megatron()
    if what == "model":
        model = build_model(layer_config(**MODEL))
    else:
        model = fill(build_glm())
        for name, buffer in model.named_buffers():
            if name.endswith("expert_bias"):
                buffer.normal_(0.0, 0.05, generator=torch.Generator().manual_seed(len(name)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name and "router" not in name:
                parameter *= 0.25  # tests/attention_models.py draws them with 0.2, for a narrower model
    target = megatron_io.iteration_dir(folder, 0)
    target.mkdir(parents=True)
    state = {"model": megatron_io.drop_extra_state(model.sharded_state_dict())}
    dist_checkpointing.save(state, str(target))
    megatron_io.write_latest_iteration(folder, 0)
    torch.save(losses_and_gradients(model), folder / "reference.pt")


def write_glm(folder: Path) -> None:
    """The same for GLM-4.7-Flash in small."""
    write_model(folder, "glm")


def run_config(folder: Path, name: str, settings: dict[str, Any]) -> Any:
    """Six steps in ``folder/name`` that stay apart by no more than rounding where their gradients do.

    Adam divides by the size of a gradient, which turns the rounding error of a very small one into a full step unless
    ``adam_eps`` is well above it.
    """
    from training_runs import make_config

    config = make_config(folder, name)
    config.optimizer.lr = 1e-3
    config.optimizer.adam_eps = 1e-5
    for key, value in settings.items():
        section, field = key.split(".")
        target = getattr(config, section)
        setattr(target, field, {**getattr(target, field), **value} if isinstance(value, dict) else value)
    return config


def write_runs(folder: Path) -> None:
    """Teacher, student, data, and the runs of ``RUNS``."""
    from training_runs import make_run

    from megatron_zeda.training import train

    make_run(folder)
    for name, settings in RUNS.items():
        assert train(run_config(folder, name, settings)) == 0


def write_glm_runs(folder: Path) -> None:
    """The same for GLM-4.7-Flash, in sizes that fused attention takes."""
    from training_runs import make_glm_run

    from megatron_zeda.training import train

    names = ("hidden_size", "intermediate_size", "moe_intermediate_size", "q_lora_rank", "kv_lora_rank")
    names += ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    make_glm_run(folder, scale=0.25, **{name: GLM[name] for name in names})
    for name, settings in RUNS.items():
        assert train(run_config(folder, name, settings)) == 0


def write_wide(folder: Path) -> None:
    """Teacher, student and data in sizes that FP8 takes."""
    from training_runs import make_run

    make_run(folder, **WIDE_SIZES)


def write_on_policy(folder: Path) -> None:
    """The same with prompts and a tokenizer, for stage 2."""
    from on_policy_runs import add_prompts

    write_wide(folder)
    add_prompts(folder)


def method_config(folder: Path, name: str, kind: str) -> Any:
    """Three steps of one of ``METHODS`` in ``folder/name``."""
    config = run_config(folder, name, {"train.train_iters": 3, **METHODS[kind]})
    if kind in ("net", "dynamic_skipping"):
        config.model.checkpoint = str(folder / "teacher")
    return config


def write_methods(folder: Path) -> None:
    """Teacher, student, data, and the runs of ``METHODS``."""
    from training_runs import make_run

    from megatron_zeda.training import train

    make_run(folder, num_experts_per_tok=4)
    for name in METHODS:
        assert train(method_config(folder, name, name)) == 0


WRITERS = {
    "model": write_model,
    "glm": write_glm,
    "runs": write_runs,
    "glm-runs": write_glm_runs,
    "wide": write_wide,
    "on-policy": write_on_policy,
    "methods": write_methods,
}

if __name__ == "__main__":
    for package in HIDDEN_PACKAGES:
        sys.modules[package] = None  # type: ignore[assignment]  # importing it fails from here on
    WRITERS[sys.argv[1]](Path(sys.argv[2]))
