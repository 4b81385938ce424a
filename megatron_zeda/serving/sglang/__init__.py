"""SGLang plugin: serves the exported form ``zeda`` natively, without remote code. Nothing in it needs to be imported.

SGLang calls :func:`register` through the entry point group ``sglang.srt.plugins`` in each of its processes.
"""

from __future__ import annotations


def register() -> None:
    """Tell SGLang which classes run dynamic models. May be called any number of times."""
    from sglang.srt.models.registry import ModelRegistry

    from megatron_zeda.serving.sglang.models import MODELS

    ModelRegistry.models.update(MODELS)
