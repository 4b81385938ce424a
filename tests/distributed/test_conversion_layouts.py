"""Law 4 across layouts: loaded at one, saved there, loaded at the next, exported, and still the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import (
    EXPERTS,
    FFN,
    HIDDEN,
    assert_same_bits,
    load_megatron,
    make_hf,
    megatron_model,
    newest_iteration,
    read_tensors,
)
from safetensors.torch import save_file
from spawn import initialize_megatron, run_distributed

from megatron_zeda.conversion import hf_to_megatron, inject_zero_experts, megatron_to_hf

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

CHAIN: list[dict[str, int]] = [
    {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "expert_model_parallel_size": 2},
    {"expert_model_parallel_size": 4},
    {"tensor_model_parallel_size": 4},
    {"pipeline_model_parallel_size": 2, "expert_model_parallel_size": 2},
    {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2, "expert_tensor_parallel_size": 2},
    {"tensor_model_parallel_size": 2, "context_parallel_size": 2},
]
# GLM: an odd number of layers, so stages of two and of three; the first of them is dense, and one more only drafts.
LAYERS = {"qwen3_moe": 4, "glm4_moe_lite": 5, "glm4_moe": 5}
DENSE = {"qwen3_moe": 0, "glm4_moe_lite": 1, "glm4_moe": 1}
FIRST_STAGE = {"num_layers_in_first_pipeline_stage": 2}


def _expert_value(layer: int, expert: int) -> float:
    return 100.0 * (layer + 1) + expert


def _constant_experts(folder: Path, family: str) -> Path:
    """A checkpoint in which every weight of an expert says which expert of which layer it is."""
    layers = LAYERS[family]
    make_hf(folder, family=family, num_hidden_layers=layers, num_key_value_heads=4, mtp=family != "qwen3_moe")
    tensors = read_tensors(folder)
    for layer in range(DENSE[family], layers):
        for expert in range(EXPERTS):
            prefix = f"model.layers.{layer}.mlp.experts.{expert}."
            for number, projection in enumerate(("gate_proj", "up_proj", "down_proj")):
                tensors[f"{prefix}{projection}.weight"].fill_(_expert_value(layer, expert) + number / 4)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _check_experts(model: Any, sizes: dict[str, int]) -> int:
    """Every local expert is the one that its global place says; returns how many were checked."""
    from megatron.core import parallel_state

    ep = sizes.get("expert_model_parallel_size", 1)
    first_expert = EXPERTS // ep * parallel_state.get_expert_model_parallel_rank()
    layers = [layer for layer in model.decoder.layers if hasattr(layer.mlp, "experts")]
    for layer in layers:
        for place, expert in enumerate(layer.mlp.experts.local_experts):
            value = _expert_value(layer.layer_number - 1, first_expert + place)
            gate, up = expert.linear_fc1.weight.chunk(2)
            assert (gate == value).all()
            assert (up == value + 0.25).all()
            assert (expert.linear_fc2.weight == value + 0.5).all()
    return len(layers) * EXPERTS // ep


def _chain(rank: int, world_size: int, root: str, family: str) -> list[int]:
    """Walk through all layouts, each starting from the folder that the one before has saved."""
    from megatron.core import dist_checkpointing

    from megatron_zeda.conversion.megatron_io import check_pickles
    from megatron_zeda.models import load_hf_config

    config = load_hf_config(Path(root) / "start/hf")
    source, checked = newest_iteration(Path(root) / "start"), []
    for number, layout in enumerate(CHAIN, start=1):
        sizes = {"expert_tensor_parallel_size": 1, **layout}
        initialize_megatron(**sizes)
        model = megatron_model(
            config,
            **sizes,
            **(FIRST_STAGE if "pipeline_model_parallel_size" in sizes else {}),
            sequence_parallel="tensor_model_parallel_size" in sizes,
            pipeline_dtype=torch.float32,
            perform_initialization=False,
        )
        check_pickles(source)
        load_megatron(model, source)
        checked.append(_check_experts(model, sizes))
        source = Path(root) / f"start/iter_{number:07d}"
        if rank == 0:
            source.mkdir()
        torch.distributed.barrier()
        weights = model.sharded_state_dict()
        dist_checkpointing.save({"model": weights, **_training_state(model, rank), "iteration": number}, str(source))
        torch.distributed.barrier()
    return checked


def _training_state(model: Any, rank: int) -> dict[str, Any]:
    """What a training run saves beside the weights: sharded optimizer tensors, random states, arguments."""
    import argparse
    import random

    import numpy as np
    from megatron.core.dist_checkpointing import ShardedObject

    moments = model.sharded_state_dict()
    for entry in moments.values():
        entry.key = f"optimizer.state.exp_avg.{entry.key}"
    state = [{"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}]
    return {
        "optimizer": moments,
        "rng_state": ShardedObject("rng_state", state, (torch.distributed.get_world_size(),), (rank,), replica_id=0),
        "args": argparse.Namespace(hidden_size=HIDDEN, moe_ffn_hidden_size=FFN, params_dtype=torch.float32),
    }


@pytest.mark.parametrize("family", list(LAYERS))
def test_law_4_through_a_chain_of_layouts(tmp_path: Path, family: str) -> None:
    inject_zero_experts(_constant_experts(tmp_path / "hf", family), tmp_path / "dynamic", num_zero_experts=2)
    hf_to_megatron(tmp_path / "dynamic", tmp_path / "start")
    ranks = run_distributed(_chain, 4, str(tmp_path), family)
    for number, sizes in enumerate(CHAIN):
        copies = 4 // (sizes.get("pipeline_model_parallel_size", 1) * sizes.get("expert_model_parallel_size", 1))
        assert sum(checked[number] for checked in ranks) == (LAYERS[family] - DENSE[family]) * EXPERTS * copies
    expected = read_tensors(tmp_path / "dynamic")
    for number in range(1, len(CHAIN) + 1):  # every save exports, whatever layout it was made at
        export = tmp_path / f"export{number}"
        summary = megatron_to_hf(tmp_path / "start", export, iteration=number)
        assert summary["iteration"] == number
        assert_same_bits(expected, read_tensors(export))
