"""Checkpoints that no tool of ours wrote: saved by stock Megatron-Core, read through ``--hf-config``."""

from __future__ import annotations

import argparse
import importlib
import io
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from checkpoints import (
    EXPERTS,
    LAYERS,
    VOCAB,
    assert_same_bits,
    load_hf_model,
    load_megatron,
    make_hf,
    megatron_logits,
    megatron_model,
    nothing_beside,
    read_tensors,
)
from torch.distributed.checkpoint.api import CheckpointException

from megatron_zeda.conversion import hf_to_megatron, megatron_to_hf, verify_checkpoint
from megatron_zeda.conversion.megatron_io import MegatronFolder, drop_extra_state, latest_checkpoint_dir
from megatron_zeda.errors import InputError
from megatron_zeda.models import family_for, load_hf_config

PADDED_VOCAB = VOCAB + 64


def _stock_model(hf: Path) -> Any:
    """A stock ``GPTModel`` of local layers with the weights of a Qwen3-MoE folder and a padded vocabulary."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    from megatron_zeda import platform

    config = load_hf_config(hf)
    family = family_for(config)
    values = family.transformer_config_kwargs(config) | platform.transformer_config_overrides()
    values = {name: value for name, value in values.items() if not name.startswith(("num_zero", "zero_expert"))}
    spec = get_gpt_layer_local_spec(num_experts=EXPERTS, moe_grouped_gemm=False, qk_layernorm=True)
    shape = family.gpt_model_kwargs(config) | {"vocab_size": PADDED_VOCAB}
    return _fill(GPTModel(TransformerConfig(**values), spec, **shape), read_tensors(hf))


def _fill(model: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """Weights by hand, written from the definition of the two layouts and not from our table."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
        model.embedding.word_embeddings.weight.normal_()[:VOCAB] = tensors["model.embed_tokens.weight"]
        model.output_layer.weight.normal_()[:VOCAB] = tensors["lm_head.weight"]
        model.decoder.final_layernorm.weight.copy_(tensors["model.norm.weight"])
        for number, layer in enumerate(model.decoder.layers):
            ours = {name.removeprefix(f"model.layers.{number}."): value for name, value in tensors.items()}
            layer.input_layernorm.weight.copy_(ours["input_layernorm.weight"])
            layer.pre_mlp_layernorm.weight.copy_(ours["post_attention_layernorm.weight"])
            q, k, v = (ours[f"self_attn.{name}_proj.weight"].chunk(2) for name in "qkv")  # two query groups
            layer.self_attention.linear_qkv.weight.copy_(torch.cat([q[0], k[0], v[0], q[1], k[1], v[1]]))
            layer.self_attention.q_layernorm.weight.copy_(ours["self_attn.q_norm.weight"])
            layer.self_attention.k_layernorm.weight.copy_(ours["self_attn.k_norm.weight"])
            layer.self_attention.linear_proj.weight.copy_(ours["self_attn.o_proj.weight"])
            layer.mlp.router.weight.copy_(ours["mlp.gate.weight"])
            for expert, module in enumerate(layer.mlp.experts.local_experts):
                gate, up, down = (ours[f"mlp.experts.{expert}.{name}_proj.weight"] for name in ("gate", "up", "down"))
                module.linear_fc1.weight.copy_(torch.cat([gate, up]))
                module.linear_fc2.weight.copy_(down)
        assert not any(parameter.isnan().any() for parameter in model.parameters())
    return model


def _save(model: Any, folder: Path, metadata: dict[str, Any], *, training: bool = False) -> Path:
    """What Megatron-LM's ``save_checkpoint`` leaves, with or without the state of its training."""
    from megatron.core import dist_checkpointing

    state: dict[str, Any] = {"model": model.sharded_state_dict(metadata=dict(metadata))}
    if training:
        state |= _training_state(model)
        for name, entry in state["model"].items():
            if name.endswith("_extra_state"):
                entry.data = io.BytesIO(b"" if "experts" in name else b"amax history")
    inside = folder / "iter_0000005"
    inside.mkdir(parents=True)
    dist_checkpointing.save(state | {"iteration": 5, "checkpoint_version": 3.0}, str(inside))
    (folder / "latest_checkpointed_iteration.txt").write_text("5")
    return folder


