"""Runs a checkpoint of any size on a few prompts: every layer's weights are read just before it computes and dropped
right after, so the memory needed is one layer and the hidden states.

A Hugging Face folder runs in transformers (dynamic ones with the modelling code of this package, never with code from
the folder), a Megatron folder in Megatron-Core's ``GPTModel``.

Shapes: B prompts, S positions, D hidden size, V vocabulary.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megatron_zeda import platform
from megatron_zeda.conversion.hf_folder import HfFolder, pieces_of
from megatron_zeda.conversion.megatron_io import MegatronFolder, drop_extra_state
from megatron_zeda.errors import InputError
from megatron_zeda.models import Family, HfConfig, HfPiece, build_gpt_model, build_transformer_config

Fill = Callable[[nn.Module, str], dict[str, Tensor]]
"""``fill(unit, prefix)``: the state dict of a part of the model, on the device and in the type it computes with."""


@dataclass
class States:
    """What a model computed.

    Attributes:
        hidden: after each layer, ``[B, S, D]``.
        logits: ``[B, S, V]`` in float32.
    """

    hidden: list[Tensor] = field(default_factory=list)
    logits: Tensor = field(default_factory=lambda: torch.empty(0))


def run_streamed(
    checkpoint: HfFolder | MegatronFolder, ids: Tensor, *, dtype: torch.dtype, dial: float | None
) -> States:
    """Run a checkpoint on ``ids [B, S]``.

    Prompts may be padded on the right: positions see what is left of them only, in every part of these models.

    Args:
        checkpoint: what to run.
        ids: token ids.
        dtype: to compute in; selection biases and routers keep float32.
        dial: ``zeda_zero_logit_bias`` instead of the checkpoint's; None leaves it.
    """
    config = HfConfig(checkpoint.config, where=checkpoint.config.where)
    if dial is not None and checkpoint.family.num_zero_experts(config):
        config["zeda_zero_logit_bias"] = dial
    device = platform.device()
    with torch.no_grad():
        if isinstance(checkpoint, MegatronFolder):
            return _run_megatron(checkpoint, config, ids.to(device), dtype)
        return _run_hf(checkpoint, config, ids.to(device), dtype, device)


# ---- transformers ---------------------------------------------------------------------------------------------------


def _run_hf(folder: HfFolder, config: HfConfig, ids: Tensor, dtype: torch.dtype, device: torch.device) -> States:
    model_class, hf_config = _hf_class(folder.family, config)
    with torch.device("meta"):
        model = model_class(hf_config).eval()
    model.model.rotary_emb = type(model.model.rotary_emb)(hf_config).to(device)  # a table, not a weight
    folder.family.adapt_stock_model(model, config)
    weights = _HfWeights(folder, dtype, device)
    units = {"model.embed_tokens.": model.model.embed_tokens}
    layers = {f"model.layers.{index}.": layer for index, layer in enumerate(model.model.layers)}
    units |= {**layers, "model.norm.": model.model.norm, "lm_head.": model.lm_head}
    states = States()
    with _streaming(units, weights, folder.path), _recording(list(layers.values()), states, lambda hidden: hidden):
        output = model(input_ids=ids, use_cache=False)
    states.logits = output.logits.float().cpu()
    return states


def _hf_class(family: Family, config: HfConfig) -> tuple[Any, Any]:
    import transformers

    native = {**config, "model_type": family.model_types[0]}
    native.pop("auto_map", None)
    hf_config = transformers.AutoConfig.for_model(**native)
    if family.needs_modeling_code(config):
        module = importlib.import_module(f"megatron_zeda.serving.{Path(family.modeling_files[0]).stem}")
        return getattr(module, family.dynamic_architecture), hf_config
    return getattr(transformers, family.static_architecture), hf_config


class _HfWeights:
    """State dicts of parts of a transformers model, from the pieces of a folder in either expert layout."""

    def __init__(self, folder: HfFolder, dtype: torch.dtype, device: torch.device) -> None:
        self._folder, self._dtype, self._device = folder, dtype, device
        self._pieces: dict[str, list[HfPiece]] = {}
        for piece in pieces_of(folder.rows):
            self._pieces.setdefault(piece.name, []).append(piece)
        self._biases = {
            piece.name for row in folder.rows for piece in row.pieces if row.grow is not None and len(piece.shape) == 1
        }

    def __call__(self, unit: nn.Module, prefix: str) -> dict[str, Tensor]:
        return {name: self._tensor(prefix + name, tuple(old.shape)) for name, old in unit.state_dict().items()}

    def _tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        if name == "lm_head.weight" and name not in self._pieces:
            name = "model.embed_tokens.weight"  # tied
        dtype = torch.float32 if name in self._biases else self._dtype
        if name in self._pieces and self._pieces[name][0].slot is None:
            return self._read(name).to(self._device, dtype)
        filled = torch.full(shape, torch.nan, dtype=dtype, device=self._device)
        for expert in range(shape[0]):
            if name in self._pieces:
                filled[expert] = self._folder.read(self._pieces[name][expert])
                continue
            experts, projection = name.rsplit(".", 1)
            parts = ("gate_proj", "up_proj") if projection == "gate_up_proj" else (projection,)
            filled[expert] = torch.cat([self._read(f"{experts}.{expert}.{part}.weight") for part in parts])
        return filled

    def _read(self, name: str) -> Tensor:
        (piece,) = self._pieces[name]
        return self._folder.read(piece)


# ---- Megatron-Core --------------------------------------------------------------------------------------------------


def _run_megatron(folder: MegatronFolder, config: HfConfig, ids: Tensor, dtype: torch.dtype) -> States:
    with _one_process():
        half: dict[str, Any] = (
            {} if dtype == torch.float32 else {"bf16": True, "params_dtype": dtype, "pipeline_dtype": dtype}
        )
        model_config = build_transformer_config(config, **half)
        with torch.device("meta"):
            model = build_gpt_model(config, model_config).eval()
        units = {"embedding.": model.embedding}
        layers = {f"decoder.layers.{index}.": layer for index, layer in enumerate(model.decoder.layers)}
        units |= {**layers, "decoder.final_layernorm.": model.decoder.final_layernorm}
        tied = model.share_embeddings_and_output_weights  # then the head uses the embedding's weights
        units |= {} if tied else {"output_layer.": model.output_layer}
        states = States()
        recording = _recording(list(layers.values()), states, lambda hidden: hidden.transpose(0, 1))
        weights = _MegatronWeights(folder, model, ids.device)
        with _streaming(units, weights, folder.folder, keep={"embedding."} if tied else set()), recording:
            positions = torch.arange(ids.shape[1], device=ids.device)[None].expand_as(ids)
            states.logits = model(ids, positions, None).float().cpu()
        return states


class _MegatronWeights:
    """State dicts of parts of a Megatron-Core model: its own sharded state dict says which block goes where."""

    def __init__(self, folder: MegatronFolder, model: Any, device: torch.device) -> None:
        self._folder, self._model, self._device = folder, model, device
        self._rows = {(row.key, row.index): row for row in folder.rows}
        self._axes = {row.key: len(row.index) for row in folder.rows}

    def __call__(self, unit: nn.Module, prefix: str) -> dict[str, Tensor]:
        from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace
        from megatron.core.dist_checkpointing.mapping import apply_factory_merges
        from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess

        unit.to_empty(device=self._device)  # blocks are cut along the model's real tensors
        state = drop_extra_state(self._model.sharded_state_dict())
        wanted = {name: entry for name, entry in state.items() if name.startswith(prefix)}
        wanted, _, factories = load_preprocess(wanted)
        loaded = apply_factory_merges(dict_list_map_inplace(self._read, wanted), factories)
        return {name.removeprefix(prefix): tensor for name, tensor in loaded.items()}

    def _read(self, shard: Any) -> Tensor:
        """The stored values of a ``ShardedTensor``."""
        axes = self._axes[shard.key]
        row = self._rows[shard.key, tuple(shard.global_offset[:axes])]
        block = row.packing.pack([self._folder.read(piece) for piece in row.pieces])
        for axis, (start, size) in enumerate(zip(shard.global_offset[axes:], shard.local_shape, strict=True)):
            block = block.narrow(axis, start, size)
        return block.to(self._device, shard.dtype)


@contextmanager
def _one_process() -> Iterator[None]:
    """Megatron-Core's process groups with one process in each, unless they are there."""
    platform.install()
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    group, megatron = not dist.is_initialized(), not parallel_state.model_parallel_is_initialized()
    if group:
        store = dist.HashStore()  # type: ignore[attr-defined]  # exported, but the stub does not say so
        dist.init_process_group(platform.backend(), rank=0, world_size=1, store=store)
    if megatron:
        parallel_state.initialize_model_parallel()
        model_parallel_cuda_manual_seed(0)
    try:
        yield
    finally:
        if megatron:
            parallel_state.destroy_model_parallel()
        if group:
            dist.destroy_process_group()


