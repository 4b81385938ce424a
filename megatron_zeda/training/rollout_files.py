"""What a run keeps of its rollouts on disk, and how it names the weights that have sampled them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path

from megatron_zeda.config import Config
from megatron_zeda.conversion import megatron_io
from megatron_zeda.data.jsonl import parse_line
from megatron_zeda.errors import InputError, disk_errors
from megatron_zeda.rollout.files import Rollout, parse_rollout

ROLLOUTS = "rollouts"


# ---- which weights --------------------------------------------------------------------------------------------------

# Sections without any influence on the weights.
_NOT_OF_THE_WEIGHTS = frozenset({"checkpoint", "dist", "logger", "validation"})


def first_weights(config: Config) -> str:
    """Name the weights that a run begins with, by their checkpoint."""
    folder = megatron_io.latest_checkpoint_dir(Path(str(config.model.checkpoint)))
    return _digest(str(folder), str(folder.stat().st_mtime_ns))


def next_weights(config: Config, before: str, *numbers: float) -> str:
    """Name the weights after a step, by those before, the settings, and what the step has measured.

    Two runs that did the same steps with the same settings give the same names, and others do not: hashing the weights
    themselves would take longer than a step.
    """
    settings = {name: section for name, section in asdict(config).items() if name not in _NOT_OF_THE_WEIGHTS}
    return _digest(before, json.dumps(settings, sort_keys=True), *(number.hex() for number in numbers))


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def weights_version(updates: int, weights: str) -> str:
    """The ``weights_version`` of responses: ``step-<steps done>-<name>``."""
    return f"step-{updates:07d}-{weights}"


def steps_of(version: str) -> int:
    """The number of steps that the weights of a version have seen."""
    return int(version.split("-")[1])


# ---- files ----------------------------------------------------------------------------------------------------------


class StepFile:
    """The responses of one step on disk; only one rank has one."""

    def __init__(self, run_dir: Path, step: int) -> None:
        self.path = run_dir / ROLLOUTS / f"step_{step:07d}.jsonl"
        self.partial = self.path.with_name(self.path.name + ".partial")

    def read(self, fits: Callable[[Rollout], bool]) -> tuple[dict[int, Rollout], bool]:
        """What an earlier start of this run has left that fits, by row, and whether it has finished the file.

        Torn lines and whatever does not fit are passed over: :meth:`begin` removes them.
        """
        source = self.path if self.path.is_file() else self.partial
        found: dict[int, Rollout] = {}
        fitting = True
        if source.is_file():
            with disk_errors(source), source.open(encoding="utf-8", errors="replace") as file:
                for number, text in enumerate(file, start=1):
                    try:
                        rollout = parse_rollout(parse_line(text, f"{source}:{number}"), f"{source}:{number}")
                    except InputError:
                        fitting = False
                        continue
                    if fits(rollout):
                        found[rollout.sampling["row"]] = rollout
                    else:
                        fitting = False
        return found, fitting and source == self.path

    def begin(self, kept: Iterable[Rollout]) -> None:
        """Start a file with these lines."""
        with disk_errors(self.partial):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}")
            temporary.write_text("".join(f"{rollout.to_json()}\n" for rollout in kept), encoding="utf-8")
            os.replace(temporary, self.partial)
            self.path.unlink(missing_ok=True)

    def append(self, rollouts: Iterable[Rollout]) -> None:
        """Add lines and hand them to the operating system."""
        with disk_errors(self.partial), self.partial.open("a", encoding="utf-8") as file:
            file.write("".join(f"{rollout.to_json()}\n" for rollout in rollouts))

    def finish(self) -> None:
        """Every response of the step was asked for, and lies there if it could be had."""
        with disk_errors(self.path):
            os.replace(self.partial, self.path)