def _training_state(model: Any) -> dict[str, Any]:
    """Optimizer tensors, random states, arguments, and the ``_extra_state`` of Transformer Engine's modules."""
    from megatron.core.dist_checkpointing import ShardedObject

    moments = drop_extra_state(model.sharded_state_dict())
    for entry in moments.values():
        entry.key = f"optimizer.state.exp_avg.{entry.key}"
    # Layers without Transformer Engine leave None there.
    extra = [
        ShardedObject(
            "decoder.layers.self_attention.core_attention._extra_state", io.BytesIO(b"fp8"), (LAYERS,), (layer,)
        )
        for layer in range(LAYERS)
    ]
    return {
        "optimizer": moments,
        "extra": extra,
        "rng_state": ShardedObject("rng_state", [{"torch": torch.get_rng_state()}], (1,), (0,), replica_id=0),
        "args": argparse.Namespace(padded_vocab_size=PADDED_VOCAB, params_dtype=torch.float32),
        "opt_param_scheduler": {"num_steps": 5},
    }


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "checkpoint_tools"))
    return importlib.import_module("megatron_to_hf")


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("per_layer", [False, True])
def test_a_stock_checkpoint_exports(
    megatron: None, tmp_path: Path, static: Path, tool: ModuleType, per_layer: bool, training: bool
) -> None:
    folder = _save(_stock_model(static), tmp_path / "stock", {"non_homogeneous_layers": per_layer}, training=training)
    keys = MegatronFolder(folder, hf_config=static).tensors.tensors
    assert ("decoder.layers.1.mlp.router.weight" in keys) == per_layer
    assert keys["output_layer.weight"].size[0] == PADDED_VOCAB
    assert tool.main(["--megatron", str(folder), "--hf", str(tmp_path / "out"), "--hf-config", str(static)]) == 0
    assert_same_bits(read_tensors(static), read_tensors(tmp_path / "out"))
    ids = torch.arange(12)[None]
    assert load_hf_model(tmp_path / "out")(ids).logits.equal(load_hf_model(static)(ids).logits)


