"""Dynamic checkpoints as others made them: imported, verified, exported and compared with what they compute.

They are built here with the safetensors library alone, the way the method's published tools build them: the routers of
a static checkpoint widened by Gaussian rows, selection biases too, three keys added to config.json.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import VOCAB, assert_same_bits, load_hf_model, make_dense_zeros, make_hf, read_tensors
from safetensors.torch import save_file

from megatron_zeda.conversion import hf_to_megatron, inject_zero_experts, megatron_to_hf, verify_checkpoint
from megatron_zeda.conversion.logits import compare_logits
from megatron_zeda.errors import InputError

FAMILIES = ("qwen3_moe", "glm4_moe_lite", "glm4_moe")
ARCHITECTURES = {
    "qwen3_moe": "Qwen3MoePlusPlusForCausalLM",
    "glm4_moe_lite": "Glm4MoeLitePlusPlusForCausalLM",
    "glm4_moe": "Glm4MoePlusPlusForCausalLM",
}
KEYS = {"qwen3_moe": "num_experts", "glm4_moe_lite": "n_routed_experts", "glm4_moe": "n_routed_experts"}
ZERO = 2
IDS = torch.arange(3 * 12).reshape(3, 12) * 5 % VOCAB
DRAFTING = "model.layers.2."


def _widen(old: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    mean, std = old.float().mean(0), old.float().std(0)
    new = torch.randn(ZERO, *old.shape[1:], generator=generator) * std + mean
    return torch.cat([old, new.to(old.dtype)])


def _hand_edited(config: dict[str, Any], family: str) -> dict[str, Any]:
    """As the method's README says: the keys added, the architecture changed, the model type left alone."""
    zce = {"zce_nums": [ZERO], "zce_types": ["zero"], "use_zce_mask": False}
    return {**config, **zce, "architectures": [ARCHITECTURES[family]]}


def _own_type(config: dict[str, Any], family: str) -> dict[str, Any]:
    """As its fork of transformers names the model."""
    return {**_hand_edited(config, family), "model_type": f"{family}_plus_plus"}


def _saved_by_transformers_4(config: dict[str, Any], family: str) -> dict[str, Any]:
    """As that fork, a transformers 4, writes it: the rotary base on its own, `torch_dtype`."""
    config = _own_type(config, family)
    rotary = config.pop("rope_parameters")
    config |= {key: value for key, value in rotary.items() if key != "rope_type"}
    config["torch_dtype"] = config.pop("dtype", "float32")
    config["transformers_version"] = "4.57.1"
    return {**config, "rope_scaling": None}


def _saved_by_transformers_5(config: dict[str, Any], family: str) -> dict[str, Any]:
    """As save_pretrained of recent releases writes it: one name for the number of experts in every family."""
    config = _hand_edited(config, family)
    config["num_local_experts"] = config.pop(KEYS[family], config.get("num_local_experts"))
    return config


STYLES: tuple[Callable[[dict[str, Any], str], dict[str, Any]], ...] = (
    _hand_edited,
    _own_type,
    _saved_by_transformers_4,
    _saved_by_transformers_5,
)


def make_wild(
    folder: Path,
    family: str,
    style: Callable[[dict[str, Any], str], dict[str, Any]] = _hand_edited,
    *,
    drafting: str = "absent",
    dtype: torch.dtype = torch.float32,
) -> Path:
    """A dynamic checkpoint of no tool of ours; ``drafting``: absent, widened like the rest, or narrow as it was."""
    static = make_hf(folder / "static", family=family, mtp=drafting != "absent", dtype=dtype)
    generator = torch.Generator().manual_seed(11)
    tensors = read_tensors(static)
    for name in sorted(tensors):
        if ".mlp.gate." in name and not (drafting == "narrow" and name.startswith(DRAFTING)):
            tensors[name] = _widen(tensors[name], generator)
    wild = folder / "wild"
    wild.mkdir()
    save_file(tensors, wild / "model.safetensors", metadata={"format": "pt"})
    config = style(json.loads((static / "config.json").read_text()), family)
    (wild / "config.json").write_text(json.dumps(config))
    (wild / "generation_config.json").write_text('{"temperature": 0.6}')
    (wild / "README.md").write_text("their card")
    return wild


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("family", FAMILIES)
def test_import_verify_export(tmp_path: Path, family: str, style: Any) -> None:
    wild = make_wild(tmp_path, family, style)
    before = {path.name: path.read_bytes() for path in wild.iterdir()}
    hf_to_megatron(wild, tmp_path / "megatron")
    assert verify_checkpoint(wild, tmp_path / "megatron") == []
    megatron_to_hf(tmp_path / "megatron", tmp_path / "out")
    assert verify_checkpoint(wild, tmp_path / "out") == []
    assert_same_bits(read_tensors(wild), read_tensors(tmp_path / "out"))
    assert {path.name: path.read_bytes() for path in wild.iterdir()} == before
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["model_type"], config["architectures"]) == (family, [ARCHITECTURES[family]])
    assert (config["zce_nums"], config["zce_types"], config["use_zce_mask"]) == ([ZERO], ["zero"], False)
    assert (config[KEYS[family]], "num_local_experts" in config) == (4, False)
    assert (tmp_path / "out/generation_config.json").read_text() == '{"temperature": 0.6}'
    assert (tmp_path / "out/README.md").read_text() != "their card"
    # What it computes: a stock model with all-zero experts, from their tensors.
    shutil.copytree(tmp_path / "out", tmp_path / "for_oracle", ignore=shutil.ignore_patterns("*.safetensors"))
    shutil.copy(wild / "model.safetensors", tmp_path / "for_oracle")
    oracle = load_hf_model(make_dense_zeros(tmp_path / "for_oracle", tmp_path / "dense"))
    with torch.no_grad():
        wanted = oracle(IDS).logits
        assert (load_hf_model(tmp_path / "out")(IDS).logits - wanted).abs().max() < 1e-5
        static = load_hf_model(tmp_path / "static")(IDS).logits
    assert (static - wanted).abs().max() > 1e-2  # zero experts matter here


