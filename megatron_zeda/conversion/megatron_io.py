"""A Megatron checkpoint folder: Megatron-LM's layout plus what is needed to go back to Hugging Face.

<folder>/latest_checkpointed_iteration.txt
<folder>/iter_0000000/            torch_dist
<folder>/zeda_manifest.json       where it came from, how experts lay on disk
<folder>/hf/                      config.json, tokenizer, chat template: training and export need no other source
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import torch

from megatron_zeda.conversion.manifest import read_manifest
from megatron_zeda.conversion.pickles import check_pickles
from megatron_zeda.conversion.torch_dist import TorchDistReader
from megatron_zeda.errors import InputError
from megatron_zeda.models import ExpertLayout, Family, HfPiece, WeightRow, family_for, load_hf_config

__all__ = [
    "MegatronFolder",
    "check_pickles",
    "drop_extra_state",
    "iteration_dir",
    "latest_iteration",
    "read_manifest",
    "write_latest_iteration",
]

TRACKER = "latest_checkpointed_iteration.txt"
HF_FOLDER = "hf"
_NOT_WEIGHTS = re.compile(
    r"(^|\.)(optimizer|rng_state|rerun_state_machine_state|opt_param_scheduler)(\.|/|$)|_extra_state"
)


def iteration_dir(folder: str | Path, iteration: int) -> Path:
    """Where an iteration is."""
    return Path(folder) / f"iter_{iteration:07d}"


def latest_iteration(folder: str | Path) -> int:
    """The newest complete iteration.

    Raises:
        InputError: if the folder is not a Megatron checkpoint, or the iteration it names is not there.
    """
    path = Path(folder) / TRACKER
    if not path.is_file():
        raise InputError("no such file", where=path, rule="a Megatron checkpoint folder has one", fix="check the path")
    text = path.read_text(encoding="utf-8", errors="replace").strip()
    if not re.fullmatch(r"\d{1,18}", text):
        raise InputError("not an iteration number", where=path, value=text[:80])
    if not iteration_dir(folder, int(text)).is_dir():
        raise InputError("no such folder", where=iteration_dir(folder, int(text)), rule=f"named by {TRACKER}")
    return int(text)


def write_latest_iteration(folder: str | Path, iteration: int) -> None:
    """Name the newest complete iteration, atomically."""
    partial = Path(folder) / f".{TRACKER}.partial"
    partial.write_text(f"{iteration}\n", encoding="utf-8")
    partial.replace(Path(folder) / TRACKER)


def drop_extra_state(sharded_state_dict: dict[str, Any]) -> dict[str, Any]:
    """Without Transformer Engine's ``_extra_state`` entries, which a checkpoint written on a CPU does not have."""
    return {name: entry for name, entry in sharded_state_dict.items() if "_extra_state" not in name}


class MegatronFolder:
    """One iteration of a Megatron checkpoint, seen through its family's weight table as Hugging Face pieces."""

    def __init__(self, path: str | Path, *, iteration: int | None = None, layout: ExpertLayout | None = None) -> None:
        """Open and check.

        Args:
            path: the checkpoint folder, or one of its ``iter_*`` folders.
            iteration: which one; the newest by default.
            layout: how experts shall lie; by default as in the checkpoint that was imported.

        Raises:
            InputError: for a folder that is not a Megatron checkpoint of a known family, or not complete.
            ZedaError: for pickles that are not only data.
        """
        self.path = Path(path)
        match = re.fullmatch(r"iter_(\d{7,})", self.path.name)
        if match and iteration is None and not os.path.exists(self.path / TRACKER):
            self.path, iteration = self.path.parent, int(match.group(1))
        if not os.path.isdir(self.path):
            raise InputError("no such folder", where=self.path, rule="a Megatron checkpoint folder")
        self.iteration = latest_iteration(self.path) if iteration is None else iteration
        self.hf = self.path / HF_FOLDER
        self.config = load_hf_config(self.hf)
        self.family: Family = family_for(self.config)
        self.manifest = read_manifest(self.path)
        self.layout: ExpertLayout = layout or self.manifest.get("expert_layout", "per_expert")
        self.rows = self.family.weight_table(self.config, self.layout)
        self.carried: list[WeightRow] = []
        folder = iteration_dir(self.path, self.iteration)
        if not folder.is_dir():
            raise InputError("no such folder", where=folder, rule="the iteration that was asked for")
        self.tensors = TorchDistReader(folder)
        self._check_tensors(folder)
        self._row_of = {(piece.name, piece.slot): row for row in self.rows for piece in row.pieces}
        self._last: tuple[WeightRow, dict[HfPiece, torch.Tensor]] | None = None

    def read(self, piece: HfPiece) -> torch.Tensor:
        """Read one Hugging Face piece."""
        row = self._row_of[piece.name, piece.slot]
        if self._last is None or self._last[0] is not row:
            block = self.tensors.read(row)  # of a padded vocabulary, the rows that the model has
            parts = row.packing.unpack(block, [part.shape for part in row.pieces])
            self._last = (row, dict(zip(row.pieces, parts, strict=True)))
        return self._last[1][piece]

    def dtype(self, piece: HfPiece) -> torch.dtype:
        """Type of a piece."""
        return self.tensors.dtype(self._row_of[piece.name, piece.slot].key)

    def _check_tensors(self, folder: Path) -> None:
        stored = {key for key in self.tensors.tensors if not _NOT_WEIGHTS.search(key)}
        expected = {row.key: row for row in self.rows}
        for names, problem in ((expected.keys() - stored, "missing"), (stored - expected.keys(), "unexpected")):
            if names:
                raise InputError(
                    f"{len(names)} tensors are {problem}, the first is {min(names)}",
                    where=folder,
                    rule=f"exactly the tensors of {self.family.name} with hf/config.json",
                )
        for key, row in expected.items():
            size = tuple(self.tensors.tensors[key].size)
            padded = row.padded and size[0] > row.shape[0] and size[1:] == row.shape[1:]
            if size != row.global_shape and not padded:
                raise InputError(
                    f"{key} has the wrong shape",
                    where=folder,
                    value=list(size),
                    rule=f"{list(row.global_shape)} by hf/config.json",
                )