@pytest.fixture
def megatron_lm(megatron: None, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Megatron-LM's ``checkpointing`` module, with its global arguments: ``megatron_lm("--load", ...)``."""
    from megatron.training import arguments, checkpointing, global_vars

    def configure(*command: str) -> Any:
        monkeypatch.setattr("sys.argv", ["pretrain_gpt.py", "--ckpt-format", "torch_dist", *command])
        args = arguments.parse_args()
        args.rank, args.world_size, args.use_dist_ckpt = 0, 1, True
        monkeypatch.setattr(global_vars, "_GLOBAL_ARGS", args)
        return checkpointing

    return configure


def test_megatron_lm_loads_an_import(tmp_path: Path, dynamic: Path, megatron_lm: Any) -> None:
    """Its own ``load_checkpoint``: a release starts at iteration 0 without optimizer and random states."""
    hf_to_megatron(dynamic, tmp_path / "megatron")
    model = megatron_model(load_hf_config(dynamic))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    command = ["--load", str(tmp_path / "megatron")]
    with pytest.raises(CheckpointException, match=r"Missing key in checkpoint state_dict: .*_extra_state"):
        megatron_lm(*command).load_checkpoint([model], None, None)
    checkpointing = megatron_lm(*command, "--dist-ckpt-strictness", "log_all")
    assert checkpointing.load_checkpoint([model], None, None) == (0, 0)
    ids = torch.arange(12)[None]
    torch.testing.assert_close(megatron_logits(model, ids), load_hf_model(dynamic)(ids).logits, atol=1e-5, rtol=0)


def test_a_checkpoint_of_megatron_lm_exports(tmp_path: Path, dynamic: Path, megatron_lm: Any) -> None:
    """Its own ``save_checkpoint``: arguments, extra states and all."""
    hf_to_megatron(dynamic, tmp_path / "megatron")
    model = megatron_model(load_hf_config(dynamic))
    load_megatron(model, tmp_path / "megatron/release")
    megatron_lm("--save", str(tmp_path / "saved")).save_checkpoint(7, [model], None, None, 0)
    summary = megatron_to_hf(tmp_path / "saved", tmp_path / "out", hf_config=dynamic)
    assert summary["iteration"] == 7
    assert_same_bits(read_tensors(dynamic), read_tensors(tmp_path / "out"))


def test_stock_code_loads_an_import(megatron: None, tmp_path: Path, static: Path) -> None:
    """The other direction; a stock model of local layers names its norms in its own way, and all else is the same."""
    from megatron.core import dist_checkpointing

    hf_to_megatron(static, tmp_path / "megatron")
    model = _stock_model(static)
    expected = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    state = drop_extra_state(model.sharded_state_dict())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    for entry in state.values():  # local names -> those that Transformer Engine's layers have
        entry.key = entry.key.replace("input_layernorm.", "self_attention.linear_qkv.layer_norm_")
        entry.key = entry.key.replace("mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm.")
    loaded = dist_checkpointing.load(state, str(latest_checkpoint_dir(tmp_path / "megatron")))
    model.load_state_dict(loaded, strict=False)
    for name, parameter in model.named_parameters():
        rows = slice(VOCAB) if parameter.shape[0] == PADDED_VOCAB else slice(None)
        assert parameter[rows].equal(expected[name][rows]), name


@pytest.mark.parametrize("names", ["local", "upstream"])
@pytest.mark.parametrize("family", ["glm4_moe_lite", "qwen3_moe"])
def test_every_name_of_a_norm_is_read(
    megatron: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, names: str
) -> None:
    """Local layers keep norms apart; upstream's own maps rename some of them."""
    hf = make_hf(tmp_path / "hf", family=family)
    renamed = {
        "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
        "self_attention.linear_q_up_proj.layer_norm_weight": "self_attention.q_layernorm.weight",
        "self_attention.linear_kv_up_proj.layer_norm_weight": "self_attention.kv_layernorm.weight",
        "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
    }
    if names == "upstream":
        renamed = {"pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight"}
    family_type = type(family_for(load_hf_config(hf)))
    table = family_type.weight_table
    changed = 0

    def stored_table(self: Any, *args: Any) -> Any:
        nonlocal changed
        rows = table(self, *args)
        for row in rows:
            for ours, theirs in renamed.items():
                if row.key.endswith(f".{ours}"):
                    object.__setattr__(row, "key", row.key.removesuffix(ours) + theirs)
                    changed += 1
        return rows

    with monkeypatch.context() as patch:
        patch.setattr(family_type, "weight_table", stored_table)
        hf_to_megatron(hf, tmp_path / "megatron")
    assert changed >= 2
    assert verify_checkpoint(hf, tmp_path / "megatron") == []


def test_a_missing_tensor_is_named(megatron: None, tmp_path: Path, static: Path) -> None:
    from megatron.core import dist_checkpointing

    state = _stock_model(static).sharded_state_dict(metadata={"non_homogeneous_layers": True})
    del state["decoder.layers.1.mlp.router.weight"]
    (tmp_path / "iter_0000005").mkdir()
    dist_checkpointing.save({"model": state}, str(tmp_path / "iter_0000005"))
    with pytest.raises(
        InputError, match=r"1 tensors are missing, the first is decoder\.layers\.mlp\.router\.weight\[1\]"
    ):
        megatron_to_hf(tmp_path / "iter_0000005", tmp_path / "out", hf_config=static)
    assert nothing_beside(tmp_path / "out")


def test_a_folder_without_a_configuration_says_what_to_give(megatron: None, tmp_path: Path, static: Path) -> None:
    folder = _save(_stock_model(static), tmp_path / "stock", {})
    with pytest.raises(InputError, match="give --hf-config"):
        megatron_to_hf(folder, tmp_path / "out")


def test_drafting_layers_in_megatron_s_form_are_refused(megatron: None, tmp_path: Path, static: Path) -> None:
    model = _stock_model(static)
    state = model.sharded_state_dict()
    extra = model.sharded_state_dict()["decoder.final_layernorm.weight"]
    extra.key = "mtp.layers.0.enorm.weight"
    from megatron.core import dist_checkpointing

    (tmp_path / "iter_0000005").mkdir()
    dist_checkpointing.save({"model": state, "mtp": extra}, str(tmp_path / "iter_0000005"))
    with pytest.raises(InputError, match=r"unexpected.*mtp\.layers.*save it without"):
        megatron_to_hf(tmp_path / "iter_0000005", tmp_path / "out", hf_config=static)
