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


VERSIONS = ("0.32.", "0.33.")
"""Releases of vLLM whose model classes this plugin was written for."""


def register() -> None:
    """Tell vLLM which classes run dynamic models. May be called any number of times.

    In another release vLLM's own architectures are left alone, so that its static models do not depend on this plugin.
    """
    import vllm
    from vllm.logger import init_logger

    known = vllm.__version__.startswith(VERSIONS)
    if not known:
        init_logger("vllm.megatron_zeda").warning_once(
            "megatron-zeda: written for vLLM %s, this is %s: dynamic models are tried under their own names only.",
            " and ".join(version + "x" for version in VERSIONS),
            vllm.__version__,
        )
    for architecture, name in MODELS.items():
        if known or "PlusPlus" in architecture:
            vllm.ModelRegistry.register_model(architecture, f"megatron_zeda.serving.vllm.models:{name}")
