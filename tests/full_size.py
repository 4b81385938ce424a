"""Published models at real shapes, on the meta device: what stock transformers and Megatron-Core name and save."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

CONFIGS = Path(__file__).parent / "full_size_configs"
MODELS = sorted(path.stem for path in CONFIGS.glob("*.json"))


def full_size_config(name: str) -> dict[str, Any]:
    """The ``config.json`` of a published model: name of a file in ``full_size_configs`` without its ending."""
    return dict(json.loads((CONFIGS / f"{name}.json").read_text()))


class FullSizeSource:
    """A dynamic checkpoint at its published shape, without any weight."""

    layout = "per_expert"

    def __init__(self, name: str) -> None:
        from megatron_zeda.models.registry import family_for

        static = full_size_config(name)
        self.family = family_for(static)
        self.config = self.family.make_dynamic(static, self.family.num_experts(static) // 2)
        self.rows, self.carried = (table(self.config) for table in (self.family.weight_table, self.family.carried_rows))

    def dtype(self, piece: Any) -> torch.dtype:
        return torch.float32 if piece.name.endswith("e_score_correction_bias") else torch.bfloat16

    def read(self, piece: Any) -> torch.Tensor:
        raise NotImplementedError

    where = read


def stock_shapes(hf_config: dict[str, Any], layout: str = "per_expert") -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor that stock transformers saves for a static configuration.

    ``per_expert`` is what ``save_pretrained`` writes, by transformers' own mapping; ``fused`` is what is in memory.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.core_model_loading import revert_weight_conversion

    config = AutoConfig.for_model(**{key: value for key, value in hf_config.items() if key != "architectures"})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    state = dict(model.state_dict())
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    if layout == "per_expert":
        state = revert_weight_conversion(model, state)
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


Block = tuple[str, tuple[int, ...], tuple[int, ...], tuple[int, ...]]
"""Key, global shape, offset and shape (stacked axes included) of a part of a tensor in a distributed checkpoint."""


def saved_blocks(model: Any) -> list[Block]:
    """What this process writes of a model into a distributed checkpoint: the blocks of which it is the main replica."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories, is_main_replica

    state = model.sharded_state_dict()
    apply_factories(state)
    blocks = []
    for tensor in _leaves(state):
        if isinstance(tensor, ShardedTensor) and is_main_replica(tensor.replica_id):
            shape = (1,) * tensor.prepend_axis_num + tuple(tensor.local_shape)
            blocks.append((tensor.key, tuple(tensor.global_shape), tuple(tensor.global_offset), shape))
    return blocks


def _leaves(entry: Any) -> list[Any]:
    if isinstance(entry, dict | list):
        children = entry.values() if isinstance(entry, dict) else entry
        return [leaf for child in children for leaf in _leaves(child)]
    return [entry]


def blocks_of_all_ranks(
    hf_config: dict[str, Any],
    *,
    tp: int = 1,
    pp: int = 1,
    vpp: int | None = None,
    cp: int = 1,
    ep: int = 1,
    etp: int = 1,
    **settings: Any,
) -> list[Block]:
    """:func:`saved_blocks` of every rank of a layout, on as few ranks as it needs.

    Every rank in turn is this process, in a group whose messages go nowhere.

    Args:
        hf_config: the configuration.
        tp: tensor-model-parallel size, and so on as Megatron abbreviates them.
        settings: other ``TransformerConfig`` fields.
    """
    from megatron.core import parallel_state
    from torch.testing._internal.distributed.fake_pg import FakeStore

    sizes = {
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": pp,
        "virtual_pipeline_model_parallel_size": vpp,
        "context_parallel_size": cp,
        "expert_model_parallel_size": ep,
        "expert_tensor_parallel_size": etp,
    }
    world = pp * math.lcm(tp * cp, ep * etp)
    blocks = []
    for rank in range(world):
        torch.distributed.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
        try:
            parallel_state.initialize_model_parallel(**sizes, create_gloo_process_groups=False)
            blocks += [block for model in _meta_models(hf_config, **sizes, **settings) for block in saved_blocks(model)]
        finally:
            parallel_state.destroy_model_parallel()
            torch.distributed.destroy_process_group()
    return blocks


def _meta_models(hf_config: dict[str, Any], **settings: Any) -> Iterator[Any]:
    """This rank's part of the model, one virtual stage after the other."""
    from megatron.core import parallel_state

    from megatron_zeda.models import build_gpt_model, build_transformer_config

    virtual = settings["virtual_pipeline_model_parallel_size"]
    config = build_transformer_config(
        hf_config,
        sequence_parallel=settings["tensor_model_parallel_size"] > 1,
        perform_initialization=False,
        bf16=True,
        params_dtype=torch.bfloat16,
        pipeline_dtype=torch.bfloat16,
        **settings,
    )
    for stage in range(virtual or 1):
        place = {"ignore_virtual": False, "vp_stage": stage}
        with torch.device("meta"):
            model = build_gpt_model(
                hf_config,
                config,
                pre_process=parallel_state.is_pipeline_first_stage(**place),
                post_process=parallel_state.is_pipeline_last_stage(**place),
                vp_stage=stage if virtual else None,
            )
        assert all(parameter.is_meta for parameter in model.parameters())
        yield model


def sparse_folder(folder: Path, hf_config: dict[str, Any], shard_bytes: int = 4 * 10**9) -> int:
    """Write a checkpoint in bfloat16 (selection biases in float32) whose weights are holes, which take no disk.

    Returns:
        The bytes that its tensors seem to have.
    """
    from megatron_zeda.models import family_for
    from megatron_zeda.models.rows import whole_tensors

    family = family_for(hf_config)
    shards: list[dict[str, Any]] = [{}]
    sizes, weight_map = [0], {}
    for name, shape in whole_tensors(family.weight_table(hf_config) + family.carried_rows(hf_config)).items():
        kind, width = ("F32", 4) if name.endswith("e_score_correction_bias") else ("BF16", 2)
        nbytes = width * math.prod(shape)
        if sizes[-1] + nbytes > shard_bytes:
            shards.append({})
            sizes.append(0)
        offsets = [sizes[-1], sizes[-1] + nbytes]
        shards[-1][name] = {"dtype": kind, "shape": shape, "data_offsets": offsets}
        sizes[-1], weight_map[name] = offsets[1], f"model-{len(shards):05}.safetensors"
    folder.mkdir()
    for number, (tensors, size) in enumerate(zip(shards, sizes, strict=True), start=1):
        header = json.dumps(tensors).encode()
        with (folder / f"model-{number:05}.safetensors").open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            file.truncate(8 + len(header) + size)
    index = {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(hf_config))
    return sum(sizes)
