"""Write docs/refusals.md from the code. Run it after changing what is refused: `python docs/generate_refusals.py`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

PAGE = Path(__file__).with_name("refusals.md")

INTRODUCTION = """\
<!-- Written by docs/generate_refusals.py. Do not edit. -->
# What is refused, and why

None of these starts and then fails, or runs and is wrong: `zeda check`, and with it every command that reads a
configuration, reports all of them at once, and `ZeroExpertTransformerConfig` raises one error that lists those of the
first table. What Megatron-Core refuses by itself is not repeated. The settings of MoE layers that are not here are
served; which of them ran where is in [verification.md](verification.md).
"""

ZERO_EXPERTS = """\
## With zero experts

Fields of Megatron-Core's `TransformerConfig`; in a configuration of the trainer they are `model.<field>` where that
exists and `model.overrides.<field>` otherwise. Without zero experts none of these is refused. An alternative that the
last table names is one for a Megatron-Core job of your own.
"""

RULES = """\
## What must fit together

Settings of the trainer. Rules about the number of processes or the model are checked as soon as these are known.
What a machine lacks is a note of `zeda check` and an error of `zeda train`.
"""

TRAINER = """\
## By the trainer

Settings that are known and not served, whatever the model.
"""

OVERRIDES = """\
## In `model.overrides`

Fields of `TransformerConfig` that the trainer does not take from there.
"""


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|")


def _table(header: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    lines = [[_cell(cell) for cell in row] for row in rows]
    names = list(header)
    return "\n".join("| " + " | ".join(line) + " |" for line in [names, ["---"] * len(names), *lines]) + "\n"


def _value(value: Any) -> str:
    return "`null`" if value is None else f"`{str(value).lower() if isinstance(value, bool) else value}`"


def render() -> str:
    """The whole page."""
    from megatron_zeda import config_refusals
    from megatron_zeda.zero_experts.config import REFUSALS

    zero_experts = [(f"`{r.setting}`", r.reason, r.alternative) for r in REFUSALS]
    rules = [(", ".join(f"`{key}`" for key in r.settings), r.rule, r.fix) for r in config_refusals.RULES.values()]
    trainer = [
        (f"`{r.key}`", ", ".join(map(_value, r.accepted)) or "the default", r.reason, r.fix)
        for r in config_refusals.NOT_IN_THIS_VERSION
    ]
    unserved = [(f"`{name}`", reason, "remove it") for name, reason in config_refusals.OVERRIDE_REFUSALS.items()]
    owned = [
        (f"`{name}`", f"decided by `{owner}`" if owner else "decided by the trainer", f"set `{owner}`" if owner else "")
        for name, owner in config_refusals.OVERRIDE_OWNERS.items()
    ]
    decided = [
        (f"`{name}`", "decided by the checkpoint; the export would not have it", "convert a checkpoint that has it")
        if name in config_refusals.SET_BY_SOME_FAMILY
        else (f"`{name}`", "no family of this version has it, and the export would not", "remove it")
        for name in sorted(config_refusals.MODEL_DEFAULTS)
    ]
    return "\n".join(
        [
            INTRODUCTION,
            ZERO_EXPERTS,
            _table(["setting", "reason", "instead"], zero_experts),
            RULES,
            _table(["setting", "rule", "otherwise"], rules),
            TRAINER,
            _table(["setting", "served", "reason", "instead"], trainer),
            OVERRIDES,
            _table(["field", "reason", "instead"], [*unserved, *owned, *decided]),
        ]
    )


if __name__ == "__main__":
    PAGE.write_text(render())
    print(f"wrote {PAGE}")
