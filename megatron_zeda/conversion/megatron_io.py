"""A Megatron checkpoint folder: Megatron-LM's layout plus what is needed to go back to Hugging Face.

<folder>/latest_checkpointed_iteration.txt   "release", or the number of an iteration
<folder>/release/                 torch_dist: imported weights, not the state of a training run
<folder>/iter_0000100/            torch_dist: what a run saved
<folder>/zeda_manifest.json       where it came from, how experts lay on disk
<folder>/hf/                      config.json, tokenizer, chat template: training and export need no other source
<folder>/hf/carried.safetensors   tensors beside the model, if there are any
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import torch

from megatron_zeda.conversion.folders import read_errors
from megatron_zeda.conversion.hf_folder import CARRIED_FILE, present_carried
from megatron_zeda.conversion.manifest import MANIFEST_FILE, read_manifest
from megatron_zeda.conversion.megatron_keys import StoredBlock, find_block
from megatron_zeda.conversion.pickles import check_pickles
from megatron_zeda.conversion.safetensors_io import SafetensorsReader
from megatron_zeda.conversion.torch_dist import TorchDistReader
from megatron_zeda.errors import InputError
from megatron_zeda.models import ExpertLayout, Family, HfPiece, WeightRow, family_for, load_hf_config

__all__ = [
    "MegatronFolder",
    "check_pickles",
    "drop_extra_state",
    "is_megatron_folder",
    "iteration_dir",
    "latest_checkpoint_dir",
    "latest_iteration",
    "read_manifest",
    "write_latest_iteration",
]

TRACKER = "latest_checkpointed_iteration.txt"
RELEASE = "release"
HF_FOLDER = "hf"
_NOT_WEIGHTS = re.compile(
    r"(^|\.)(optimizer|rng_state|rerun_state_machine_state|opt_param_scheduler)(\.|/|$)|_extra_state"
)
_CHECKPOINT = re.compile(r"iter_(\d{7,})|release")


def iteration_dir(folder: str | Path, iteration: int) -> Path:
    """Where a run saves an iteration."""
    return Path(folder) / f"iter_{iteration:07d}"


def is_megatron_folder(path: str | Path) -> bool:
    """Whether this is a Megatron checkpoint folder, or one of the checkpoints in such a folder."""
    path = Path(path)
    if (path / TRACKER).exists():
        return True
    # A Hugging Face folder may have such a name too.
    named = _CHECKPOINT.fullmatch(path.name) is not None
    return named and ((path / ".metadata").exists() or not (path / "config.json").exists())


def latest_checkpoint_dir(folder: str | Path) -> Path:
    """Folder of the newest complete checkpoint: an iteration, or the weights that were imported.

    Raises:
        InputError: if the folder is not a Megatron checkpoint, or what it names is not there.
    """
    path = Path(folder) / TRACKER
    if not path.is_file():
        raise InputError("no such file", where=path, rule="a Megatron checkpoint folder has one", fix="check the path")
    with read_errors(path):
        text = path.read_text(encoding="utf-8", errors="replace").strip()
    if text != RELEASE and not re.fullmatch(r"\d{1,18}", text):
        raise InputError("not an iteration number", where=path, value=text[:80], rule=f"a number or `{RELEASE}`")
    found = Path(folder) / RELEASE if text == RELEASE else iteration_dir(folder, int(text))
    if not found.is_dir():
        raise InputError("no such folder", where=found, rule=f"named by {TRACKER}")
    return found


def latest_iteration(folder: str | Path) -> int:
    """Number of the newest complete iteration; 0 for imported weights. Raises as :func:`latest_checkpoint_dir` does."""
    return _iteration_of(latest_checkpoint_dir(folder))


def write_latest_iteration(folder: str | Path, iteration: int | str) -> None:
    """Name the newest complete iteration, or :data:`RELEASE`, atomically."""
    partial = Path(folder) / f".{TRACKER}.partial"
    partial.write_text(f"{iteration}\n", encoding="utf-8")
    partial.replace(Path(folder) / TRACKER)


def drop_extra_state(sharded_state_dict: dict[str, Any]) -> dict[str, Any]:
    """Without Transformer Engine's ``_extra_state`` entries, which a checkpoint written on a CPU does not have."""
    return {name: entry for name, entry in sharded_state_dict.items() if "_extra_state" not in name}