@pytest.mark.parametrize("family", FAMILIES)
def test_all_forms_and_the_comparison_take_it(tmp_path: Path, family: str) -> None:
    wild = make_wild(tmp_path, family, _own_type)
    hf_to_megatron(wild, tmp_path / "megatron")
    assert compare_logits(wild, tmp_path / "megatron").logits.largest < 3e-5
    for format in ("dense-zeros", "vllm-mone"):
        megatron_to_hf(tmp_path / "megatron", tmp_path / format, format=format)
        assert compare_logits(wild, tmp_path / format).logits.largest < 3e-5
    config = json.loads((tmp_path / "vllm-mone/config.json").read_text())
    assert config["model_type"] == family


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_with_a_float32_selection_bias(tmp_path: Path, family: str) -> None:
    wild = make_wild(tmp_path, family, dtype=torch.bfloat16)
    assert {tensor.dtype for name, tensor in read_tensors(wild).items() if "e_score" in name} <= {torch.float32}
    hf_to_megatron(wild, tmp_path / "megatron")
    megatron_to_hf(tmp_path / "megatron", tmp_path / "out")
    assert_same_bits(read_tensors(wild), read_tensors(tmp_path / "out"))


@pytest.mark.parametrize("drafting", ["absent", "widened", "narrow"])
def test_the_drafting_layer_as_it_may_come(tmp_path: Path, drafting: str) -> None:
    """Trained tools drop it, widen it like the rest, or put the static one back."""
    wild = make_wild(tmp_path, "glm4_moe_lite", drafting=drafting)
    hf_to_megatron(wild, tmp_path / "megatron")
    assert verify_checkpoint(wild, tmp_path / "megatron") == []
    summary = megatron_to_hf(tmp_path / "megatron", tmp_path / "out")
    before, after = read_tensors(wild), read_tensors(tmp_path / "out")
    assert (summary["num_carried"] > 0) == (drafting != "absent")
    gate, bias = f"{DRAFTING}mlp.gate.weight", f"{DRAFTING}mlp.gate.e_score_correction_bias"
    if drafting == "narrow":
        assert after[gate].equal(torch.cat([before.pop(gate), torch.zeros(ZERO, 32)]))
        assert after[bias].equal(torch.cat([before.pop(bias), torch.full((ZERO,), -1e4)]))
        del after[gate], after[bias]
    assert_same_bits(before, after)


@pytest.mark.parametrize("key", ["zce_nums", "zce_types", "use_zce_mask"])
@pytest.mark.parametrize("style", [_hand_edited, _own_type])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_missing_key_is_refused_with_the_reason(tmp_path: Path, family: str, style: Any, key: str) -> None:
    def without(config: dict[str, Any], family: str) -> dict[str, Any]:
        return {name: value for name, value in style(config, family).items() if name != key}

    wild = make_wild(tmp_path, family, without)
    for work in (
        lambda: hf_to_megatron(wild, tmp_path / "out"),
        lambda: inject_zero_experts(wild, tmp_path / "out"),
        lambda: verify_checkpoint(wild, wild),
        lambda: compare_logits(wild, wild),
    ):
        with pytest.raises(InputError) as caught:
            work()
        message = str(caught.value)
        assert f"{wild / 'config.json'}: `{key}` is missing" in message
        assert "identity experts behind a mask" in message
        assert "\n" not in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", FAMILIES)
def test_an_architecture_or_a_type_alone_is_dynamic_too(tmp_path: Path, family: str) -> None:
    for index, change in enumerate(({"architectures": [ARCHITECTURES[family]]}, {"model_type": f"{family}_plus_plus"})):
        wild = make_wild(tmp_path / str(index), family, lambda config, family, change=change: {**config, **change})
        with pytest.raises(InputError, match="`zce_nums` is missing"):
            hf_to_megatron(wild, tmp_path / "out")


@pytest.mark.parametrize("family", FAMILIES)
def test_keys_that_were_forgotten_altogether(tmp_path: Path, family: str) -> None:
    """The tool of the method widens the routers and leaves config.json to its user."""
    wild = make_wild(tmp_path, family, lambda config, family: config)
    with pytest.raises(InputError, match=r"zero experts were injected already.*restore the zce_\* keys"):
        hf_to_megatron(wild, tmp_path / "out")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("zce_types", ["copy"]),
        ("zce_types", ["zero", "copy"]),
        ("use_zce_mask", True),
        ("zce_nums", [1, 1]),
        ("zce_nums", [ZERO + 1]),
    ],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_other_kinds_of_experts_are_refused(tmp_path: Path, family: str, key: str, value: Any) -> None:
    wild = make_wild(tmp_path, family, lambda config, family: {**_own_type(config, family), key: value})
    with pytest.raises(InputError, match=f"`{key}` is wrong|wrong shape"):
        hf_to_megatron(wild, tmp_path / "out")
