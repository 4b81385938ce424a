"""vLLM plugin: serves the exported form ``zeda`` natively, without remote code. Nothing in it needs to be imported.

vLLM calls :func:`register` through the entry point group ``vllm.general_plugins`` in each of its processes.
"""

from __future__ import annotations

MODELS = {
    "Qwen3MoePlusPlusForCausalLM": "DynamicQwen3Moe",
    "Qwen3MoeForCausalLM": "DynamicQwen3Moe",
    "Glm4MoeLitePlusPlusForCausalLM": "DynamicGlm4MoeLite",
    "Glm4MoeLiteForCausalLM": "DynamicGlm4MoeLite",
    "Glm4MoeLiteMTPModel": "DynamicGlm4MoeLiteMTP",
    "Glm4MoePlusPlusForCausalLM": "DynamicGlm4Moe",
    "Glm4MoeForCausalLM": "DynamicGlm4Moe",
    "Glm4MoeMTPModel": "DynamicGlm4MoeMTP",
}
"""Architecture in ``config.json`` -> class in :mod:`megatron_zeda.serving.vllm.models`.

A class under vLLM's own name is vLLM's own class in everything until ``config.json`` has a key of a dynamic model.
"""


def register() -> None:
    """Tell vLLM which classes run dynamic models. May be called any number of times."""
    from vllm import ModelRegistry

    for architecture, name in MODELS.items():
        ModelRegistry.register_model(architecture, f"megatron_zeda.serving.vllm.models:{name}")
