"""The rules of :mod:`.config_rules` about a server that generates stage 2's responses: its address and its model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

from megatron_zeda.config import Config
from megatron_zeda.config_refusals import Problem


def server_problems(config: Config) -> Iterator[Problem]:
    """What can be said without the model."""
    rollout, train, method = config.rollout, config.train, config.zero_experts.method
    if train.stage == 1 or rollout.engine == "megatron":
        return
    if rollout.url is not None and not _is_address(rollout.url):
        message = f"{rollout.url!r} is no address of a server"
        yield Problem("server_url", ("rollout.url",), message, "use http://host:port/v1")
    if rollout.engine == "vllm" and rollout.reload == "sglang":
        yield Problem(
            "server_reload",
            ("rollout.reload", "rollout.engine"),
            "sglang with rollout.engine vllm, whose server has no such call",
            "use vllm, or set rollout.engine=openai",
        )
    if rollout.reload is None and train.train_epochs is not None and rollout.max_staleness == 0:
        yield Problem(
            "server_weights",
            ("rollout.reload", "rollout.max_staleness", "train.train_epochs"),
            "null, so that the server keeps the weights it has, and with max_staleness 0 its responses are too old "
            "after one step",
            "use vllm or sglang, as the server is",
        )
    if method == "copy":
        yield Problem(
            "server_method",
            ("zero_experts.method", "rollout.engine"),
            f"copy with rollout.engine {rollout.engine}: a server that runs experts by itself takes their negative "
            "weights for ordinary ones",
            "use rollout.engine=megatron",
        )
    elif method in ("adamoe", "net") and rollout.reload is not None and rollout.export_format != "zeda":
        yield Problem(
            "server_method",
            ("rollout.export_format", "zero_experts.method"),
            f"{rollout.export_format} cannot express method {method}",
            "use zeda, or rollout.engine=megatron",
        )


def server_model_problems(config: Config, hf_config: Mapping[str, Any]) -> Iterator[Problem]:
    """A dial that the form of the server's weights has no place for.

    Args:
        config: the configuration.
        hf_config: ``config.json`` of a dynamic model that its family accepts.
    """
    from megatron_zeda.models import family_for
    from megatron_zeda.models.hf_config import zero_logit_bias

    rollout, dial = config.rollout, config.zero_experts.logit_bias
    exports = config.train.stage == 2 and rollout.engine != "megatron" and rollout.reload is not None
    dial = zero_logit_bias(dict(hf_config)) if dial is None else dial
    if not exports or rollout.export_format == "zeda" or not dial:
        return
    family = family_for(dict(hf_config), where=str(config.hf_dir))
    if not any(row.grow is not None and len(row.shape) == 1 for row in family.weight_table(dict(hf_config))):
        yield Problem(
            "server_dial",
            ("zero_experts.logit_bias", "rollout.export_format"),
            f"{dial:g} with {rollout.export_format}: the stock router of {family.name} adds nothing to its logits",
            "use 0, or rollout.export_format=zeda",
        )


def _is_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 0) >= 0
    except ValueError:  # brackets of an address, or a port, that are none
        return False
