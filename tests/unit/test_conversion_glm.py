"""GLM-4.7-Flash through every conversion: laws 1 and 4, the oracle being stock transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import (
    BIAS,
    EXPERTS,
    VOCAB,
    assert_same_bits,
    edit_config,
    load_hf_model,
    load_megatron,
    make_dense_zeros,
    make_hf,
    megatron_logits,
    megatron_model,
    newest_iteration,
    read_tensors,
)
from megatron.core.transformer.moe.router import TopKRouter
from safetensors.torch import save_file

from megatron_zeda.conversion import hf_to_megatron, inject_zero_experts, megatron_to_hf
from megatron_zeda.models import load_hf_config
from megatron_zeda.models.rows import NEVER_SELECTED
from megatron_zeda.zero_experts import masked_zero_experts, router_statistics

IDS = torch.arange(3 * 12).reshape(3, 12) * 7 % VOCAB
GLM = "glm4_moe_lite"


def _loaded(folder: Path, **overrides: Any) -> Any:
    """The Megatron model of a converted folder, with all weights from the checkpoint."""
    model = megatron_model(load_hf_config(folder / "hf"), **overrides)
    load_megatron(model, newest_iteration(folder))
    return model


@pytest.fixture(scope="module")
def glm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with static/, dynamic/, both as Megatron checkpoints, and dense/: all from the same weights."""
    root = tmp_path_factory.mktemp("glm")
    make_hf(root / "static", family=GLM, num_hidden_layers=3, mtp=True)
    inject_zero_experts(root / "static", root / "dynamic", num_zero_experts=3)
    make_dense_zeros(root / "dynamic", root / "dense")
    for name in ("static", "dynamic", "dense"):
        hf_to_megatron(root / name, root / f"megatron-{name}")
    return root


@pytest.mark.parametrize(
    ("dtype", "shards", "fused", "mtp", "dynamic", "changes"),
    [
        (torch.float32, False, False, False, False, {}),
        (torch.bfloat16, True, False, True, True, {}),
        (torch.bfloat16, False, True, False, True, {"tie_word_embeddings": True}),
        (torch.float32, False, False, True, True, {"mlp_layer_types": ["sparse"] * 2, "first_k_dense_replace": 0}),
        (torch.bfloat16, False, False, True, False, {"n_shared_experts": 2}),
    ],
)
def test_law_4_glm_round_trip_is_bit_equal(
    tmp_path: Path,
    dtype: torch.dtype,
    shards: bool,
    fused: bool,
    mtp: bool,
    dynamic: bool,
    changes: dict[str, Any],
) -> None:
    source = make_hf(tmp_path / "hf", family=GLM, dtype=dtype, shards=shards, fused=fused, mtp=mtp, **changes)
    assert {t.dtype for name, t in read_tensors(source).items() if name.endswith(BIAS)} == {torch.float32}
    if dynamic:
        inject_zero_experts(source, tmp_path / "dynamic", shard_bytes=20_000)
        source = tmp_path / "dynamic"
    hf_to_megatron(source, tmp_path / "megatron")
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back", shard_bytes=20_000)
    assert_same_bits(read_tensors(source), read_tensors(tmp_path / "back"))
    assert any(".layers.2." in name for name in read_tensors(tmp_path / "back")) == mtp
    assert json.loads((source / "config.json").read_text()) == json.loads((tmp_path / "back/config.json").read_text())
    assert load_hf_model(tmp_path / "back")(IDS).logits.equal(load_hf_model(source)(IDS).logits)


def test_injection_widens_routers_and_selection_biases(glm: Path) -> None:
    from megatron_zeda.zero_experts.injection import draw_zero_entries, draw_zero_rows

    old, new = read_tensors(glm / "static"), read_tensors(glm / "dynamic")
    for layer in (1, 2, 3):
        gate, bias = (f"model.layers.{layer}.mlp.gate.{name}" for name in ("weight", BIAS))
        rows = torch.zeros(3, 32) if layer == 3 else draw_zero_rows(old[gate], 3, seed=0, name=gate)
        entries = draw_zero_entries(old[bias], 3, seed=0, name=bias)
        if layer == 3:  # it only drafts, and stays static
            entries = torch.full((3,), NEVER_SELECTED)
        assert new[gate][EXPERTS:].equal(rows)
        assert new[bias][EXPERTS:].equal(entries)
        assert new[bias].dtype == torch.float32
        new[gate], new[bias] = new[gate][:EXPERTS].clone(), new[bias][:EXPERTS].clone()
    assert_same_bits(old, new)


