"""A Hugging Face checkpoint folder, seen through its family's weight table."""

from __future__ import annotations

import importlib.resources
import re
import shutil
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from megatron_zeda.conversion.folders import MANIFEST_FILE, write_json
from megatron_zeda.conversion.formats import as_zeda
from megatron_zeda.conversion.fp8 import FP8, dequantize, is_fp8_layout, scale_of
from megatron_zeda.conversion.safetensors_io import SafetensorsReader, check_inside
from megatron_zeda.errors import InputError
from megatron_zeda.models import ExpertLayout, Family, HfPiece, WeightRow, family_for, load_hf_config
from megatron_zeda.models.base import Grow
from megatron_zeda.models.hf_config import read_json_object

SIDE_FILES = (
    "tokenizer*",
    "*.model",
    "vocab.*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "additional_chat_templates/*.jinja",
    "generation_config.json",
    "LICENSE*",
    "NOTICE*",
)
"""What travels with the weights: tokenizer, chat template, generation settings, licence. Never code, never pickles."""

CONVERTIBLE = (None, "zeda", "vllm-mone")
"""Export forms in which zero experts can be told from real ones."""

CARRIED_FILE = "carried.safetensors"
"""Where a Megatron folder keeps tensors beside the model, in its ``hf`` folder."""


class HfFolder:
    """A checked Hugging Face checkpoint: configuration, family, table and tensors that agree with each other.

    A ``vllm-mone`` export is seen as the ``zeda`` checkpoint that it holds (:mod:`megatron_zeda.conversion.formats`).
    One in FP8 gives the values that its weights stand for, in float32 (:mod:`megatron_zeda.conversion.fp8`).

    Attributes:
        config: its configuration, in the ``zeda`` form, unquantised.
        fp8: whether some of its weights are in FP8.
        layout: how its experts lie on disk.
        rows: its weight table, in the order of its files.
        carried: tensors beside the model that it has, for instance a layer that only drafts; empty if it has none.
    """

    def __init__(self, path: str | Path) -> None:
        """Open and check a folder.

        Raises:
            InputError: for a configuration or weights that are not what the family's table says.
        """
        self.path = Path(path)
        config = load_hf_config(path)
        self.fp8 = is_fp8_layout(config)
        if self.fp8:
            del config["quantization_config"]
        self.family: Family = family_for(config)
        self.config, self._constants = as_zeda(self.family, config)
        self.reader = SafetensorsReader(path, fp8=self.fp8)
        fused = self.family.fused_tensor_names(self.config) & self.reader.tensors.keys()
        self.layout: ExpertLayout = "fused" if fused else "per_expert"
        self.rows = self.family.weight_table(self.config, self.layout)
        self.carried = present_carried(
            self.family.carried_rows(self.config, self.layout), self.reader.tensors.keys(), self.path
        )
        self._widened = self._narrow_carried()
        self._check_tensors()
        self.rows, self.carried = self.in_order(self.rows), self.in_order(self.carried)

    @property
    def num_zero_experts(self) -> int:
        """Z; 0 for a static checkpoint."""
        return self.family.num_zero_experts(self.config)

    @property
    def export_format(self) -> str | None:
        """The form of an export of ours, by its manifest."""
        manifest = self.path / MANIFEST_FILE
        exported = read_json_object(manifest).get("exported") if manifest.is_file() else None
        return exported.get("export_format") if isinstance(exported, dict) else None

    def in_order(self, rows: Iterable[WeightRow]) -> list[WeightRow]:
        """Rows of this folder's tensors in the order in which they lie in its files."""
        return sorted(rows, key=lambda row: min(self.reader.place(piece.name, piece.slot) for piece in row.pieces))

    def watch(self, passed: Callable[[Path, int, memoryview], None]) -> None:
        """Call ``passed`` with the file, the offset and the bytes of all weights that are read from now on."""
        self.reader.disk.passed = passed

    def read(self, piece: HfPiece) -> torch.Tensor:
        """Read one piece of the table."""
        tensor, grow = self.reader.read(piece.name, piece.slot), self._widened.get(piece.name)
        if tensor.dtype == FP8:
            return dequantize(tensor, self.reader.read(scale_of(piece).name))
        if grow is None:
            return tensor
        return torch.cat([tensor, grow(tensor, self.num_zero_experts, seed=0, name=piece.name)])

    def dtype(self, piece: HfPiece) -> torch.dtype:
        """Its type on disk; float32 for what is in FP8 there."""
        dtype = self.reader.tensors[piece.name].dtype
        return torch.float32 if dtype == FP8 else dtype

    def where(self, piece: HfPiece) -> Path:
        """The file that holds a piece."""
        return self.reader.tensors[piece.name].file

    def source_files(self) -> dict[str, Path]:
        """What a conversion reads, name -> file: the configuration and the weights, in the order of the table.

        Raises:
            InputError: for an export in a form that is not a way back, or in FP8, and for a file that would travel
                with the weights and is a link that leads out of the folder.
        """
        self._require_a_form_to_convert()
        side_files(self.path)  # before anything is written
        order = {self.reader.tensors[piece.name].file: None for piece in pieces_of(self.rows + self.carried)}
        return {path.name: path for path in (self.path / "config.json", *order)}

    def close(self) -> None:
        """Close the files."""
        self.reader.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _require_a_form_to_convert(self) -> None:
        """Not ``dense-zeros``: there nothing tells the experts that were zero experts from the real ones."""
        if self.export_format not in CONVERTIBLE:
            raise InputError(
                f"an export in the {self.export_format} form, whose zero experts are written out as ordinary experts",
                where=self.path,
                rule=f"named by {MANIFEST_FILE}; the zeda and vllm-mone forms can be converted",
                fix="give the checkpoint it was exported from, or export that with --format zeda",
            )
        if self.fp8:
            raise InputError(
                "a quantised checkpoint, whose weights are rounded to FP8",
                where=self.config.where,
                rule="conversions are exact and start from unquantised weights",
                fix="give the checkpoint it was made from",
            )

    def _narrow_carried(self) -> dict[str, Grow]:
        """Carried tensors of a dynamic checkpoint that were never widened -> what widens them on reading.

        A tool that trains the model without its drafting layer and takes that from the static checkpoint afterwards
        leaves it so. What widens it keeps it from ever choosing a zero expert, so nothing changes.
        """
        narrow = {}
        for row in self.carried if self.num_zero_experts else []:
            (piece,) = row.pieces
            shape = self.reader.tensors[piece.name].shape
            if row.grow is not None and shape == (self.family.num_experts(self.config), *piece.shape[1:]):
                narrow[piece.name] = row.grow
        return narrow

    def _check_tensors(self) -> None:
        stored = self.reader.tensors
        rows = self.rows + self.carried
        expected = {piece.name: piece for piece in [*pieces_of(rows), *self._constants, *self._scales()]}
        for row in rows:
            for piece in row.pieces:
                if row.grow is not None and piece.name in stored and piece.name not in self._widened:
                    self._check_gate(piece)
        for names, problem in (
            (expected.keys() - stored.keys(), "missing"),
            (stored.keys() - expected.keys(), "unexpected"),
        ):
            if names:
                raise InputError(
                    f"{len(names)} tensors are {problem}, the first is {min(names)}",
                    where=self.path,
                    rule=f"exactly the tensors of {self.family.name} with this config.json",
                )
        for name, piece in expected.items():
            if stored[name].shape != piece.tensor_shape and name not in self._widened:
                raise InputError(
                    f"{name} has the wrong shape",
                    where=stored[name].file,
                    value=list(stored[name].shape),
                    rule=f"{list(piece.tensor_shape)} by config.json",
                )
        self._check_types()
        for piece in self._constants:
            if self.read(piece).count_nonzero():
                raise InputError(
                    f"{piece.name} is not zero",
                    where=self.where(piece),
                    rule="a constant that stands for an expert is zero: other ones are not supported",
                )

    def _scales(self) -> list[HfPiece]:
        """The scales that must lie beside matrices in FP8."""
        stored = self.reader.tensors
        found = [piece for piece in pieces_of(self.rows + self.carried) if piece.name in stored]
        return [scale_of(piece) for piece in found if stored[piece.name].dtype == FP8 and len(piece.shape) == 2]

    def _check_types(self) -> None:
        """All that becomes one Megatron tensor, and its namesakes in other layers, have one type."""
        groups: dict[str, list[HfPiece]] = {}
        for row in self.rows:
            groups.setdefault(re.sub(r"\d+", "N", row.key), []).extend(row.pieces)
        for pieces in groups.values():
            usual, _ = Counter(map(self.dtype, pieces)).most_common(1)[0]
            for piece in pieces:
                if self.dtype(piece) != usual:
                    raise InputError(
                        f"{piece} has another type than its siblings",
                        where=self.where(piece),
                        value=str(self.dtype(piece)),
                        rule=f"{usual}, as most of them have",
                    )

    def _check_gate(self, piece: HfPiece) -> None:
        """The two mistakes worth a message of their own: a router that was not widened, and one that already was."""
        shape, real = self.reader.tensors[piece.name].shape, self.family.num_experts(self.config)
        if not shape or shape[0] == piece.shape[0]:
            return
        path = self.reader.tensors[piece.name].file
        if self.num_zero_experts and shape[0] == real:
            raise InputError(
                f"{piece.name} was not widened",
                where=path,
                value=list(shape),
                rule=f"config.json announces {self.num_zero_experts} zero experts, so {piece.shape[0]} rows",
                fix="start from the static checkpoint and run inject_zero_experts.py",
            )
        if not self.num_zero_experts and shape[0] > real:
            raise InputError(
                f"{piece.name} has more rows than there are experts: zero experts were injected already",
                where=path,
                value=list(shape),
                rule=f"{real} rows by config.json",
                fix="restore the zce_* keys of config.json, or start from the static checkpoint",
            )


def present_carried(rows: Sequence[WeightRow], stored: Collection[str], where: Path) -> list[WeightRow]:
    """The carried rows that a checkpoint has: none, or all but the optional ones.

    Args:
        rows: what the family may carry, see :meth:`~megatron_zeda.models.Family.carried_rows`.
        stored: names of the tensors that are there.
        where: the folder or file, for messages.

    Raises:
        InputError: if only a part is there.
    """
    present = [row for row in rows if row.pieces[0].name in stored]
    missing = [row.pieces[0].name for row in rows if row.pieces[0].name not in stored and not row.optional]
    if present and missing:
        raise InputError(
            f"{len(missing)} carried tensors are missing, the first is {min(missing)}",
            where=where,
            rule="the layers that are carried beside the model are there completely or not at all",
            fix="download it again",
        )
    return present


def pieces_of(rows: Iterable[WeightRow]) -> list[HfPiece]:
    """All pieces of a table, in its order."""
    return [piece for row in rows for piece in row.pieces]


def side_files(source: Path) -> list[str]:
    """Names of tokenizer, chat template, generation settings and licence, if they are there.

    Raises:
        InputError: if one is a link that leads out of the folder.
    """
    found = []
    for pattern in SIDE_FILES:
        for path in sorted(source.glob(pattern)):
            name = str(path.relative_to(source))
            if not path.is_file() or path.suffix in (".py", ".pkl", ".bin", ".pt") or name in found:
                continue
            check_inside(path, source)
            found.append(name)
    return found


def copy_side_files(source: Path, target: Path) -> list[str]:
    """Copy :func:`side_files`; return their names."""
    names = side_files(source)
    for name in names:
        (target / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(source / name, target / name)
    return names


def write_config(target: Path, config: dict[str, Any], family: Family) -> None:
    """Write ``config.json``, and beside a dynamic one the modelling code it refers to."""
    write_json(target / "config.json", config)
    if family.needs_modeling_code(config):
        for name in family.modeling_files:
            code = importlib.resources.files("megatron_zeda.serving") / name
            (target / name).write_bytes(code.read_bytes())
