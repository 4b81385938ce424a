"""GLM-4.5 and GLM-4.5-Air (Glm4Moe) with zero-output experts for Hugging Face transformers 5, written by megatron-zeda.

This file travels with an exported checkpoint, together with modeling_zeda_base.py, which says what zero experts are and
what the routers return. Load the checkpoint with
``AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)``. Without remote code the same folder fails
loudly: its router weight has N + Z rows, the stock model wants N.

The dial ``config.zeda_zero_logit_bias`` is added to the zero experts' entries of the selection bias.

Tensors of the layer behind the last (multi-token prediction) may be there. They are read for speculative decoding,
``generate(use_mtp=True)``, only.
"""

from typing import Any, ClassVar

from transformers.models.glm4_moe import modeling_glm4_moe as stock
from transformers.models.glm4_moe.modeling_glm4_moe import (
    Glm4MoeDecoderLayer,
    Glm4MoeForCausalLM,
    Glm4MoeModel,
    Glm4MoeTopkRouter,
)

from .modeling_zeda_base import (
    AnyExpertsImplementation,
    SigmoidRouter,
    SkippingExperts,
    ignored_tensors,
    register,
    replace_experts,
    zero_expert_settings,
)

# The class was renamed while transformers 5 grew.
StockExperts: Any = getattr(stock, "Glm4MoeExperts", None) or getattr(stock, "Glm4MoeNaiveMoe", None)


class ZedaTopkRouter(SigmoidRouter, Glm4MoeTopkRouter):
    """Top-K over N + Z experts; logits and scores in fp32."""


class ZedaExperts(SkippingExperts, StockExperts):
    """The N real experts."""


class Glm4MoePlusPlusDecoderLayer(Glm4MoeDecoderLayer):
    """A decoder layer. It has a class because transformers builds the drafting layer from the last one's."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        replace_experts(self.mlp, ZedaTopkRouter, ZedaExperts, config)


class Glm4MoePlusPlusModel(AnyExpertsImplementation, Glm4MoeModel):
    """The decoder without a head."""

    _no_split_modules: ClassVar[list[str]] = ["Glm4MoePlusPlusDecoderLayer"]

    def __init__(self, config: Any) -> None:
        zero_expert_settings(config, config.n_routed_experts)
        super().__init__(config)
        self._keys_to_ignore_on_load_unexpected = ignored_tensors(config)
        for index in range(config.num_hidden_layers):
            self.layers[index] = Glm4MoePlusPlusDecoderLayer(config, index)
        self.post_init()


class Glm4MoePlusPlusForCausalLM(AnyExpertsImplementation, Glm4MoeForCausalLM):
    """The decoder with its language-model head."""

    _no_split_modules: ClassVar[list[str]] = ["Glm4MoePlusPlusDecoderLayer"]

    def __init__(self, config: Any) -> None:
        zero_expert_settings(config, config.n_routed_experts)
        super().__init__(config)
        self._keys_to_ignore_on_load_unexpected = ignored_tensors(config)
        self.model = Glm4MoePlusPlusModel(config)
        self.post_init()


register("glm4_moe", Glm4MoePlusPlusModel, Glm4MoePlusPlusForCausalLM)
