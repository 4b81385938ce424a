"""Opening Hugging Face folders: what is refused, whose code runs, and what identifies the weights."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import make_hf
from safetensors.torch import load_file, save_file
from tiny_hf import save_dynamic

from megatron_zeda.conversion import inject_zero_experts
from megatron_zeda.errors import InputError
from megatron_zeda.rollout.files import Prompt
from megatron_zeda.rollout.hf_folder import load_model, read_config, resolve_dtype, weights_version
from megatron_zeda.rollout.transformers_engine import TransformersEngine

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path: Path, tiny_static: Path) -> Path:
    return Path(shutil.copytree(tiny_static, tmp_path / "model"))


@pytest.fixture
def dynamic(tmp_path: Path, tiny_dynamic: Path) -> Path:
    return Path(shutil.copytree(tiny_dynamic, tmp_path / "dynamic"))


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


def test_a_dynamic_folder_runs_the_installed_code(tiny_dynamic: Path) -> None:
    model = load_model(tiny_dynamic, device=CPU)  # the folder's own file raises when it is imported
    assert type(model).__module__ == "megatron_zeda.serving.modeling_zeda_qwen3_moe"
    weights = load_file(tiny_dynamic / "model.safetensors")
    for layer, block in enumerate(model.model.layers):
        assert torch.equal(block.mlp.gate.weight, weights[f"model.layers.{layer}.mlp.gate.weight"])
        down = weights[f"model.layers.{layer}.mlp.experts.5.down_proj.weight"]
        assert torch.equal(block.mlp.experts.down_proj[5], down)


def test_the_folders_code_runs_only_when_it_is_trusted(dynamic: Path) -> None:
    with pytest.raises(InputError, match="code from a folder was run"):
        load_model(dynamic, device=CPU, trust_remote_code=True)


def test_a_static_folder_with_code_asks_for_trust(folder: Path) -> None:
    change_config(folder, auto_map={"AutoModelForCausalLM": "evil.Model"})
    with pytest.raises(InputError, match=r"brings its own modelling code.*--trust-remote-code"):
        load_model(folder, device=CPU)


def test_the_model_type_of_the_reference_is_read(dynamic: Path, tiny_dynamic: Path) -> None:
    change_config(dynamic, model_type="qwen3_moe_plus_plus")
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        wanted, found = (load_model(f, device=CPU)(ids).logits for f in (tiny_dynamic, dynamic))
    assert torch.equal(wanted, found)


def test_k_can_be_halved_for_a_static_model_only(tiny_static: Path, tiny_dynamic: Path) -> None:
    model = load_model(tiny_static, device=CPU, num_experts_per_token=2)
    assert {layer.mlp.gate.top_k for layer in model.model.layers} == {2}
    for k in (0, 9):
        with pytest.raises(InputError, match="1 to 8, the number of experts"):
            load_model(tiny_static, device=CPU, num_experts_per_token=k)
    with pytest.raises(InputError, match="asked of a dynamic model"):
        load_model(tiny_dynamic, device=CPU, num_experts_per_token=2)


def other_family(folder: Path) -> None:
    change_config(folder, model_type="llama", architectures=["LlamaForCausalLM"])


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"pickle")


def truncated(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def huge_header(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 2**62))


def index(weight_map: Any) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "model.safetensors").unlink(missing_ok=True)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))

    return write


def missing_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def surplus_layer(folder: Path) -> None:
    change_config(folder, num_hidden_layers=1)


def gate_not_widened(folder: Path) -> None:
    change_config(
        folder,
        architectures=["Qwen3MoePlusPlusForCausalLM"],
        zce_nums=[4],
        zce_types=["zero"],
        use_zce_mask=False,
    )


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: shutil.rmtree(f), "no such folder"),
        (lambda f: (f / "config.json").unlink(), "config.json: no such file"),
        (lambda f: (f / "config.json").write_text("{"), "config.json: not valid JSON"),
        (other_family, "config.json: this model family is not supported"),
        (no_weights, "convert the pickled weights to safetensors"),
        (truncated, "model.safetensors: the file is truncated"),
        (huge_header, "model.safetensors: the file is truncated"),
        (index({"a": "../model/model.safetensors"}), r"index.json: .* \(got '../model/model.safetensors'\)"),
        (index({"a": "/etc/passwd"}), r"index.json: .* \(got '/etc/passwd'\)"),
        (index({"a": "model-00001.safetensors"}), "model-00001.safetensors: a shard is missing"),
        (index([1]), "index.json: `weight_map` is missing"),
        (missing_tensor, "1 tensors are missing, the first is model.norm.weight"),
        (surplus_layer, "tensors are unexpected"),
        (gate_not_widened, "mlp.gate.weight was not widened"),
    ],
)
def test_a_damaged_folder_is_one_clear_error(folder: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(folder)
    with pytest.raises(InputError, match=message):
        load_model(folder, device=CPU)


def test_a_widened_gate_in_a_static_folder_is_an_error(dynamic: Path, tiny_static: Path) -> None:
    shutil.copy(tiny_static / "config.json", dynamic / "config.json")
    with pytest.raises(InputError, match="zero experts were injected already"):
        load_model(dynamic, device=CPU)


def test_the_version_follows_names_and_bytes(folder: Path, tiny_static: Path) -> None:
    version = weights_version(folder)
    assert version.startswith("sha256:") and len(version) == 71
    assert weights_version(tiny_static) == version
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    assert weights_version(folder) != version


def test_sharded_weights_are_all_part_of_the_version(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in halves.items():
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
    index({name: file for file, part in halves.items() for name in part})(folder)
    before = weights_version(folder)
    load_model(folder, device=CPU)
    save_file({n: tensors[n] + 1 for n in halves["b.safetensors"]}, folder / "b.safetensors", metadata={"format": "pt"})
    assert weights_version(folder) != before


def test_auto_is_float32_on_the_cpu_and_the_folders_own_on_a_gpu(folder: Path) -> None:
    change_config(folder, dtype="bfloat16")
    config = read_config(folder)
    assert resolve_dtype("auto", config, CPU) == torch.float32
    assert resolve_dtype("auto", config, torch.device("cuda")) == torch.bfloat16
    assert resolve_dtype("bfloat16", config, CPU) == torch.bfloat16
    with pytest.raises(InputError, match="unknown dtype"):
        resolve_dtype("int3", config, CPU)


def test_a_folder_without_tokenizer_is_legal_until_text_is_needed(folder: Path) -> None:
    for path in folder.glob("*token*"):
        path.unlink()
    engine = TransformersEngine(folder)
    assert engine.eos_ids == [1]
    with pytest.raises(InputError, match="the folder has no tokenizer"):
        engine.codec.encode(Prompt(0, "a", None, None, "p:1"))


def test_the_dial_of_a_dynamic_folder_is_used(tmp_path: Path, tiny_static: Path) -> None:
    off = save_dynamic(tiny_static, tmp_path / "off", dial=-1e9)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        wanted, found = (load_model(f, device=CPU)(ids).logits for f in (tiny_static, off))
    assert torch.allclose(wanted, found, atol=1e-5)


def test_both_layouts_of_experts_on_disk_are_the_same_model(tmp_path: Path) -> None:
    parameters = []
    for fused in (False, True):
        static = make_hf(tmp_path / f"static {fused}", fused=fused)
        inject_zero_experts(static, tmp_path / f"dynamic {fused}")
        parameters.append(dict(load_model(tmp_path / f"dynamic {fused}", device=CPU).named_parameters()))
    assert parameters[0].keys() == parameters[1].keys()
    for name, parameter in parameters[0].items():
        assert torch.equal(parameter, parameters[1][name]), name
