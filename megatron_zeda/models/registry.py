"""Which family a configuration belongs to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_zeda.errors import InputError
from megatron_zeda.models.base import Family
from megatron_zeda.models.glm4_moe import Glm4Moe
from megatron_zeda.models.glm4_moe_lite import Glm4MoeLite
from megatron_zeda.models.hf_config import HfConfig, where_of
from megatron_zeda.models.qwen3_moe import Qwen3Moe

FAMILIES: tuple[Family, ...] = (Qwen3Moe(), Glm4MoeLite(), Glm4Moe())


def family_for(hf_config: dict[str, Any], *, where: str | Path | None = None) -> Family:
    """The family of a configuration, after checking all of it.

    Args:
        hf_config: the content of ``config.json``.
        where: the path to name in errors; by default the one the configuration remembers.

    Raises:
        InputError: for another family, and for any key that is missing, wrong or not supported.
    """
    if where is not None:
        hf_config = HfConfig(hf_config, where=where)
    model_type, architectures = hf_config.get("model_type"), hf_config.get("architectures") or []
    for family in FAMILIES:
        if model_type in family.model_types:
            known = (family.static_architecture, family.dynamic_architecture)
            if not isinstance(architectures, list) or any(name not in known for name in architectures):
                raise InputError(
                    "`architectures` does not fit `model_type`",
                    where=where_of(hf_config),
                    value=architectures,
                    rule=f"one of {', '.join(known)}",
                )
            family.validate(hf_config)
            return family
    supported = ", ".join(family.model_types[0] for family in FAMILIES)
    raise InputError(
        "this model family is not supported",
        where=where_of(hf_config),
        value={"model_type": model_type, "architectures": architectures},
        rule=f"model_type is one of: {supported}",
    )
