"""Published models at full size, on the meta device: every tensor is mapped exactly once, at every layout."""

from __future__ import annotations

from collections import defaultdict
from math import prod
from pathlib import Path
from typing import Any

import pytest
from full_size import MODELS, blocks_of_all_ranks, full_size_config, sparse_folder, stock_shapes

from megatron_zeda.conversion import hf_to_megatron, inject_zero_experts
from megatron_zeda.models import ExpertLayout, HfConfig, family_for
from megatron_zeda.models.rows import whole_tensors

# With the layers that draft; as the models' pages count them.
PARAMETERS = {
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-235b-a22b": 235_093_634_560,
    "glm-4.7-flash": 31_221_488_576,
    "glm-4.5-air": 110_468_824_832,
}
EMBEDDING, LOSS = "account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split"
# GLM-4.7-Flash has a prime number of layers.
LAYOUTS: list[tuple[str, dict[str, Any]]] = [
    ("qwen3-30b-a3b", {}),
    ("qwen3-30b-a3b", {"tp": 4, "cp": 2, "ep": 8, "etp": 1}),
    ("qwen3-30b-a3b", {"tp": 2, "pp": 2, "ep": 4, "etp": 1}),
    ("qwen3-30b-a3b", {"pp": 4, "vpp": 3, "ep": 2}),
    ("qwen3-30b-a3b", {"tp": 8, "ep": 8, "etp": 1}),  # more ranks than key and value heads
    ("qwen3-235b-a22b", {"tp": 4, "pp": 2, "ep": 8, "etp": 1}),
    ("qwen3-235b-a22b", {"pp": 8, EMBEDDING: True, LOSS: True}),
    ("glm-4.7-flash", {}),
    ("glm-4.7-flash", {"tp": 4, "ep": 8, "etp": 1}),
    ("glm-4.7-flash", {"tp": 2, "ep": 2, "etp": 2, "cp": 2}),
    ("glm-4.7-flash", {"pp": 4, "ep": 2, LOSS: True}),
    ("glm-4.7-flash", {"pp": 4, "vpp": 2, EMBEDDING: True}),
    ("glm-4.7-flash", {"pp": 4, "num_layers_in_first_pipeline_stage": 11}),
    ("glm-4.7-flash", {"pp": 4, "num_layers_in_last_pipeline_stage": 8, "tp": 2, "ep": 2, "etp": 1}),
    ("glm-4.7-flash", {"pp": 2, "pipeline_model_parallel_layout": "Et*24|t*23L"}),
    ("glm-4.5-air", {}),
    ("glm-4.5-air", {"tp": 8, "ep": 8, "etp": 1}),
    ("glm-4.5-air", {"pp": 4, "vpp": 2, "tp": 2, "ep": 2, "etp": 1, EMBEDDING: True, LOSS: True}),
]


def _config(name: str) -> HfConfig:
    return HfConfig(full_size_config(name), where=name)


@pytest.mark.parametrize("layout", ["per_expert", "fused"])
@pytest.mark.parametrize("name", MODELS)
def test_every_tensor_of_stock_transformers_once(name: str, layout: ExpertLayout) -> None:
    config = _config(name)
    family = family_for(config)
    rows, carried = family.weight_table(config, layout), family.carried_rows(config, layout)
    pieces = [(piece.name, piece.slot) for row in rows + carried for piece in row.pieces]
    assert len(pieces) == len(set(pieces))
    assert whole_tensors(rows) == stock_shapes(config, layout)
    for tensor, slots in _slots(rows).items():
        assert slots in ([None], list(range(config[family.num_experts_keys[0]]))), tensor
    assert not whole_tensors(rows).keys() & whole_tensors(carried).keys()
    assert sum(row.numel for row in rows + carried) == PARAMETERS[name]


def _slots(rows: list[Any]) -> dict[str, list[int | None]]:
    slots = defaultdict(list)
    for row in rows:
        for piece in row.pieces:
            slots[piece.name].append(piece.slot)
    return slots


@pytest.mark.parametrize("name", MODELS)
def test_zero_experts_widen_routers_and_nothing_else(name: str) -> None:
    config = _config(name)
    family = family_for(config)
    dynamic = family.make_dynamic(config, 32)
    before = whole_tensors(family.weight_table(config) + family.carried_rows(config))
    after = whole_tensors(family.weight_table(dynamic) + family.carried_rows(dynamic))
    assert before.keys() == after.keys()
    for tensor, shape in before.items():
        wider = ".mlp.gate." in tensor
        assert after[tensor] == (shape[0] + 32 * wider, *shape[1:])
    assert sum(".mlp.gate.weight" in tensor for tensor in before) >= config["num_hidden_layers"] - 1


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_dry_runs_at_full_size(tmp_path: Path, name: str) -> None:
    """On folders with the names, types and sizes of the published ones, and holes for weights."""
    config = _config(name)
    family = family_for(config)
    experts = family.num_experts(config)
    dynamic = family.make_dynamic(config, experts // 2)
    num_bytes = {
        kind: sparse_folder(tmp_path / kind, values) for kind, values in (("static", config), ("dynamic", dynamic))
    }
    columns = 2 * config["hidden_size"] + 4 * (name[:3] == "glm")  # a router row, and a selection bias in float32
    num_routers = sum(".mlp.gate.weight" in tensor for tensor in _tensors(config))
    assert num_bytes["dynamic"] - num_bytes["static"] == num_routers * columns * experts // 2
    plans = {
        "static": inject_zero_experts(
            tmp_path / "static", tmp_path / "out", num_zero_experts=experts // 2, plan_only=True
        ),
        "dynamic": hf_to_megatron(tmp_path / "dynamic", tmp_path / "out", plan_only=True),
    }
    for plan in plans.values():
        assert plan["num_tensors"] == len(_tensors(config))
        assert plan["num_carried"] == len(whole_tensors(family.carried_rows(config)))
        assert 0 <= plan["num_bytes"] - num_bytes["dynamic"] < 0.001 * plan["num_bytes"]  # headers
        assert plan["fits"] == (plan["num_bytes"] <= plan["free_bytes"])
        assert plan["memory_bytes"] <= 10**9 + 2 * 2 * config["vocab_size"] * config["hidden_size"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dynamic", "static"]


def _tensors(config: HfConfig) -> dict[str, tuple[int, ...]]:
    family = family_for(config)
    return whole_tensors(family.weight_table(config) + family.carried_rows(config))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "sizes"), LAYOUTS, ids=[f"{name}-{sizes}" for name, sizes in LAYOUTS])
def test_all_ranks_together_save_every_tensor_once(name: str, sizes: dict[str, Any]) -> None:
    """The main replicas of all ranks fill every Megatron tensor of the table, without holes and overlaps."""
    config = _config(name)
    family = family_for(config)
    dynamic = family.make_dynamic(config, family.num_experts(config) // 2)
    expected = {row.key: row.global_shape for row in family.weight_table(dynamic)}
    boxes = defaultdict(list)
    for key, shape, offset, size in blocks_of_all_ranks(dynamic, **sizes):
        assert expected.get(key) == shape, key
        boxes[key].append((offset, size))
    assert boxes.keys() == expected.keys()
    for key, shape in expected.items():
        ((size,), offsets) = {size for _, size in boxes[key]}, [offset for offset, _ in boxes[key]]
        assert len(set(offsets)) == len(offsets), f"{key}: a part is saved twice"
        assert all(start % step == 0 for offset in offsets for start, step in zip(offset, size, strict=True)), key
        assert len(offsets) * prod(size) == prod(shape), f"{key}: a part is missing"
