"""YAML files and command-line overrides to a checked :class:`.config.Config`, and back to YAML.

OmegaConf reads, inherits, merges and interpolates; pydantic checks the types; :mod:`.config_rules` checks what must fit
together. All problems are reported at once, each with the file and line or the override that caused it.

Precedence: defaults < ``base:`` file < the file < command line. ``base:`` is relative to the file that names it; every
other relative path is relative to the current directory.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import TypeAdapter, ValidationError

from megatron_zeda.config import Config
from megatron_zeda.config_refusals import Problem
from megatron_zeda.config_rules import find_problems
from megatron_zeda.errors import InputError

Tree = dict[str, Any]

_FOLDER_FIX = {
    "config.json": "a Hugging Face model folder is wanted",
    "latest_checkpointed_iteration.txt": "checkpoint_tools/hf_to_megatron.py writes such a folder",
    "hf/config.json": "checkpoint_tools/hf_to_megatron.py copies the model's configuration there",
}


class ConfigErrors(InputError):
    """All problems of a configuration, one line each.

    Attributes:
        problems: the lines, without a prefix.
    """

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = list(problems)


class _Collector:
    """The merged tree, where each of its values came from, and the problems found on the way."""

    def __init__(self) -> None:
        self.tree: DictConfig = OmegaConf.create(asdict(Config()))
        self.origins: dict[str, str] = {}
        self.problems: list[str] = []
        self.bad_keys: set[str] = set()
        self.still_missing: set[str] = set()  # set to ??? and not given since

    def report(self, key: str, message: str, origin: str | None = None) -> None:
        """Record a problem with the value at ``key``."""
        self.bad_keys.add(key)
        origin = origin or self.origin(key)
        self.problems.append(f"{key}: {message}" + (f" ({origin})" if origin else ""))

    def origin(self, key: str) -> str | None:
        """Where the value at ``key``, or the nearest part of it, was set."""
        while key:
            if key in self.origins:
                return self.origins[key]
            key = key.rpartition(".")[0]
        return None

    def merge(self, tree: Tree, origins: Mapping[str, str]) -> None:
        """Lay ``tree`` over what is there; keys that do not exist are reported and left out."""
        known = self._known(tree, "", Config, origins)
        self.tree = OmegaConf.merge(self.tree, OmegaConf.create(known))
        self.origins.update(origins)

    def _known(self, tree: Tree, prefix: str, section: type, origins: Mapping[str, str]) -> Tree:
        """``tree`` without unknown keys, with a lone path made a list where a list is meant."""
        kept: Tree = {}
        hints = get_type_hints(section)
        names = [f.name for f in fields(section)]
        for name, value in tree.items():
            key = f"{prefix}{name}"
            if name not in names:
                self.report(key, "there is no such setting" + _suggestion(str(name), section), origins.get(key))
            elif is_dataclass(hints[name]):
                if isinstance(value, dict):
                    kept[name] = self._known(value, f"{key}.", hints[name], origins)
                elif value is not None:  # an empty section in YAML is null
                    self.report(key, f"a section with keys of its own is wanted, not {value!r}", origins.get(key))
            elif value == "???":  # OmegaConf's mark, which its merge would pass over
                self.still_missing.add(key)
            else:
                self.still_missing.discard(key)
                kept[name] = [value] if hints[name] == list[str] and isinstance(value, str) else value
        return kept


def load_config(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    world_size: int | None = None,
    hf_config: Mapping[str, Any] | None = None,
) -> Config:
    """Read, merge and check a configuration.

    Args:
        path: YAML file.
        overrides: ``section.key=<YAML value>``, applied in order.
        world_size: number of processes, for the rules that depend on it; None leaves them out.
        hf_config: the model's ``config.json``; None reads it from :func:`hf_config_file`, if there is one.

    Raises:
        ConfigErrors: with every problem.
    """
    collector = _Collector()
    layers = _files(Path(path), collector)
    unread = bool(collector.problems)
    for tree, origins in layers:
        collector.merge(tree, origins)
    for override in overrides:
        _apply_override(override, collector)
    for key in sorted(collector.still_missing):
        collector.report(key, "a value must be given here")
    config = _validate(_resolve(collector), collector)
    if unread:  # what is missing may well stand there
        raise ConfigErrors(collector.problems)
    if hf_config is None:
        hf_config = _read_hf_config(hf_config_file(config, path), collector)
    for problem in find_problems(config, world_size=world_size, hf_config=hf_config):
        if not collector.bad_keys.intersection(problem.keys):
            collector.problems.append(_with_origins(problem, collector))
    if collector.problems:
        raise ConfigErrors(collector.problems)
    return config


def to_yaml(config: Config) -> str:
    """Return the complete configuration as YAML that :func:`load_config` reads back unchanged."""
    return str(OmegaConf.to_yaml(OmegaConf.create(asdict(config))))


def hf_config_file(config: Config, path: str | Path) -> Path | None:
    """Return the ``config.json`` that gives the model's shape, or None.

    It is the one in the model's folder. Where that does not exist yet, a ``config.json`` beside the YAML file stands
    in, so that a configuration can be checked before the weights are there.
    """
    folders = [folder for folder in (config.hf_dir, Path(path).parent) if folder is not None]
    return next((folder / "config.json" for folder in folders if (folder / "config.json").is_file()), None)


def missing_inputs(config: Config) -> tuple[list[str], list[str]]:
    """Look for the files that a run reads.

    Returns:
        What does not exist (yet), and what exists but is something else; one line each.
    """
    absent, wrong = [], []
    marker, shape = "latest_checkpointed_iteration.txt", "hf/config.json"
    teacher = config.teacher.checkpoint
    wanted: list[tuple[str, str | None, str | None]] = [
        ("model.hf", config.model.hf, "config.json"),
        ("model.checkpoint", config.model.checkpoint, marker),
        ("model.checkpoint", config.model.checkpoint if config.model.hf is None else None, shape),
        ("teacher.checkpoint", teacher, marker),
        ("teacher.checkpoint", teacher, shape),
        ("checkpoint.load", config.checkpoint.load, marker),
        *(("dataset.train", name, None) for name in config.dataset.train),
        *(("dataset.validation", name, None) for name in config.dataset.validation),
        *(("rollout.prompts", name, None) for name in config.rollout.prompts),
    ]
    for key, name, inside in wanted:
        if name is None:
            continue
        path = Path(name)
        if not path.exists():
            absent.append(f"{key}: {path} does not exist")
        elif inside is None and not path.is_file():
            wrong.append(f"{key}: {path} is a folder; a jsonl file is wanted")
        elif inside is not None and not (path / inside).is_file():
            wrong.append(f"{key}: {path} has no {inside}; " + _FOLDER_FIX[inside])
    absent = list(dict.fromkeys(absent))
    tokenizer = config.dataset.tokenizer
    if tokenizer is not None and not Path(tokenizer).exists():
        absent.append(f"dataset.tokenizer: {tokenizer} does not exist")
    if config.run_dir.exists() and not config.run_dir.is_dir():
        wrong.append(f"logger.run_dir: {config.run_dir} is a file; name a folder")
    return absent, wrong


def _files(path: Path, collector: _Collector) -> list[tuple[Tree, dict[str, str]]]:
    """The file and the files it is based on, the most basic first."""
    layers: list[tuple[Tree, dict[str, str]]] = []
    seen: list[Path] = []
    while True:
        if path.resolve() in seen:
            names = " -> ".join(str(p) for p in [*seen, path.resolve()])
            collector.problems.append(f"base: the files are based on each other in a circle: {names}")
            break
        seen.append(path.resolve())
        tree, origins = _read_yaml(path, collector)
        base = tree.pop("base", None)
        layers.insert(0, (tree, origins))
        if base is None:
            break
        if not isinstance(base, str):
            collector.report("base", f"the path of one YAML file is wanted, not {base!r}", origins.get("base"))
            break
        path = path.parent / base
    return layers


def _read_yaml(path: Path, collector: _Collector) -> tuple[Tree, dict[str, str]]:
    """The content of a YAML file, and the ``file:line`` of each of its keys."""
    try:
        text = path.read_text(encoding="utf-8")
        loaded = OmegaConf.create(text)
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except FileNotFoundError:
        collector.problems.append(f"{path}: the configuration file does not exist")
    except (OSError, UnicodeDecodeError) as error:
        collector.problems.append(f"{path}: the configuration file cannot be read: {error}")
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        collector.problems.append(f"{path}: not valid YAML: {_one_line(error)}")
    else:
        if isinstance(loaded, DictConfig) and (node is None or isinstance(node, yaml.MappingNode)):
            tree = OmegaConf.to_container(loaded, resolve=False)
            origins = {key: f"{path}:{line}" for key, line in _lines(node, "")} if node else {}
            return tree, origins
        collector.problems.append(f"{path}: a mapping of sections is wanted at the top of the file")
    return {}, {}


def _lines(node: yaml.MappingNode, prefix: str) -> Iterator[tuple[str, int]]:
    for name, value in node.value:
        key = f"{prefix}{name.value}"
        yield key, name.start_mark.line + 1
        if isinstance(value, yaml.MappingNode):
            yield from _lines(value, f"{key}.")


def _apply_override(override: str, collector: _Collector) -> None:
    """Merge one ``section.key=value``."""
    key, equals, value = override.partition("=")
    if key.startswith(("+", "~")):
        name = key.lstrip("+~")
        instead = f"{name}={value or '<value>'}" if key[0] == "+" else f"{name}=null, or leave the key out"
        collector.problems.append(f"{override}: `{key[0]}` is Hydra's grammar, which is not used here; write {instead}")
        return
    key = key.removeprefix("--")
    parts = key.split(".")
    if not equals or not all(parts):
        collector.problems.append(f"{override}: not an override; write section.key=value")
        return
    try:
        parsed = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={value}"]), resolve=False)
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        collector.problems.append(f"{override}: the value is not YAML ({_one_line(error)}); put it in quotes")
        collector.bad_keys.add(key)
        return
    tree: Any = parsed["value"]
    for part in reversed(parts):
        tree = {part: tree}
    collector.merge(tree, {key: f"override {override}"})


def _resolve(collector: _Collector) -> Tree:
    """The merged tree with its ``${...}`` replaced; what cannot be replaced is reported and set to its default."""

    def walk(node: Any, prefix: str, defaults: Any) -> Any:
        resolved: Tree = {}
        for name in node:
            key = f"{prefix}{name}"
            default = defaults.get(name) if isinstance(defaults, dict) else None
            try:
                value = node[name]
                if isinstance(value, DictConfig):
                    resolved[str(name)] = walk(value, f"{key}.", default)
                elif OmegaConf.is_config(value):
                    resolved[str(name)] = OmegaConf.to_container(value, resolve=True, throw_on_missing=True)
                else:
                    resolved[str(name)] = value
            except OmegaConfBaseException as error:
                collector.report(key, _one_line(error))
                resolved[str(name)] = default
        return resolved

    return walk(collector.tree, "", asdict(Config()))


def _validate(tree: Tree, collector: _Collector) -> Config:
    """The typed configuration; a value of a wrong type is reported and replaced by its default."""
    adapter = TypeAdapter(Config)
    for _ in range(2):
        try:
            # JSON, because pydantic's strict mode takes dataclasses from a mapping only there.
            return adapter.validate_json(json.dumps(tree, default=str))
        except ValidationError as error:
            for detail in error.errors():
                location = [str(part) for part in detail["loc"]]
                _report_type(detail, location, tree, collector)
                _reset(tree, location)
    raise AssertionError("the defaults are valid")


def _report_type(detail: Any, location: list[str], tree: Tree, collector: _Collector) -> None:
    key = ".".join(location[:2])
    if key in collector.bad_keys:
        return
    message = str(detail["msg"]).removeprefix("Input should be ").replace("an object", "a mapping")
    value = tree
    for part in location[:2]:
        value = value[part]
    hint = ""
    if detail["type"] == "literal_error" and isinstance(value, str):
        options = str(detail["ctx"]["expected"]).replace(" or ", ", ").replace("'", "").split(", ")
        match = get_close_matches(value, options, n=1)
        hint = f"; did you mean {match[0]}?" if match else ""
    if len(location) > 2:
        message = f"element {location[2]}: {message}"
    collector.report(key, f"{json.dumps(value, default=str)} is given, {message} is wanted{hint}")


def _reset(tree: Tree, location: list[str]) -> None:
    section, name = location[0], location[1]
    tree[section][name] = asdict(Config())[section][name]


def _read_hf_config(file: Path | None, collector: _Collector) -> Mapping[str, Any] | None:
    if file is None:
        return None
    from megatron_zeda.models import load_hf_config

    try:
        return load_hf_config(file.parent)
    except InputError as error:
        collector.report("model.hf", str(error))
        return None


def _suggestion(name: str, section: type) -> str:
    """A hint for an unknown key: a near name in its own section, else the section that has this very key."""
    names = [f.name for f in fields(section)]
    near = get_close_matches(name, names, n=1, cutoff=0.6)
    elsewhere = [
        f"{top}.{f.name}"
        for top, kind in get_type_hints(Config).items()
        if is_dataclass(kind)
        for f in fields(kind)
        if f.name == name
    ]
    if elsewhere:
        return f"; did you mean {elsewhere[0]}?"
    if near:
        return f"; did you mean {near[0]}?"
    return f"; there are {', '.join(names)}"


def _with_origins(problem: Problem, collector: _Collector) -> str:
    origins = [collector.origins[key] for key in problem.keys if key in collector.origins]
    return str(problem) + (f" ({', '.join(dict.fromkeys(origins))})" if origins else "")


def _one_line(error: Exception) -> str:
    """The message of a YAML or OmegaConf error without its trailing context lines."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem is not None:
        mark = error.problem_mark
        return error.problem + (f" in line {mark.line + 1}, column {mark.column + 1}" if mark else "")
    return str(error).strip().splitlines()[0]
