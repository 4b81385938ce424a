"""vLLM's model classes with zero experts. Without such keys in ``config.json`` they are vLLM's own in everything."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from vllm.model_executor.models.glm4_moe import Glm4MoE, Glm4MoeForCausalLM
from vllm.model_executor.models.glm4_moe_lite import Glm4MoeLiteForCausalLM
from vllm.model_executor.models.glm4_moe_lite_mtp import Glm4MoeLiteMTP
from vllm.model_executor.models.glm4_moe_mtp import Glm4MoeMTP
from vllm.model_executor.models.qwen3_moe import Qwen3MoeForCausalLM, Qwen3MoeSparseMoeBlock

from megatron_zeda.serving.vllm.layers import ZeroExpertGate, add_zero_experts
from megatron_zeda.serving.vllm.settings import read_zero_experts, refusal


class DynamicModel:
    """Mixed into a model class of vLLM, before it."""

    block_class: type

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        """Build vLLM's model of N experts, then give every block its zero experts.

        Raises:
            ValueError: see :func:`~megatron_zeda.serving.vllm.settings.read_zero_experts`.
        """
        self.zero_experts = read_zero_experts(vllm_config)  # before anything large is allocated
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        self._must_load = vllm_config.load_config.load_format != "dummy"
        if self.zero_experts is None:
            return
        for module in list(self.modules()):  # type: ignore[attr-defined]
            if isinstance(module, self.block_class):
                add_zero_experts(module, self.zero_experts)
            eps = self.zero_experts.latent_norm_eps
            for name in ("q_a_layernorm", "kv_a_layernorm"):
                if eps is not None and getattr(module, name, None) is not None:
                    getattr(module, name).variance_epsilon = eps

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load vLLM's way.

        Raises:
            ValueError: a gate is not N + Z wide, or was not there.
        """
        if self.zero_experts is None:
            return super().load_weights(weights)  # type: ignore[misc]
        # Constants that vLLM substitutes for experts in the form vllm-mone: here zero experts need no weights.
        used = ((name, tensor) for name, tensor in weights if not name.endswith(".approx_value"))
        loaded: set[str] = super().load_weights(used)  # type: ignore[misc]
        gates = [module for module in self.modules() if isinstance(module, ZeroExpertGate)]  # type: ignore[attr-defined]
        missing = [f"{gate.prefix}.{name}" for gate in gates for name in sorted(gate.missing)]
        if missing and self._must_load:
            raise refusal(
                f"{missing[0]} is missing",
                rule=f"the checkpoint must have the router of every layer ({len(missing)} tensors are missing)",
                fix="export the checkpoint again",
            )
        return loaded


class DynamicQwen3Moe(DynamicModel, Qwen3MoeForCausalLM):
    """Qwen3-MoE."""

    block_class = Qwen3MoeSparseMoeBlock


class DynamicGlm4Moe(DynamicModel, Glm4MoeForCausalLM):
    """GLM-4.5 and GLM-4.5-Air."""

    block_class = Glm4MoE


class DynamicGlm4MoeLite(DynamicModel, Glm4MoeLiteForCausalLM):
    """GLM-4.7-Flash."""

    block_class = Glm4MoE


class DynamicGlm4MoeMTP(DynamicModel, Glm4MoeMTP):
    """The layer of GLM-4.5 that drafts tokens: its router has N + Z rows and never chooses a zero expert."""

    block_class = Glm4MoE


class DynamicGlm4MoeLiteMTP(DynamicModel, Glm4MoeLiteMTP):
    """The layer of GLM-4.7-Flash that drafts tokens: its router has N + Z rows and never chooses a zero expert."""

    block_class = Glm4MoE
