"""What ``config.json`` and the engine's arguments say about zero experts, and what is refused before a weight is read.

Names: N real experts, Z zero experts.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from megatron_zeda.serving.modeling_zeda_base import zero_expert_settings

DYNAMIC_KEYS = ("zce_nums", "zce_types", "use_zce_mask", "zeda_expert_type", "zeda_dynamic_skipping_beta")
"""A configuration with any of them is that of a dynamic model, whatever its architecture is called."""
NEVER_CHOSEN = -1e4
"""A dial of this or less masks the zero experts. No logit or score makes up for it, and kernels want finite numbers."""


@dataclass(frozen=True)
class ZeroExperts:
    """What a dynamic model adds to a static one.

    Attributes:
        num_real: N.
        num_zero: Z.
        dial: added to the zero experts' logits (softmax routers) or selection bias (sigmoid routers).
        renormalizes: the zero experts' share of the weights goes to the real ones (AdaMoE).
        latent_norm_eps: epsilon of the norms of the latents in GLM's attention, ``None`` for vLLM's own.
    """

    num_real: int
    num_zero: int
    dial: float
    renormalizes: bool
    latent_norm_eps: float | None


def read_zero_experts(vllm_config: Any) -> ZeroExperts | None:
    """Return the settings of the model that vLLM is about to build, or ``None`` for a static one.

    Raises:
        ValueError: a key is missing or wrong, the model is of a method that this plugin does not run, or the engine was
            asked for something that cannot be combined with zero experts.
    """
    config = vllm_config.model_config.hf_text_config
    named = any("PlusPlus" in name for name in config.architectures or [])
    if not named and all(getattr(config, key, None) is None for key in DYNAMIC_KEYS):
        return None
    _refuse_methods(config)
    num_real = getattr(config, "num_experts", None) or config.n_routed_experts
    num_zero, dial = zero_expert_settings(config, num_real)
    _refuse_engine(vllm_config, num_real, num_zero)
    return ZeroExperts(
        num_real=num_real,
        num_zero=num_zero,
        dial=max(dial, NEVER_CHOSEN),
        renormalizes=getattr(config, "zeda_renormalize", False),
        latent_norm_eps=getattr(config, "zeda_latent_norm_eps", None),
    )


def refusal(what: str, *, rule: str, fix: str) -> ValueError:
    """An error of one line for somebody who reads the engine's log."""
    return ValueError(f"megatron-zeda: {what}; {rule}; {fix}")


def _refuse_methods(config: Any) -> None:
    """These methods change what a layer computes, not only which experts it runs."""
    for key, value, method in (
        ("zeda_expert_type", "copy", "copy"),
        ("zeda_dynamic_skipping_beta", None, "dynamic_skipping"),
    ):
        found = getattr(config, key, None)
        if found is not None and value in (None, found):
            raise refusal(
                f"config.json: `{key}` (got {found!r})",
                rule=f"the plugin does not run method `{method}`",
                fix="serve it with transformers (trust_remote_code=True)",
            )
    if getattr(config, "approximate_experts", None) is not None:
        raise refusal(
            "config.json: `approximate_experts` beside zero experts",
            rule="zero experts are either skipped by this plugin or substituted by vLLM, not both",
            fix='remove the zce_* keys, or pass --hf-overrides "$(cat zeda_hf_overrides.json)"',
        )
    if (getattr(config, "n_group", None) or 1) != 1:
        raise refusal(
            f"config.json: `n_group` (got {config.n_group!r})",
            rule="zero experts are in no group of experts",
            fix="only models with one group can be dynamic",
        )


def _refuse_engine(vllm_config: Any, num_real: int, num_zero: int) -> None:
    parallel = vllm_config.parallel_config
    if parallel.enable_eplb or getattr(parallel, "enable_elastic_ep", False):
        raise refusal(
            "expert-parallel load balancing is on",
            rule="it moves and copies experts by their numbers, and zero experts have no weights to move",
            fix="start without --enable-eplb and --enable-elastic-ep",
        )
    if vllm_config.lora_config is not None:
        raise refusal(
            "LoRA is on",
            rule="adapters for experts are stored by expert number, without zero experts",
            fix="merge the adapter into the weights and start without --enable-lora",
        )
    if os.environ.get("VLLM_MOE_ROUTING_SIMULATION_STRATEGY"):
        raise refusal(
            "VLLM_MOE_ROUTING_SIMULATION_STRATEGY is set",
            rule="simulated routing never chooses a zero expert",
            fix="unset it",
        )
    if vllm_config.aux_output_config.enable_return_routed_experts and num_real <= 256 < num_real + num_zero:
        raise refusal(
            f"--enable-return-routed-experts with {num_real} + {num_zero} experts",
            rule=f"vLLM stores ids of a model of {num_real} experts in one byte",
            fix="start without it",
        )
