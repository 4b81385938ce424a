"""Static Hugging Face checkpoint -> dynamic one: every router grows by Z rows, nothing else changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megatron_zeda.conversion.background import SourceHashes
from megatron_zeda.conversion.dry_run import dry_run
from megatron_zeda.conversion.folders import OutputFolder
from megatron_zeda.conversion.hf_folder import HfFolder, copy_side_files, present_carried, write_config
from megatron_zeda.conversion.hf_writer import DEFAULT_SHARD_BYTES, file_sizes, plan_files, write_hf
from megatron_zeda.conversion.manifest import make_manifest, make_plan
from megatron_zeda.conversion.origins import known_hashes
from megatron_zeda.errors import InputError
from megatron_zeda.models import HfPiece, load_hf_config
from megatron_zeda.models.registry import family_for


def inject_zero_experts(
    input: str | Path,
    output: str | Path,
    *,
    num_zero_experts: int | None = None,
    seed: int = 0,
    init: str = "gaussian",
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    plan_only: bool = False,
) -> dict[str, Any]:
    """Write a dynamic copy of a static checkpoint, complete with configuration, modelling code and tokenizer.

    Every weight is read back from the disk and compared with what the source gave before the folder becomes visible.
    An interrupted run is continued by the same call.

    Args:
        input: static Hugging Face folder.
        output: folder to create.
        num_zero_experts: Z; by default half the number of experts.
        seed: seed of the new router rows and selection biases.
        init: how they come about, see :data:`megatron_zeda.zero_experts.injection.INITS`.
        shard_bytes: largest weight file to write, if the source has several.
        plan_only: write nothing, and return what :func:`megatron_zeda.conversion.dry_run.dry_run` does.

    Returns:
        The manifest that was written.

    Raises:
        InputError: for an input that is not a good static checkpoint, or an output that exists.
        ZedaError: if the disk is full.
    """
    from megatron_zeda.zero_experts.injection import INITS

    config = load_hf_config(input)
    if family_for(config).is_dynamic(config):
        raise _injected_already(input)
    with HfFolder(input) as source:
        if source.num_zero_experts:  # in another form
            raise _injected_already(input)
        zero = source.family.num_experts(config) // 2 if num_zero_experts is None else num_zero_experts
        if type(zero) is not int or zero < 1:
            raise InputError(
                "the number of zero experts is wrong", where="--num-zero-experts", value=zero, rule="positive"
            )
        if init not in INITS:
            raise InputError("unknown initialisation", where="--init", value=init, rule=f"one of {', '.join(INITS)}")
        dynamic = source.family.make_dynamic(config, zero)
        source.family.validate(dynamic)
        view = _Injected(source, dynamic, seed, init)
        files = source.source_files()
        limit = shard_bytes if source.reader.sharded else None
        if plan_only:
            return dry_run(view, output, files.values(), file_sizes(plan_files(view, limit)))
        plan = make_plan("inject", files, num_zero_experts=zero, seed=seed, init=init, shard_bytes=limit)
        with OutputFolder(output, plan=plan) as out, SourceHashes(files, known_hashes(source.path)) as hashes:
            source.watch(hashes.passed)
            written = write_hf(view, out, shard_bytes=limit, what="inject")
            write_config(out.partial, dynamic, source.family)
            copy_side_files(source.path, out.partial)
            HfFolder(out.partial).close()  # configuration, table, index and headers agree
            out.manifest = make_manifest(
                source,
                files=hashes.result(),
                tool="inject_zero_experts",
                num_zero_experts=zero,
                injection_seed=seed,
                injection_init=init,
                expert_layout=source.layout,
                **written,
            )
    return out.manifest


def _injected_already(where: str | Path) -> InputError:
    return InputError(
        "zero experts were injected already", where=where, fix="start from the static checkpoint it was made from"
    )


class _Injected:
    """What the result must hold, computed from the source whenever it is asked for.

    Attributes:
        rows: the weight table of the dynamic model.
        grown: tensors that grow -> what draws their new rows.
    """

    def __init__(self, source: HfFolder, dynamic: dict[str, Any], seed: int, init: str) -> None:
        self.rows = source.in_order(source.family.weight_table(dynamic, source.layout))
        carried = source.family.carried_rows(dynamic, source.layout)
        self.carried = source.in_order(present_carried(carried, source.reader.tensors.keys(), source.path))
        rows = source.rows + source.carried
        self.grown = {piece.name: row.grow for row in rows for piece in row.pieces if row.grow is not None}
        self._source, self._seed, self._init = source, seed, init
        self._zero = source.family.num_zero_experts(dynamic)

    def read(self, piece: HfPiece) -> torch.Tensor:
        """One piece of the result."""
        tensor = self._source.reader.read(piece.name, piece.slot)
        grow = self.grown.get(piece.name)
        if grow is None:
            return tensor
        try:
            return torch.cat([tensor, grow(tensor, self._zero, seed=self._seed, name=piece.name, init=self._init)])
        except ValueError as error:
            raise InputError(str(error), where=self.where(piece)) from error

    def dtype(self, piece: HfPiece) -> torch.dtype:
        """Its type."""
        return self._source.dtype(piece)

    def where(self, piece: HfPiece) -> Path:
        """The file of the source that holds it."""
        return self._source.where(piece)
