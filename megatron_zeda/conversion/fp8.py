"""FP8 weights of an export: experts and attention in blocks of 128 x 128, everything else in its own precision.

The layout is the one that DeepSeek-V3 and Qwen's FP8 checkpoints have and that vLLM, SGLang and transformers read
(``quant_method`` ``fp8`` with a ``weight_block_size``): a matrix ``NAME.weight`` in E4M3 and beside it
``NAME.weight_scale_inv``, a float32 factor for every block. Activations are quantised by the engine while it runs, so
nothing has to be calibrated. nvidia-modelopt computes the numbers.

Routers, norms, embeddings, the head and what joins a drafting layer to the model stay as they are. So do matrices that
are no whole number of blocks, and those that engines fuse with them: a scale that covers a part of a block is read in
different ways. A zero expert has no matrix, and nothing is written for it.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from megatron_zeda.conversion.checks import require_finite
from megatron_zeda.conversion.formats import ExportSource, FormatView, require_named_experts
from megatron_zeda.errors import InputError, ZedaError
from megatron_zeda.models import HfConfig, HfPiece, WeightRow, method_of
from megatron_zeda.models.hf_config import where_of

BLOCK = 128
SCALE_SUFFIX = "_scale_inv"
"""What follows the name of a weight in the name of its scales."""
FP8 = torch.float8_e4m3fn

_LARGEST = torch.finfo(FP8).max
_MATRIX = re.compile(r"\.(?:self_attn|mlp)\.(?:.*\.)?(?P<name>\w+_proj(?:_with_mqa)?)\.weight$")
_FUSED = ({"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"}, {"q_a_proj", "kv_a_proj_with_mqa"})
"""What engines keep in one matrix, so that it is quantised together or not at all."""
_LAYOUT = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}


def scale_of(piece: HfPiece) -> HfPiece:
    """The scales of a matrix ``[M, N]``: ``[M / 128, N / 128]``, rounded up."""
    rows, columns = piece.shape
    return HfPiece(piece.name + SCALE_SUFFIX, (-(-rows // BLOCK), -(-columns // BLOCK)))


def is_fp8_layout(hf_config: Mapping[str, Any]) -> bool:
    """Whether ``config.json`` announces weights as this module writes them."""
    settings = hf_config.get("quantization_config")
    return isinstance(settings, dict) and {key: settings.get(key) for key in _LAYOUT} == _LAYOUT


def dequantize(weight: Tensor, scales: Tensor) -> Tensor:
    """``[M, N]`` E4M3 and its scales ``[M / 128, N / 128]`` (rounded up) -> ``[M, N]`` in float32."""
    spread = scales.float().repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    return weight.float() * spread[: weight.shape[0], : weight.shape[1]]


def quantize(weight: Tensor, where: object) -> tuple[Tensor, Tensor]:
    """Quantise one matrix with nvidia-modelopt.

    Args:
        weight: ``[M, N]``, both multiples of 128.
        where: for messages.

    Returns:
        ``[M, N]`` in E4M3 and ``[M / 128, N / 128]`` in float32: the largest value of a block becomes 448.

    Raises:
        InputError: if nvidia-modelopt is not installed.
        ZedaError: if a value is farther from what it was than rounding to E4M3 takes it.
    """
    tensor_class, block_amax = _modelopt()
    values = weight.float()
    blocks = {-1: BLOCK, -2: BLOCK}
    # A block of zeros, or of values below what float32 can divide, would get a scale of 0.
    scales = (block_amax(values, blocks) / _LARGEST).clamp(min=torch.finfo(torch.float32).tiny)
    quantized = tensor_class.quantize(values, scales, block_sizes=blocks)[0]._quantized_data.contiguous()
    error = (dequantize(quantized, scales) - values).abs_()
    # Half a step: 2^-4 of a value, and of the smallest ones 2^-10 of the scale. The rest is float32's own rounding.
    step = scales.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1) * 2.0**-10
    if not (error <= torch.maximum(values.abs() * 2.0**-4, step) * (1 + 1e-5)).all():
        raise ZedaError("quantised values are not the weights rounded to FP8", where=str(where))
    return quantized, scales


def fp8_view(view: FormatView, source: ExportSource) -> FormatView:
    """What an export in FP8 holds.

    Args:
        view: the export in the precision of the source, in the ``zeda`` form.
        source: what ``view`` shows, opened in the ``per_expert`` layout.

    Raises:
        InputError: for another form, method copy, stacked experts, and experts that are no whole number of blocks.
    """
    if view.format != "zeda":
        raise InputError(
            f"{view.format} is not quantised",
            where="--quantize",
            value="fp8",
            rule={
                "dense-zeros": "the blocks of its all-zero experts have no scale",
                "vllm-mone": "vLLM substitutes constants for unquantised experts only",
            }[view.format],
            fix="export as zeda",
        )
    if method_of(view.config) == "copy":
        raise InputError(
            "an FP8 export of method copy would be another model",
            where="--quantize",
            value="fp8",
            rule="transformers puts FP8 experts of its own in, which know no identity experts",
            fix="export it without --quantize",
        )
    _modelopt()
    require_named_experts(source, "an FP8 export")
    pieces = [piece for row in [*view.rows, *view.carried] for piece in row.pieces]
    matrices = _to_quantize(pieces, view.config)
    values = _Values(view, matrices)
    config = HfConfig(view.config, where=where_of(view.config))
    kept = [piece.name.removesuffix(".weight") for piece in pieces if len(piece.shape) == 2 and piece not in matrices]
    config["quantization_config"] = {**_LAYOUT, "fmt": "e4m3", "modules_to_not_convert": kept}
    weight_of = {scale_of(piece): piece for piece in matrices}
    types = dict.fromkeys(matrices, FP8) | dict.fromkeys(weight_of, torch.float32)
    return FormatView(
        view.format,
        config,
        _with_scales(view.rows, matrices),
        _with_scales(view.carried, matrices),
        source,
        read=values.read,
        origin=lambda piece: weight_of.get(piece, piece),
        dtypes=types,
        files=view.files,
    )


class _Values:
    """Quantised matrices and their scales, each matrix quantised once if its scales are asked for right after it."""

    def __init__(self, view: FormatView, matrices: Iterable[HfPiece]) -> None:
        self._view = view
        self._matrices = {name: piece for piece in matrices for name in (piece.name, scale_of(piece).name)}
        self._last: tuple[HfPiece, Tensor, Tensor] | None = None

    def read(self, piece: HfPiece) -> Tensor:
        matrix = self._matrices.get(piece.name)
        if matrix is None:
            return self._view.read(piece)
        if self._last is None or self._last[0] != matrix:
            weight, where = self._view.read(matrix), self._view.where(matrix)
            require_finite(weight, matrix, where)
            self._last = (matrix, *quantize(weight, where))
        return self._last[1] if piece == matrix else self._last[2]


def _to_quantize(pieces: Iterable[HfPiece], config: dict[str, Any]) -> dict[HfPiece, None]:
    """The matrices of experts, dense blocks and attention, in order, but for those that are no whole blocks."""
    found = {piece: match["name"] for piece in pieces if (match := _MATRIX.search(piece.name))}
    odd = {piece: name for piece, name in found.items() if any(size % BLOCK for size in piece.shape)}
    expert = next((piece for piece in odd if ".experts." in piece.name), None)
    if expert is not None:
        raise InputError(
            f"{expert.name} is no whole number of blocks",
            where=where_of(config),
            value=list(expert.shape),
            rule=f"multiples of {BLOCK}",
            fix="export it without --quantize",
        )
    left = {_stem(piece, name) + other for piece, name in odd.items() for other in _fused_with(name)}
    return {piece: None for piece, name in found.items() if _stem(piece, name) + name not in left}


def _stem(piece: HfPiece, name: str) -> str:
    return piece.name.removesuffix(f"{name}.weight")


def _fused_with(name: str) -> set[str]:
    return next((group for group in _FUSED if name in group), {name})


def _with_scales(rows: Iterable[WeightRow], matrices: Mapping[HfPiece, None]) -> list[WeightRow]:
    """The rows with those of the matrices taken apart: each matrix, then its scales."""
    found: list[WeightRow] = []
    for row in rows:
        if row.pieces[0] not in matrices:
            found.append(row)
            continue
        for piece in row.pieces:
            found += [WeightRow(part.name, (part,)) for part in (piece, scale_of(piece))]
    return found


def _modelopt() -> tuple[Any, Any]:
    """nvidia-modelopt's FP8 tensor and its largest absolute value of blocks."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about versions of libraries that are not used here
            from modelopt.torch.quantization.qtensor import FP8QTensor
            from modelopt.torch.quantization.utils import reduce_block_amax
    except ImportError as error:
        raise InputError(
            f"nvidia-modelopt cannot be imported ({error})",
            where="--quantize",
            value="fp8",
            fix="pip install 'megatron-zeda[quant]'",
        ) from None
    return FP8QTensor, reduce_block_amax
