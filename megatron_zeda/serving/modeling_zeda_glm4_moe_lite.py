"""GLM-4.7-Flash (Glm4MoeLite) with zero-output experts for Hugging Face transformers 5, written by megatron-zeda.

This file travels with an exported checkpoint, together with modeling_zeda_base.py, which says what zero experts are and
what the routers return. Load the checkpoint with
``AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)``. Without remote code the same folder fails
loudly: its router weight has N + Z rows, the stock model wants N.

The dial ``config.zeda_zero_logit_bias`` is added to the zero experts' entries of the selection bias.

``config.zeda_latent_norm_eps`` is the epsilon of the two norms of the attention's latents. Where it is missing, it is
1e-6 as in the stock model, whatever ``rms_norm_eps`` says (vLLM and SGLang use ``rms_norm_eps`` there).

Tensors of the layers behind the last (multi-token prediction) may be there and are not used.
"""

from typing import Any

from transformers.models.glm4_moe_lite import modeling_glm4_moe_lite as stock
from transformers.models.glm4_moe_lite.modeling_glm4_moe_lite import (
    Glm4MoeLiteForCausalLM,
    Glm4MoeLiteModel,
    Glm4MoeLiteTopkRouter,
)

from .modeling_zeda_base import (
    AnyExpertsImplementation,
    SigmoidRouter,
    SkippingExperts,
    ignored_tensors,
    is_number,
    register,
    replace_experts,
    zero_expert_settings,
)

# The class was renamed while transformers 5 grew.
StockExperts: Any = getattr(stock, "Glm4MoeLiteExperts", None) or getattr(stock, "Glm4MoeLiteNaiveMoe", None)


class ZedaTopkRouter(SigmoidRouter, Glm4MoeLiteTopkRouter):
    """Top-K over N + Z experts; logits and scores in fp32."""


class ZedaExperts(SkippingExperts, StockExperts):
    """The N real experts."""


class Glm4MoeLitePlusPlusModel(AnyExpertsImplementation, Glm4MoeLiteModel):
    """The decoder without a head."""

    def __init__(self, config: Any) -> None:
        zero_expert_settings(config, config.n_routed_experts)
        eps = getattr(config, "zeda_latent_norm_eps", None)
        if eps is not None and (not is_number(eps) or not 0 < eps < 1):
            raise ValueError(f"config.json: `zeda_latent_norm_eps` must be a number between 0 and 1, got {eps!r}")
        super().__init__(config)
        self._keys_to_ignore_on_load_unexpected = ignored_tensors(config)
        for layer in self.layers:
            replace_experts(layer.mlp, ZedaTopkRouter, ZedaExperts, config)
            for norm in ("q_a_layernorm", "kv_a_layernorm"):
                if eps is not None and getattr(layer.self_attn, norm, None) is not None:
                    getattr(layer.self_attn, norm).variance_epsilon = float(eps)
        self.post_init()


class Glm4MoeLitePlusPlusForCausalLM(AnyExpertsImplementation, Glm4MoeLiteForCausalLM):
    """The decoder with its language-model head."""

    def __init__(self, config: Any) -> None:
        zero_expert_settings(config, config.n_routed_experts)
        super().__init__(config)
        self._keys_to_ignore_on_load_unexpected = ignored_tensors(config)
        self.model = Glm4MoeLitePlusPlusModel(config)
        self.post_init()


register("glm4_moe_lite", Glm4MoeLitePlusPlusModel, Glm4MoeLitePlusPlusForCausalLM)