# ---- both -----------------------------------------------------------------------------------------------------------


@contextmanager
def _streaming(units: dict[str, nn.Module], fill: Fill, where: Path, *, keep: set[str] | None = None) -> Iterator[None]:
    """Give every part its weights when it is called, and take them away when it is done."""
    handles = []
    for prefix, unit in units.items():

        def load(module: nn.Module, args: Any, *, prefix: str = prefix) -> None:
            left = module.load_state_dict(fill(module, prefix), strict=False, assign=True)
            missing = [name for name in left.missing_keys if "_extra_state" not in name]
            if missing or left.unexpected_keys:
                raise RuntimeError(f"{prefix}: the weights do not fit the model: {missing} {left.unexpected_keys}")
            for name, tensor in module.state_dict().items():
                if isinstance(tensor, Tensor) and tensor.is_floating_point() and not tensor.isfinite().all():
                    raise InputError(f"{prefix}{name} has values that are not finite", where=where)

        def drop(module: nn.Module, args: Any, output: Any) -> None:
            module.to("meta")

        handles.append(unit.register_forward_pre_hook(load))
        if prefix not in (keep or ()):
            handles.append(unit.register_forward_hook(drop))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _recording(layers: list[nn.Module], states: States, view: Callable[[Tensor], Tensor]) -> Iterator[None]:
    def keep(module: nn.Module, args: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        states.hidden.append(view(hidden).float().cpu())

    handles = [layer.register_forward_hook(keep) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
