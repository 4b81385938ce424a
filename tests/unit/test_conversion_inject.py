"""Injection: what changes, what does not, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from checkpoints import EXPERTS, HIDDEN, LAYERS, assert_same_bits, edit_config, make_hf, nothing_beside, read_tensors

from megatron_zeda.conversion import inject_zero_experts
from megatron_zeda.errors import InputError


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fused", [False, True])
def test_only_the_gates_grow_and_old_rows_keep_their_bits(tmp_path: Path, dtype: torch.dtype, fused: bool) -> None:
    from megatron_zeda.zero_experts.injection import draw_zero_rows

    old = read_tensors(make_hf(tmp_path / "hf", dtype=dtype, fused=fused))
    inject_zero_experts(tmp_path / "hf", tmp_path / "out", num_zero_experts=3, seed=5)
    new = read_tensors(tmp_path / "out")
    gates = [f"model.layers.{layer}.mlp.gate.weight" for layer in range(LAYERS)]
    for name in gates:
        assert new[name].shape == (EXPERTS + 3, HIDDEN)
        assert new[name][EXPERTS:].equal(draw_zero_rows(old[name], 3, seed=5, name=name))
        new[name] = new[name][:EXPERTS].clone()
    assert_same_bits(old, new)


def test_seeded_and_different_per_layer(tmp_path: Path, static: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        inject_zero_experts(static, tmp_path / name, seed=seed)
    a, b, c = (read_tensors(tmp_path / name) for name in "abc")
    assert_same_bits(a, b)
    gates = [f"model.layers.{layer}.mlp.gate.weight" for layer in range(LAYERS)]
    assert not a[gates[0]].equal(c[gates[0]])
    assert not a[gates[0]][EXPERTS:].equal(a[gates[1]][EXPERTS:])


def test_configuration_is_complete(dynamic: Path) -> None:
    config = json.loads((dynamic / "config.json").read_text())
    assert config["num_experts"] == EXPERTS
    assert "num_local_experts" not in config
    assert config["zce_nums"] == [EXPERTS // 2]  # the default
    assert config["zce_types"] == ["zero"]
    assert config["use_zce_mask"] is False
    assert config["architectures"] == ["Qwen3MoePlusPlusForCausalLM"]
    assert config["model_type"] == "qwen3_moe"
    assert config["auto_map"].keys() == {"AutoModel", "AutoModelForCausalLM"}
    for reference in config["auto_map"].values():
        module, name = reference.split(".")
        assert f"class {name}" in (dynamic / f"{module}.py").read_text()


def test_tokenizer_and_templates_travel_but_code_and_pickles_do_not(tmp_path: Path, static: Path) -> None:
    source = edit_config(static, tmp_path / "hf")
    kept = ["tokenizer.json", "tokenizer_config.json", "tokenizer.model", "chat_template.jinja", "LICENSE"]
    for name in [*kept, "tokenization_evil.py", "tokenizer.pkl", "training_args.bin", "README.md"]:
        (source / name).write_text(name)
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates/tools.jinja").write_text("tools")
    inject_zero_experts(source, tmp_path / "out")
    names = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    code = {"modeling_zeda_qwen3_moe.py", "modeling_zeda_base.py"}
    ours = {"config.json", "model.safetensors", "zeda_manifest.json"}
    assert names == {*kept, *ours, *code, "generation_config.json", "additional_chat_templates/tools.jinja"}


def test_a_second_injection_is_refused(tmp_path: Path, dynamic: Path) -> None:
    with pytest.raises(InputError, match="injected already"):
        inject_zero_experts(dynamic, tmp_path / "out")
    assert nothing_beside(tmp_path / "out")


def test_a_second_injection_is_refused_even_when_the_configuration_forgot(tmp_path: Path, dynamic: Path) -> None:
    forgot = edit_config(
        dynamic,
        tmp_path / "forgot",
        architectures=["Qwen3MoeForCausalLM"],
        zce_nums=...,
        zce_types=...,
        use_zce_mask=...,
    )
    with pytest.raises(InputError, match="more rows than there are experts"):
        inject_zero_experts(forgot, tmp_path / "out")
    assert nothing_beside(tmp_path / "out")


@pytest.mark.parametrize("zero", [0, -1])
def test_impossible_numbers_are_refused(tmp_path: Path, static: Path, zero: int) -> None:
    with pytest.raises(InputError, match="number of zero experts"):
        inject_zero_experts(static, tmp_path / "out", num_zero_experts=zero)
    assert nothing_beside(tmp_path / "out")


def test_a_gate_that_is_not_finite_is_refused(tmp_path: Path, static: Path) -> None:
    from safetensors.torch import save_file

    source = edit_config(static, tmp_path / "hf")
    tensors = read_tensors(source)
    tensors["model.layers.1.mlp.gate.weight"][0, 0] = torch.inf
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.gate"):
        inject_zero_experts(source, tmp_path / "out")
    assert nothing_beside(tmp_path / "out")
