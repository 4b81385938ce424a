"""What ``config.json`` says about zero experts, and what is refused before a weight is read.

Names: N real experts, Z zero experts.
"""

from __future__ import annotations

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
    """

    num_real: int
    num_zero: int
    dial: float


def read_zero_experts(config: Any) -> ZeroExperts | None:
    """Return the settings of a model from its configuration object, or ``None`` for a static one.

    Raises:
        ValueError: a key is missing or wrong, or the model is of a method that this plugin does not run.
    """
    named = any("PlusPlus" in name for name in config.architectures or [])
    if not named and all(getattr(config, key, None) is None for key in DYNAMIC_KEYS):
        return None
    for key, found in (
        ("zeda_expert_type", getattr(config, "zeda_expert_type", None) not in (None, "zero")),
        ("zeda_dynamic_skipping_beta", getattr(config, "zeda_dynamic_skipping_beta", None) is not None),
        ("zeda_renormalize", bool(getattr(config, "zeda_renormalize", False))),
    ):
        if found:
            raise refusal(
                f"config.json: `{key}` (got {getattr(config, key)!r})",
                rule="the plugin runs zero experts only, not the controls",
                fix="serve it with transformers (trust_remote_code=True)",
            )
    if (getattr(config, "n_group", None) or 1) != 1:
        raise refusal(
            f"config.json: `n_group` (got {config.n_group!r})",
            rule="zero experts are in no group of experts",
            fix="only models with one group can be dynamic",
        )
    num_real = getattr(config, "num_experts", None) or config.n_routed_experts
    num_zero, dial = zero_expert_settings(config, num_real)
    return ZeroExperts(num_real, num_zero, max(dial, NEVER_CHOSEN))


def refusal(what: str, *, rule: str, fix: str) -> ValueError:
    """An error of one line for somebody who reads the engine's log."""
    return ValueError(f"megatron-zeda: {what}; {rule}; {fix}")
