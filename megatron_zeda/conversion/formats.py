"""The forms in which a dynamic model is exported: what each must hold, computed from a source piece by piece.

``zeda``         the reference layout and the default: N real experts, routers of N + Z rows, the ``zce_*`` keys and the
                 modelling code. The only form from which training, importing and every engine's plugin go on.
``dense-zeros``  zero experts written out as all-zero real experts under the stock architecture: loads anywhere.
``vllm-mone``    the N real experts and one constant vector of zeros per zero expert, under the stock architecture: vLLM
                 0.33 and newer substitute constants for experts by themselves.

A view answers like a checkpoint folder does (``rows``, ``carried``, ``read``, ``dtype``), so one writer and one
verification serve all forms. See ``docs/export_formats.md`` for what each costs and saves.

Names: N real experts, Z zero experts, H hidden size.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import torch

from megatron_zeda.errors import InputError
from megatron_zeda.models import ExpertLayout, Family, HfConfig, HfPiece, WeightRow, method_of
from megatron_zeda.models.hf_config import METHOD_KEYS, ZERO_EXPERT_KEYS, where_of, zero_logit_bias
from megatron_zeda.models.rows import NEVER_SELECTED

ExportFormat = Literal["zeda", "dense-zeros", "vllm-mone"]
FORMATS: tuple[ExportFormat, ...] = get_args(ExportFormat)
ZEDA_OVERRIDES_FILE = "zeda_hf_overrides.json"
"""Beside a ``vllm-mone`` export: the keys that make the same weights a ``zeda`` checkpoint (for vLLM's plugin)."""

SAVES: dict[ExportFormat, str] = {
    "zeda": "transformers with the bundled modelling code computes no skipped slot",
    "dense-zeros": "nothing: every slot is computed, and the weights are larger than the static model's",
    "vllm-mone": "decoding reads fewer experts; every slot still takes part in the matrix products of prefill",
}
"""What serving each form saves."""

_EXPERT = re.compile(r"^(?P<layer>.*\.experts\.)(?P<expert>\d+)(?P<rest>\..*)$")
_CONSTANT = "{layer}{expert}.approx_value"


class ExportSource(Protocol):
    """A checkpoint that can be exported: a Megatron folder, or a Hugging Face folder in the ``zeda`` form."""

    family: Family
    config: HfConfig
    layout: ExpertLayout
    rows: list[WeightRow]
    carried: list[WeightRow]

    def read(self, piece: HfPiece) -> torch.Tensor:
        """One piece."""
        ...

    def dtype(self, piece: HfPiece) -> torch.dtype:
        """Its type."""
        ...

    def where(self, piece: HfPiece) -> Path:
        """The file or folder it comes from, for error messages."""
        ...


class FormatView:
    """What an export holds: tensors, ``config.json`` and the small files beside it.

    Attributes:
        format: which form.
        rows: its tensors. The keys of rows that no Megatron tensor stands for are the tensors' own names.
        carried: tensors beside the model, of those the source has.
        config: its ``config.json``.
        files: name -> JSON object to write beside the weights.
    """

    def __init__(
        self,
        format: ExportFormat,
        config: HfConfig,
        rows: list[WeightRow],
        carried: list[WeightRow],
        source: ExportSource,
        *,
        read: Callable[[HfPiece], torch.Tensor] | None = None,
        origin: Callable[[HfPiece], HfPiece] | None = None,
        dtypes: Mapping[HfPiece, torch.dtype] | None = None,
        files: dict[str, dict[str, Any]] | None = None,
    ) -> None:
        """Put a view together; :func:`view_as` makes the known ones.

        Args:
            format: which form.
            config: ``config.json``.
            rows: tensors.
            carried: tensors beside the model.
            source: where they come from.
            read: gives a piece; by default the source does.
            origin: the source's piece that a piece is made of, or that it has its type from; by default itself.
            dtypes: types of pieces that have another one than their origin.
            files: JSON files.
        """
        self.format, self.config, self.rows, self.carried = format, config, rows, carried
        self.files = files or {}
        self._source, self._read = source, read or source.read
        self._origin, self._dtypes = origin or (lambda piece: piece), dtypes or {}

    def read(self, piece: HfPiece) -> torch.Tensor:
        """One piece."""
        return self._read(piece)

    def dtype(self, piece: HfPiece) -> torch.dtype:
        """Its type."""
        return self._dtypes.get(piece) or self._source.dtype(self._origin(piece))

    def where(self, piece: HfPiece) -> Path:
        """The file or folder of the source that it comes from, for error messages."""
        return self._source.where(self._origin(piece))

    @property
    def notes(self) -> list[str]:
        """What those who load this form compute otherwise than the model."""
        return stock_notes(self._source.family, self.config, self.format)

    @property
    def num_bytes(self) -> int:
        """Size of all tensors."""
        pieces = [piece for row in [*self.rows, *self.carried] for piece in row.pieces]
        return sum(torch.Size(piece.shape).numel() * self.dtype(piece).itemsize for piece in pieces)


def view_as(source: ExportSource, format: str = "zeda", *, interleave: bool = False) -> FormatView:
    """See a checkpoint in an export form.

    Args:
        source: what to export; for ``vllm-mone`` opened in the ``per_expert`` layout.
        format: one of :data:`FORMATS`.
        interleave: ``dense-zeros`` only: spread the zero experts evenly among the real ones, so that engines which give
            each expert-parallel rank a contiguous range of experts load all ranks alike.

    Raises:
        InputError: for an unknown form, a static checkpoint in another form than ``zeda``, and a dial that the form
            cannot carry.
    """
    if format not in FORMATS:
        raise InputError("unknown export format", where="--format", value=format, rule=f"one of {', '.join(FORMATS)}")
    if interleave and format != "dense-zeros":
        raise InputError(
            "experts cannot be interleaved in this format",
            where="--interleave",
            value=format,
            rule="only dense-zeros has experts to interleave",
        )
    if format == "zeda":
        return _zeda(source)
    if not source.family.num_zero_experts(source.config):
        raise InputError(
            "the checkpoint is static: it has no zero experts to write",
            where=where_of(source.config),
            value=format,
            fix="export it without --format",
        )
    _check_method(source, format)
    _check_dial(source, format)
    return _dense_zeros(source, interleave) if format == "dense-zeros" else _vllm_mone(source)


def expert_order(num_experts: int, num_zero_experts: int, *, interleave: bool) -> list[int]:
    """Which expert stands where in ``dense-zeros``: real ones are 0 ... N - 1, zero ones N ... N + Z - 1.

    Interleaved, every stretch of the order has its share of zero experts, give or take one.
    """
    real = [((index + 0.5) / num_experts, index) for index in range(num_experts)]
    zero = [((index + 0.5) / num_zero_experts, num_experts + index) for index in range(num_zero_experts)]
    return [expert for _, expert in (sorted(real + zero) if interleave else real + zero)]


def stock_notes(family: Family, config: dict[str, Any], format: ExportFormat) -> list[str]:
    """What those who load an export in this form compute otherwise than the model, a clause each.

    Forms under the stock architecture run in code that does not read the keys of this project. ``vllm-mone`` loads in
    vLLM only.
    """
    if format == "zeda":
        return []
    found = family.stock_differences(config)
    return [text for reader, text in found.items() if format == "dense-zeros" or reader == "vLLM"]


def stock_config(family: Family, config: dict[str, Any], num_experts: int) -> HfConfig:
    """A configuration of the stock architecture with this many experts, every trace of zero experts removed."""
    stock = HfConfig(config, where=where_of(config))
    for key in (*ZERO_EXPERT_KEYS, *METHOD_KEYS, "zeda_zero_logit_bias", "auto_map", *family.num_experts_keys):
        stock.pop(key, None)
    stock[family.num_experts_keys[0]] = num_experts
    stock.update(architectures=[family.static_architecture], model_type=family.model_types[0])
    return stock


def _zeda(source: ExportSource) -> FormatView:
    zero = source.family.num_zero_experts(source.config)
    if zero:
        config = source.family.make_dynamic(source.config, zero)
    elif source.family.needs_modeling_code(source.config):
        config = source.family.make_skipping(source.config)
    else:
        config = HfConfig(source.config, where="config.json")
    return FormatView("zeda", config, source.rows, source.carried, source)


def _check_method(source: ExportSource, format: str) -> None:
    """An all-zero expert takes its weight along and returns nothing: what these two methods do, it does not."""
    for method, rule in (
        ("adamoe", "the stock router does not give the weight of zero experts to the real ones"),
        ("copy", "the stock architecture has no experts that return their input"),
    ):
        if method_of(source.config) == method:
            raise InputError(
                f"{format} cannot express method `{method}`",
                where=where_of(source.config),
                rule=rule,
                fix="export as zeda",
            )


def _check_dial(source: ExportSource, format: str) -> None:
    """The stock router of a family with a selection bias adds it to the scores; others have no place for a dial."""
    if zero_logit_bias(source.config) and not any(_is_selection_bias(row) for row in source.rows):
        raise InputError(
            f"`zeda_zero_logit_bias` is not 0, and {format} has no place for it",
            where=where_of(source.config),
            value=source.config["zeda_zero_logit_bias"],
            rule=f"the stock router of {source.family.name} adds nothing to its logits",
            fix="export as zeda, or set the key to 0",
        )


def _is_selection_bias(row: WeightRow) -> bool:
    return row.grow is not None and len(row.shape) == 1


def _dial_pieces(source: ExportSource) -> set[HfPiece]:
    """Tensors to which the dial is added. Not those of a carried layer: its zero experts are never selected."""
    return {piece for row in source.rows if _is_selection_bias(row) for piece in row.pieces}


def _with_dial(bias: torch.Tensor, num_experts: int, dial: float) -> torch.Tensor:
    if dial:
        bias = bias.clone()
        bias[num_experts:] = (bias[num_experts:].float() + dial).clamp(min=NEVER_SELECTED).to(bias.dtype)
    return bias


def _dense_zeros(source: ExportSource, interleave: bool) -> FormatView:
    """Every piece of the wider table comes from a piece of the source, moved, widened or replaced by zeros."""
    family, real = source.family, source.family.num_experts(source.config)
    zero = family.num_zero_experts(source.config)
    order = expert_order(real, zero, interleave=interleave)
    permutation, dial = torch.tensor(order), zero_logit_bias(source.config)
    config = stock_config(family, source.config, real + zero)
    rows_of = {(piece.name, piece.slot): row for row in [*source.rows, *source.carried] for piece in row.pieces}
    pieces_of = {(piece.name, piece.slot): piece for row in rows_of.values() for piece in row.pieces}
    biased = _dial_pieces(source)

    def origin(piece: HfPiece) -> tuple[tuple[str, int | None], bool]:
        """Where a piece comes from, and whether it belongs to a zero expert: then a real one that looks like it."""
        match = _EXPERT.match(piece.name)
        position = int(match["expert"]) if match else piece.slot
        if position is None:
            return (piece.name, None), False
        expert, is_zero = order[position], order[position] >= real
        if match:
            return (f"{match['layer']}{0 if is_zero else expert}{match['rest']}", None), is_zero
        return (piece.name, 0 if is_zero else expert), is_zero

    def read(piece: HfPiece) -> torch.Tensor:
        key, is_zero = origin(piece)
        found = pieces_of[key]
        if is_zero:
            return torch.zeros(piece.shape, dtype=source.dtype(found))
        tensor = source.read(found)
        if found in biased:
            tensor = _with_dial(tensor, real, dial)
        elif tuple(tensor.shape) != piece.shape:  # stacked experts that travel as one tensor
            tensor = torch.cat([tensor, tensor.new_zeros(zero, *tensor.shape[1:])])
        elif rows_of[key].grow is None:
            return tensor
        return tensor[permutation] if interleave else tensor

    carried = family.carried_rows(config, source.layout)
    carried = [row for row in carried if all(origin(piece)[0] in pieces_of for piece in row.pieces)]
    rows = family.weight_table(config, source.layout)
    return FormatView(
        "dense-zeros", config, rows, carried, source, read=read, origin=lambda piece: pieces_of[origin(piece)[0]]
    )


def _vllm_mone(source: ExportSource) -> FormatView:
    family, real = source.family, source.family.num_experts(source.config)
    zero, dial = family.num_zero_experts(source.config), zero_logit_bias(source.config)
    require_named_experts(source, "vllm-mone")
    constants = _constants([*source.rows, *source.carried], real, zero, source.config["hidden_size"])
    like = {constant: piece for constant, (piece, _) in constants.items()}
    config = stock_config(family, source.config, real + zero)
    config["approximate_experts"] = {
        layer: list(range(real, real + zero)) for layer in dict.fromkeys(layer for _, layer in constants.values())
    }
    overrides = family.make_dynamic(HfConfig(source.config, where="config.json"), zero)
    overrides["zeda_zero_logit_bias"] = 0.0  # it is in the selection bias now
    changed = {key: value for key, value in overrides.items() if config.get(key) != value}
    biased = _dial_pieces(source)

    def read(piece: HfPiece) -> torch.Tensor:
        if piece in like:
            return torch.zeros(piece.shape, dtype=source.dtype(like[piece]))
        tensor = source.read(piece)
        return _with_dial(tensor, real, dial) if piece in biased else tensor

    rows = [*source.rows, *(WeightRow(piece.name, (piece,)) for piece in constants)]
    files = {ZEDA_OVERRIDES_FILE: {**changed, "approximate_experts": None}}
    return FormatView(
        "vllm-mone",
        config,
        rows,
        source.carried,
        source,
        read=read,
        origin=lambda piece: like.get(piece, piece),
        files=files,
    )


def require_named_experts(source: ExportSource, what: str) -> None:
    """Refuse experts that lie stacked in one tensor, for what names every expert."""
    if source.layout != "per_expert":
        raise ValueError(f"{what} is written in the per_expert layout: open the source so")
    stacked = [row.key for row in source.carried if row.key.endswith((".experts.gate_up_proj", ".experts.down_proj"))]
    if stacked:
        raise InputError(
            f"the experts of {stacked[0]} are stacked in one tensor",
            where=where_of(source.config),
            rule=f"{what} names every expert",
            fix="export as zeda or dense-zeros, not quantised",
        )


def _constants(
    rows: Iterable[WeightRow], num_experts: int, num_zero_experts: int, hidden: int
) -> dict[HfPiece, tuple[HfPiece, str]]:
    """The constant of every zero expert -> (a piece whose type it shares, its layer's number)."""
    layers: dict[str, HfPiece] = {}
    for row in rows:
        for piece in row.pieces:
            match = _EXPERT.match(piece.name)
            if match:
                layers.setdefault(match["layer"], piece)
    found: dict[HfPiece, tuple[HfPiece, str]] = {}
    for prefix, like in layers.items():
        (number,) = re.findall(r"\.(\d+)\.", prefix)
        for expert in range(num_experts, num_experts + num_zero_experts):
            found[HfPiece(_CONSTANT.format(layer=prefix, expert=expert), (hidden,))] = (like, number)
    return found


def as_zeda(family: Family, config: HfConfig) -> tuple[HfConfig, list[HfPiece]]:
    """Read a ``vllm-mone`` configuration as that of the ``zeda`` checkpoint with the same weights.

    Args:
        family: its family.
        config: a ``config.json`` of any form.

    Returns:
        The configuration in the ``zeda`` form, and the constants that must lie beside the weights, all zero. Anything
        but ``vllm-mone`` comes back as it is, without constants.

    Raises:
        InputError: if experts are substituted in another way than this project's exports do.
    """
    substituted = config.get("approximate_experts")
    if substituted is None:
        return config, []
    total, where = family.num_experts(config), where_of(config)
    rule = "in every layer the same last experts, as --format vllm-mone writes it"
    lists = list(substituted.values()) if isinstance(substituted, dict) else []
    zero = len(lists[0]) if lists and isinstance(lists[0], list) else 0
    real = total - zero
    if zero < 1 or real < 2 or any(experts != list(range(real, total)) for experts in lists):
        raise InputError("`approximate_experts` is not supported", where=where, value=substituted, rule=rule)
    stock = stock_config(family, config, real)
    del stock["approximate_experts"]
    zeda = family.make_dynamic(stock, zero)
    tables = [*family.weight_table(zeda), *family.carried_rows(zeda)]
    constants = _constants(tables, real, zero, zeda["hidden_size"])
    possible = {layer for _, layer in constants.values()}
    needed = {layer for _, layer in _constants(family.weight_table(zeda), real, zero, 1).values()}
    if not needed <= set(substituted) <= possible:
        raise InputError("`approximate_experts` is not supported", where=where, value=sorted(substituted), rule=rule)
    return zeda, [piece for piece, (_, layer) in constants.items() if layer in substituted]