@pytest.mark.parametrize("family", [GLM, "glm4_moe"])
def test_injection_does_not_depend_on_where_the_selection_biases_lie(tmp_path: Path, family: str) -> None:
    """A constant on all real biases changes nothing in the static model, and so must not in the dynamic one."""
    tensors = read_tensors(make_hf(tmp_path / "hf", family=family, num_hidden_layers=3))
    found = {}
    for shift in (0.0, 7.0, -7.0):
        static, dynamic = edit_config(tmp_path / "hf", tmp_path / f"static{shift}"), tmp_path / f"dynamic{shift}"
        shifted = {name: tensor + shift if name.endswith(BIAS) else tensor for name, tensor in tensors.items()}
        save_file(shifted, static / "model.safetensors", metadata={"format": "pt"})
        inject_zero_experts(static, dynamic, num_zero_experts=2)
        model = load_hf_model(dynamic)
        skipped: list[torch.Tensor] = []
        for layer in model.model.layers[1:]:
            layer.mlp.gate.register_forward_hook(lambda *call, seen=skipped: seen.append((call[2][1] == 0).sum(-1)))
        with torch.no_grad():
            found[shift] = (load_hf_model(static)(IDS).logits, model(IDS).logits, torch.stack(skipped))
    assert 0.05 < float(found[0.0][2].float().mean()) / 2 < 0.8  # zero experts are chosen, and not always
    for shift in (7.0, -7.0):
        for here, there in zip(found[shift], found[0.0], strict=True):
            torch.testing.assert_close(here, there, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True, "n_shared_experts": 2},
        {"routed_scaling_factor": 2.5, "rms_norm_eps": 1e-3},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
        {"mlp_layer_types": ["dense", "dense", "sparse"], "first_k_dense_replace": 2},
        {"num_attention_heads": 2, "num_key_value_heads": 2, "v_head_dim": 24, "q_lora_rank": 40},
    ],
)
def test_static_glm_logits_are_stock_transformers(megatron: None, tmp_path: Path, changes: dict[str, Any]) -> None:
    hf = make_hf(tmp_path / "hf", family=GLM, num_hidden_layers=3, **changes)
    hf_to_megatron(hf, tmp_path / "megatron")
    expected = load_hf_model(hf)(IDS).logits
    assert expected.std() > 0.5  # the comparison means something
    torch.testing.assert_close(megatron_logits(_loaded(tmp_path / "megatron"), IDS), expected, atol=2e-5, rtol=0)


def test_the_epsilon_that_stock_transformers_has_is_needed(megatron: None, tmp_path: Path) -> None:
    """Small latents, where the two epsilons are told apart: without the key Megatron takes ``rms_norm_eps``."""
    hf = make_hf(tmp_path / "hf", family=GLM, num_hidden_layers=3)
    tensors = read_tensors(hf)
    for name in tensors:
        if "q_a_proj" in name or "kv_a_proj" in name:
            tensors[name] *= 2e-3
    save_file(tensors, hf / "model.safetensors", metadata={"format": "pt"})
    expected = load_hf_model(hf)(IDS).logits
    hf_to_megatron(hf, tmp_path / "megatron")
    torch.testing.assert_close(megatron_logits(_loaded(tmp_path / "megatron"), IDS), expected, atol=2e-5, rtol=0)
    unsaid = edit_config(hf, tmp_path / "unsaid", zeda_latent_norm_eps=...)
    hf_to_megatron(unsaid, tmp_path / "other")
    assert (megatron_logits(_loaded(tmp_path / "other"), IDS) - expected).abs().max() > 1e-2


def test_dynamic_glm_logits_are_dense_zeros(megatron: None, glm: Path) -> None:
    model = _loaded(glm / "megatron-dynamic")
    logits = megatron_logits(model, IDS)
    oracle = load_hf_model(glm / "dense")(IDS).logits
    torch.testing.assert_close(logits, oracle, atol=2e-5, rtol=0)
    statistics = router_statistics(model)
    assert 0.1 < float(statistics.skip_rate) < 0.9  # zero experts are chosen
    assert (logits - load_hf_model(glm / "static")(IDS).logits).abs().max() > 1e-2


def test_dynamic_glm_logits_are_the_export_s(megatron: None, glm: Path, tmp_path: Path) -> None:
    megatron_to_hf(glm / "megatron-dynamic", tmp_path / "export")
    exported = load_hf_model(tmp_path / "export")(IDS).logits
    torch.testing.assert_close(megatron_logits(_loaded(glm / "megatron-dynamic"), IDS), exported, atol=2e-5, rtol=0)


def test_the_dial_masks_glm_s_zero_experts(megatron: None, glm: Path, tmp_path: Path) -> None:
    edit_config(glm / "dynamic", tmp_path / "off", zeda_zero_logit_bias=float("-inf"))
    hf_to_megatron(tmp_path / "off", tmp_path / "megatron")
    teacher = load_hf_model(glm / "static")(IDS).logits
    torch.testing.assert_close(megatron_logits(_loaded(tmp_path / "megatron"), IDS), teacher, atol=2e-5, rtol=0)
    megatron_to_hf(tmp_path / "megatron", tmp_path / "export")
    torch.testing.assert_close(load_hf_model(tmp_path / "export")(IDS).logits, teacher, atol=2e-5, rtol=0)


def test_law_1_glm_masked_student_is_the_teacher(megatron: None, glm: Path) -> None:
    """To rounding against the teacher as it is, bit for bit against a teacher whose router is as wide."""
    student, teacher = _loaded(glm / "megatron-dynamic"), _loaded(glm / "megatron-static")
    with masked_zero_experts(student):
        masked = megatron_logits(student, IDS)
    torch.testing.assert_close(masked, megatron_logits(teacher, IDS), atol=1e-5, rtol=0)
    # The padded teacher: stock classes with as many experts as the router has columns, the last ones out of reach.
    padded = _loaded(glm / "megatron-dense")
    routers = [module for module in padded.modules() if isinstance(module, TopKRouter)]
    assert [type(router) for router in routers] == [TopKRouter] * 2
    for router in routers:
        router.expert_bias[EXPERTS:] = float("-inf")
    assert masked.equal(megatron_logits(padded, IDS))
    assert not masked.equal(megatron_logits(student, IDS))
