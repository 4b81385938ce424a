"""Law 4: HF -> Megatron -> HF is bit-equal, and the model in between computes what transformers computes."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import (
    LAYERS,
    VOCAB,
    assert_same_bits,
    edit_config,
    load_hf_model,
    load_megatron,
    make_dense_zeros,
    make_hf,
    megatron_logits,
    megatron_model,
    read_tensors,
)
from safetensors.torch import save_file

from megatron_zeda.conversion import hf_to_megatron, inject_zero_experts, megatron_to_hf, verify_checkpoint
from megatron_zeda.conversion.megatron_io import latest_checkpoint_dir, latest_iteration, read_manifest
from megatron_zeda.conversion.torch_dist import TorchDistReader
from megatron_zeda.conversion.torch_dist_writer import write_torch_dist
from megatron_zeda.models import HfPiece, WeightRow, load_hf_config

IDS = torch.arange(3 * 12).reshape(3, 12) * 7 % VOCAB


@pytest.mark.parametrize(
    ("dtype", "shards", "fused", "tied", "dynamic"),
    [
        (torch.float32, False, False, False, False),
        (torch.bfloat16, True, False, False, True),
        (torch.bfloat16, False, True, True, False),
        (torch.float32, True, False, True, True),
        (torch.float32, False, True, False, True),
        (torch.float16, False, False, True, True),
    ],
)
def test_law_4_round_trip_is_bit_equal(
    tmp_path: Path, dtype: torch.dtype, shards: bool, fused: bool, tied: bool, dynamic: bool
) -> None:
    source = make_hf(tmp_path / "hf", dtype=dtype, shards=shards, fused=fused, tie_word_embeddings=tied)
    assert (source / "model.safetensors.index.json").exists() == shards
    if dynamic:
        inject_zero_experts(source, tmp_path / "dynamic", shard_bytes=20_000)
        source = tmp_path / "dynamic"
    hf_to_megatron(source, tmp_path / "megatron")
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back", shard_bytes=20_000)
    assert_same_bits(read_tensors(source), read_tensors(tmp_path / "back"))
    assert json.loads((source / "config.json").read_text()) == json.loads((tmp_path / "back/config.json").read_text())
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 1 if shards else True
    assert any("gate_up_proj" in name for name in read_tensors(tmp_path / "back")) == fused
    assert load_hf_model(tmp_path / "back")(IDS).logits.equal(load_hf_model(source)(IDS).logits)


def test_megatron_folder_is_megatron_lm_s(tmp_path: Path, static: Path) -> None:
    from megatron.core.dist_checkpointing.core import maybe_load_config
    from megatron.core.dist_checkpointing.serialization import load_common_state_dict, load_tensors_metadata

    folder = tmp_path / "new" / "megatron"
    hf_to_megatron(static, folder)
    assert (folder / "latest_checkpointed_iteration.txt").read_text() == "release\n"
    assert latest_iteration(folder) == 0
    inside = folder / "release"
    assert latest_checkpoint_dir(folder) == inside
    assert maybe_load_config(str(inside)).sharded_backend == "torch_dist"
    assert load_common_state_dict(str(inside)) == {"iteration": 0, "checkpoint_version": 3.0}
    shapes = {key: tuple(tensor.global_shape) for key, tensor in load_tensors_metadata(str(inside)).items()}
    assert shapes["decoder.layers.mlp.experts.experts.linear_fc1.weight"] == (LAYERS, 4, 32, 32)
    assert shapes["decoder.layers.self_attention.linear_qkv.layer_norm_weight"] == (LAYERS, 32)
    manifest = read_manifest(folder)
    assert manifest["source"]["files"].keys() == {"config.json", "model.safetensors"}
    assert manifest["num_zero_experts"] == 0


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"norm_topk_prob": False},
        {"tie_word_embeddings": True},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}, "rms_norm_eps": 1e-3},
    ],
)
def test_static_megatron_logits_are_stock_transformers(megatron: None, tmp_path: Path, changes: dict[str, Any]) -> None:
    hf = make_hf(tmp_path / "hf", **changes)
    hf_to_megatron(hf, tmp_path / "megatron")
    model = megatron_model(load_hf_config(hf))
    load_megatron(model, tmp_path / "megatron/release")
    expected = load_hf_model(hf)(IDS).logits
    assert expected.std() > 0.5  # the comparison means something
    torch.testing.assert_close(megatron_logits(model, IDS), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("normalised", [True, False])
def test_dynamic_megatron_logits_are_the_export_s_and_dense_zeros(
    megatron: None, tmp_path: Path, normalised: bool
) -> None:
    make_hf(tmp_path / "hf", norm_topk_prob=normalised)
    inject_zero_experts(tmp_path / "hf", tmp_path / "dynamic", num_zero_experts=3)
    hf_to_megatron(tmp_path / "dynamic", tmp_path / "megatron")
    megatron_to_hf(tmp_path / "megatron", tmp_path / "export")
    model = megatron_model(load_hf_config(tmp_path / "megatron/hf"))
    load_megatron(model, tmp_path / "megatron/release")
    logits = megatron_logits(model, IDS)
    exported = load_hf_model(tmp_path / "export")(IDS).logits
    oracle = load_hf_model(make_dense_zeros(tmp_path / "dynamic", tmp_path / "dense"))(IDS).logits
    torch.testing.assert_close(logits, exported, atol=1e-5, rtol=0)
    torch.testing.assert_close(logits, oracle, atol=1e-5, rtol=0)
    teacher = load_hf_model(tmp_path / "hf")(IDS).logits
    assert (logits - teacher).abs().max() > 1e-2


def test_the_dial_reaches_megatron(megatron: None, tmp_path: Path, static: Path, dynamic: Path) -> None:
    edit_config(dynamic, tmp_path / "off", zeda_zero_logit_bias=float("-inf"))
    hf_to_megatron(tmp_path / "off", tmp_path / "megatron")
    model = megatron_model(load_hf_config(tmp_path / "megatron/hf"))
    load_megatron(model, tmp_path / "megatron/release")
    torch.testing.assert_close(megatron_logits(model, IDS), load_hf_model(static)(IDS).logits, atol=1e-5, rtol=0)
    megatron_to_hf(tmp_path / "megatron", tmp_path / "export")
    torch.testing.assert_close(
        load_hf_model(tmp_path / "export")(IDS).logits, load_hf_model(static)(IDS).logits, atol=1e-5, rtol=0
    )


def test_both_spellings_of_the_published_format_are_read(tmp_path: Path, dynamic: Path) -> None:
    """``qwen3_moe_plus_plus`` and ``num_local_experts`` come out in the one form that every engine reads."""
    edit_config(
        dynamic, tmp_path / "odd", model_type="qwen3_moe_plus_plus", num_experts=..., num_local_experts=4, auto_map=...
    )
    hf_to_megatron(tmp_path / "odd", tmp_path / "megatron")
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    config = json.loads((tmp_path / "back/config.json").read_text())
    assert config["model_type"] == "qwen3_moe"
    assert config["num_experts"] == 4
    assert "num_local_experts" not in config
    assert load_hf_model(tmp_path / "back")(IDS).logits.equal(load_hf_model(dynamic)(IDS).logits)


def test_verify_finds_every_kind_of_difference(tmp_path: Path, static: Path, dynamic: Path) -> None:
    hf_to_megatron(static, tmp_path / "megatron")
    for a, b in itertools.permutations([static, tmp_path / "megatron"], 2):
        assert verify_checkpoint(a, b) == []
    tensors = read_tensors(static)
    name = "model.layers.1.mlp.experts.3.down_proj.weight"
    tensors[name] = tensors[name].clone()
    tensors[name].view(torch.int32)[0, 5] ^= 1  # one bit of one value
    edit_config(static, tmp_path / "bit")
    save_file(tensors, tmp_path / "bit/model.safetensors")
    for other in (static, tmp_path / "megatron"):
        (line,) = verify_checkpoint(other, tmp_path / "bit")
        assert name in line
        assert "1 of" in line
    gates = [f"model.layers.{layer}.mlp.gate.weight: [4, 32] and [6, 32]" for layer in range(LAYERS)]
    assert [line for line in verify_checkpoint(static, dynamic) if not line.startswith("config.json: ")] == gates
    half = make_hf(tmp_path / "half", dtype=torch.bfloat16)
    assert all("float32 and torch.bfloat16" in line for line in verify_checkpoint(static, half))
    fused = make_hf(tmp_path / "fused", fused=True)
    assert any("only in the first" in line for line in verify_checkpoint(static, fused))
    assert verify_checkpoint(tmp_path / "megatron", fused) == []  # the same weights in another layout


def test_a_checkpoint_saved_in_other_pieces_reads_the_same(tmp_path: Path) -> None:
    """A piece that spans all layers gives the same blocks as one piece per layer."""
    whole = torch.arange(6 * 4 * 5, dtype=torch.float32).reshape(6, 4, 5)
    blocks = [WeightRow("x", (HfPiece("x", (4, 5)),), (layer,), (6,)) for layer in range(6)]
    for name, rows in {"one": [WeightRow("x", (HfPiece("x", (6, 4, 5)),))], "layers": blocks}.items():
        (tmp_path / name).mkdir()
        values = dict(zip(map(str, rows), whole.reshape(len(rows), *rows[0].shape), strict=True))
        write_torch_dist(tmp_path / name, rows, {"x": torch.float32}, lambda row, v=values: v[str(row)], {})
        reader = TorchDistReader(tmp_path / name)
        assert all(reader.read(row).equal(whole[layer]) for layer, row in enumerate(blocks))