def unpack_row(row: WeightRow, block: torch.Tensor) -> Iterator[tuple[HfPiece, torch.Tensor]]:
    """The Hugging Face pieces of a block."""
    return zip(row.pieces, row.packing.unpack(block, [piece.shape for piece in row.pieces]), strict=True)


class MegatronFolder:
    """One checkpoint of a Megatron checkpoint folder, seen through its family's weight table as Hugging Face pieces.

    It may have been saved by any Megatron-Core job, see :mod:`megatron_zeda.conversion.megatron_keys`.

    Attributes:
        iteration: its number; 0 for imported weights.
        folder: where it is.
        hf: where its ``config.json`` and tokenizer are.
        rows: the weight table, in the order in which it is stored.
        carried: tensors beside the model that it has; they are in :data:`CARRIED_FILE`.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        iteration: int | None = None,
        layout: ExpertLayout | None = None,
        hf_config: str | Path | None = None,
    ) -> None:
        """Open and check.

        Args:
            path: the checkpoint folder, or one of its ``iter_*`` or ``release`` folders.
            iteration: which one; the newest by default. 0 is ``release`` if there is no ``iter_0000000``.
            layout: how experts shall lie; by default as in the checkpoint that was imported.
            hf_config: folder with ``config.json`` and tokenizer of a checkpoint that has no ``hf`` folder.

        Raises:
            InputError: for a folder that is not a Megatron checkpoint of a known family, or not complete.
            ZedaError: for pickles that are not only data.
        """
        self.path, self.folder = _locate(Path(path), iteration)
        self.iteration = _iteration_of(self.folder)
        self.hf = self.path / HF_FOLDER if hf_config is None else Path(hf_config)
        if not os.path.isdir(self.hf):
            raise InputError(
                "no such folder", where=self.hf, rule="config.json and tokenizer of the model", fix="give --hf-config"
            )
        self.config = load_hf_config(self.hf)
        self.family: Family = family_for(self.config)
        self.manifest = read_manifest(self.path)
        self.layout: ExpertLayout = layout or self._stored_layout()
        self.rows = self.family.weight_table(self.config, self.layout)
        self._beside = SafetensorsReader(self.hf, file=CARRIED_FILE) if (self.hf / CARRIED_FILE).exists() else None
        self.carried = self._find_carried()
        self.tensors = TorchDistReader(self.folder)
        self._blocks = self._find_blocks()
        self.rows.sort(key=lambda row: self.tensors.place(self._blocks[str(row)].key, self._blocks[str(row)].index))
        self._row_of = {(piece.name, piece.slot): row for row in self.rows for piece in row.pieces}
        self._last: tuple[WeightRow, dict[HfPiece, torch.Tensor]] | None = None

    def watch(self, passed: Callable[[Path, int, memoryview], None]) -> None:
        """Call ``passed`` with the file, the offset and the bytes of all weights that are read from now on."""
        self.tensors.disk.passed = passed
        if self._beside is not None:
            self._beside.disk.passed = passed

    def read(self, piece: HfPiece) -> torch.Tensor:
        """Read one Hugging Face piece."""
        row = self._row_of.get((piece.name, piece.slot))
        if row is None:
            return self._carried_reader.read(piece.name, piece.slot)
        if self._last is None or self._last[0] is not row:
            block = self._blocks[str(row)]
            values = self.tensors.read_block(block.key, block.index, row.shape)  # without a vocabulary's padding
            self._last = (row, dict(unpack_row(row, values)))
        return self._last[1][piece]

    def dtype(self, piece: HfPiece) -> torch.dtype:
        """Type of a piece."""
        row = self._row_of.get((piece.name, piece.slot))
        if row is None:
            return self._carried_reader.tensors[piece.name].dtype
        return self.tensors.dtype(self._blocks[str(row)].key)

    def where(self, piece: HfPiece) -> Path:
        """The file or folder that holds a piece."""
        return self.folder if (piece.name, piece.slot) in self._row_of else self.hf / CARRIED_FILE

    @property
    def _carried_reader(self) -> SafetensorsReader:
        assert self._beside is not None  # otherwise there are no carried pieces
        return self._beside

    def _stored_layout(self) -> ExpertLayout:
        """How experts lay in the checkpoint that was imported."""
        stored: ExpertLayout = self.manifest.get("expert_layout", "per_expert")
        if stored not in get_args(ExpertLayout):
            raise InputError(
                "`expert_layout` is wrong",
                where=self.path / MANIFEST_FILE,
                value=stored,
                rule=f"one of {', '.join(get_args(ExpertLayout))}",
            )
        return stored

    def _find_carried(self) -> list[WeightRow]:
        """Rows of what lies beside the model; the file must hold exactly those, in their shapes."""
        if self._beside is None:
            return []
        stored, path = self._beside.tensors, self.hf / CARRIED_FILE
        tables = [self.family.carried_rows(self.config, layout) for layout in ("per_expert", "fused")]
        # It was copied as it lay in the source, whatever layout is asked for now.
        fitting = [table for table in tables if stored.keys() <= {str(row) for row in table}]
        rows = present_carried((fitting or tables)[0], stored.keys(), path)
        shapes = {piece.name: piece.tensor_shape for row in rows for piece in row.pieces}
        for name, info in stored.items():
            if shapes.get(name) != info.shape:
                raise InputError(
                    f"{name} is not what a checkpoint of this model carries",
                    where=path,
                    value=list(info.shape),
                    rule=f"shape {list(shapes[name])}" if name in shapes else "no such tensor",
                )
        return rows

    def _find_blocks(self) -> dict[str, StoredBlock]:
        """Row -> where it is stored; every stored weight must belong to some row, and have its shape."""
        stored = {key for key in self.tensors.tensors if not _NOT_WEIGHTS.search(key)}
        num_layers = self.config["num_hidden_layers"]
        blocks, missing = {}, []
        for row in self.rows:
            block = find_block(row, stored, num_layers)
            if block is None:
                missing.append(str(row))
                continue
            blocks[str(row)] = block
            self._check_shape(row, block)
        for key in {block.key for block in blocks.values()}:
            self.tensors.require_complete(key)
        for names, problem in ((missing, "missing"), (stored - {block.key for block in blocks.values()}, "unexpected")):
            if names:
                raise InputError(
                    f"{len(names)} tensors are {problem}, the first is {min(names)}",
                    where=self.folder,
                    rule=f"exactly the tensors of {self.family.name} with {self.hf.name}/config.json",
                    fix=_fix(min(names)),
                )
        return blocks

    def _check_shape(self, row: WeightRow, block: StoredBlock) -> None:
        size, expected = tuple(self.tensors.tensors[block.key].size), (*block.extent, *row.shape)
        padded = row.padded and size[0] > expected[0] and size[1:] == expected[1:]
        if size != expected and not padded:
            raise InputError(
                f"{block.key} has the wrong shape",
                where=self.folder,
                value=list(size),
                rule=f"{list(expected)} by {self.hf.name}/config.json",
            )


def _locate(path: Path, iteration: int | None) -> tuple[Path, Path]:
    """The checkpoint folder, and the folder in it that is meant."""
    if iteration is None and _CHECKPOINT.fullmatch(path.name) and not os.path.exists(path / TRACKER):
        folder, path = path, path.parent
    else:
        if not os.path.isdir(path):
            raise InputError("no such folder", where=path, rule="a Megatron checkpoint folder")
        folder = latest_checkpoint_dir(path) if iteration is None else iteration_dir(path, iteration)
        if iteration == 0 and not folder.is_dir():
            folder = path / RELEASE
    if not os.path.isdir(folder):
        raise InputError("no such folder", where=folder, rule="the checkpoint that was asked for")
    return path, folder


def _iteration_of(folder: Path) -> int:
    return 0 if folder.name == RELEASE else int(folder.name.removeprefix("iter_"))


def _fix(name: str) -> str:
    if name.startswith("mtp."):
        return "save it without multi-token prediction layers: they are not converted from Megatron's form"
    return ""
