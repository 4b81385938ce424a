"""What a run writes while it runs: ``metrics.jsonl``, TensorBoard, and lines or a progress bar on the console."""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_zeda.errors import InputError, disk_errors


class Metrics:
    """The one writer of a run. Every other rank gets one that writes nothing."""

    def __init__(
        self, run_dir: Path, *, enabled: bool, tensorboard: bool, start_step: int, last_step: int, log_interval: int
    ) -> None:
        """Args:
        run_dir: the run's folder.
        enabled: on rank 0 only.
        tensorboard: also write ``run_dir/tensorboard``.
        start_step: steps that are already done; what a killed run wrote after them is dropped.
        last_step: where the run ends, for the progress bar.
        log_interval: steps between lines on the console and points in TensorBoard.
        """
        self.enabled, self.log_interval, self.path = enabled, log_interval, run_dir / "metrics.jsonl"
        self._board: Any = None
        if not enabled:
            return
        with disk_errors(run_dir):
            _drop_after(self.path, start_step)
            self._file = self.path.open("a", encoding="utf-8")
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=start_step + 1)
        # disable=None: no bar when the output is not a terminal.
        self._last_step = last_step
        self._bar = tqdm(total=last_step, initial=start_step, unit="step", disable=None, file=sys.stderr)

    def say(self, text: str) -> None:
        """One line for the user."""
        if self.enabled:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def step(self, values: dict[str, Any]) -> None:
        """Record one step. ``values`` are the keys of ``metrics.jsonl``; numbers that are not finite become null."""
        if not self.enabled:
            return
        with disk_errors(self.path):
            self._file.write(json.dumps(_finite(values)) + "\n")
            self._file.flush()
        self._bar.update(1)
        if values["step"] % self.log_interval:
            return
        if "rollout" in values and not values["rollout"]["trained"]:
            pass  # the loop says why there was nothing to train on
        elif self._bar.disable:
            self.say(_line(values, self._last_step))
        else:
            self._bar.set_postfix_str(f"{_terms(values)}, skip {100 * values['skip_rate']:.1f} %")
        self._write_board(values)

    def _write_board(self, values: dict[str, Any]) -> None:
        if self._board is None:
            return
        step = values["step"]
        for key, value in _flat(values):
            if key != "step" and isinstance(value, int | float):
                self._board.add_scalar(key, value, step)

    def close(self) -> None:
        """Flush everything."""
        if self.enabled:
            self._bar.close()
            self._file.close()
            if self._board is not None:
                self._board.close()


def _line(values: dict[str, Any], last_step: int) -> str:
    """What a log file shows of a step."""
    return (
        f"step {values['step']}/{last_step}: loss {values['loss']:.4f}, {_terms(values)}, {_routing(values)}"
        f"grad norm {values['grad_norm']:.4g}, lr {values['lr']:.3g}, {values['tokens_per_second']:,.0f} tokens/s"
    )


def _routing(values: dict[str, Any]) -> str:
    """Skip rate and balance, of a model that skips anything."""
    if not values["skip_rate_per_layer"]:
        return ""
    return f"skip rate {100 * values['skip_rate']:.1f} %, balance {values['balance_loss']:.4f}, "


def _terms(values: dict[str, Any]) -> str:
    """The terms of the objective, as far as they were computed."""
    names = {"ce": "ce", "kl_forward": "forward KL", "kl_reverse": "reverse KL"}
    return ", ".join(f"{name} {values[key]:.4f}" for key, name in names.items() if values[key] is not None)


def _flat(values: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """``skip_rate_per_layer`` becomes ``skip_rate_per_layer/00``, nested objects ``name/key``."""
    pairs: list[tuple[str, Any]] = []
    for key, value in values.items():
        if isinstance(value, dict):
            pairs += _flat(value, f"{prefix}{key}/")
        elif isinstance(value, list):
            pairs += [(f"{prefix}{key}/{index:02d}", item) for index, item in enumerate(value)]
        else:
            pairs.append((f"{prefix}{key}", value))
    return pairs


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _drop_after(path: Path, step: int) -> None:
    """Remove lines of steps that a resumed run will do again, and a line that was cut short by a kill."""
    if not path.exists():
        return
    kept = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        if not isinstance(line, dict) or not isinstance(line.get("step"), int):
            raise InputError(
                "a line without a step",
                where=path,
                value=text[:80],
                rule="logger.run_dir holds the metrics of this run",
                fix="move the file away, or choose another logger.run_dir",
            )
        if line["step"] <= step:
            kept.append(text)
    temporary = path.with_name(f".{path.name}.partial-{os.getpid()}")
    temporary.write_text("".join(f"{text}\n" for text in kept), encoding="utf-8")
    os.replace(temporary, path)
