"""A setting that nothing reads is a lie: every field is consumed outside the configuration's own files, or refused."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import megatron_zeda
from megatron_zeda.config import Config
from megatron_zeda.config_refusals import NOT_IN_THIS_VERSION

PACKAGE = Path(megatron_zeda.__file__).parent
# Checking, printing and describing a setting is not using it.
NOT_CONSUMERS = {
    "config_io.py",
    "config_rules.py",
    "config_model_rules.py",
    "config_pipeline_rules.py",
    "config_rollout_rules.py",
    "config_refusals.py",
    "cli.py",
    "banner.py",
}

SECTIONS = {section.name: [f.name for f in fields(getattr(Config(), section.name))] for section in fields(Config)}


def _functions(tree: ast.Module) -> Iterator[ast.AST]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name != "derived":
            yield node


def _section_of(node: ast.AST) -> str | None:
    """``x.<section>`` -> the section."""
    return node.attr if isinstance(node, ast.Attribute) and node.attr in SECTIONS else None


def _aliases(function: ast.AST) -> dict[str, str]:
    """Local names for sections: ``model, train = config.model, config.train``."""
    names: dict[str, str] = {}
    for node in ast.walk(function):
        if not isinstance(node, ast.Assign):
            continue
        for target in node.targets:
            targets = target.elts if isinstance(target, ast.Tuple) else [target]
            values = node.value.elts if isinstance(node.value, ast.Tuple) else [node.value]
            for name, value in zip(targets, values, strict=False):
                section = _section_of(value)
                if section is not None and isinstance(name, ast.Name):
                    names[name.id] = section
    return names


def consumed(source: str) -> set[str]:
    """Dotted keys that a module reads."""
    keys: set[str] = set()
    for function in _functions(ast.parse(source)):
        aliases = _aliases(function)

        def section(node: ast.AST, aliases: dict[str, str] = aliases) -> str | None:
            return aliases.get(node.id) if isinstance(node, ast.Name) else _section_of(node)

        for node in ast.walk(function):
            if isinstance(node, ast.Attribute) and (owner := section(node.value)):
                keys |= {f"{owner}.{node.attr}"} & {f"{owner}.{name}" for name in SECTIONS[owner]}
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or not node.args:
                continue
            owner = section(node.args[0])
            if owner and node.func.id == "asdict":
                keys |= {f"{owner}.{name}" for name in SECTIONS[owner]}
            if owner and node.func.id == "getattr" and isinstance(node.args[1], ast.JoinedStr):
                prefix = node.args[1].values[0]
                if isinstance(prefix, ast.Constant):
                    keys |= {f"{owner}.{name}" for name in SECTIONS[owner] if name.startswith(str(prefix.value))}
    return keys


def test_the_reader_of_sources_sees_every_form_of_use() -> None:
    source = """
def f(config):
    model, x = config.model, config.train.seed
    getattr(model, f"recompute_{x}")
    asdict(config.ddp)
    self.config.logger.run_dir
    model.hf.upper()
    other.lr
"""
    found = consumed(source)
    assert {"train.seed", "model.recompute_method", "ddp.overlap_grad_reduce", "logger.run_dir", "model.hf"} <= found
    assert not any(key.startswith("optimizer.") for key in found)


def test_every_setting_is_consumed_or_refused() -> None:
    found: set[str] = set()
    for path in PACKAGE.rglob("*.py"):
        if path.name not in NOT_CONSUMERS:
            found |= consumed(path.read_text(encoding="utf-8"))
    # A row that accepts one value alone leaves nothing to consume.
    refused = {row.key for row in NOT_IN_THIS_VERSION if not row.accepted}
    unused = [
        f"{section}.{name}"
        for section, names in SECTIONS.items()
        for name in names
        if f"{section}.{name}" not in found and not {section, f"{section}.{name}"} & refused
    ]
    # The number of zero experts is the checkpoint's; the setting is an assertion about it, which the rules check.
    assert unused == ["zero_experts.num_zero_experts"]
