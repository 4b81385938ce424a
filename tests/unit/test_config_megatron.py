"""What a run passes to Megatron-Core, what it asks of batches, and what it asks of the machine."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_zeda import platform
from megatron_zeda.config import Config
from megatron_zeda.config_machine import unavailable_here
from megatron_zeda.config_megatron import (
    length_multiple,
    micro_batch_multiple,
    setting_of,
    transformer_config,
    transformer_settings,
    zero_expert_refusals,
)
from megatron_zeda.errors import InputError
from megatron_zeda.training import banner, checkpoint, setup

SHAPE = json.loads((Path(__file__).parents[2] / "examples/qwen3_30b_a3b/config.json").read_text())


def make(**model: Any) -> Config:
    config = Config()
    return replace(config, model=replace(config.model, **model))


def test_virtual_stages_exchange_messages_one_by_one() -> None:
    """In one batch two processes receive them in the wrong order (see test_training_layouts for what that does)."""
    settings = transformer_settings(
        make(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2), dict(SHAPE)
    )
    assert settings["virtual_pipeline_model_parallel_size"] == 2
    assert settings["overlap_p2p_comm"] is True and settings["batch_p2p_comm"] is False
    assert "overlap_p2p_comm" not in transformer_settings(make(pipeline_model_parallel_size=2), dict(SHAPE))


def test_fp8_is_passed_on_and_parameters_stay_bf16() -> None:
    settings = transformer_settings(make(fp8="hybrid", fp8_recipe="blockwise"), dict(SHAPE))
    assert (settings["fp8"], settings["fp8_recipe"]) == ("hybrid", "blockwise")
    assert settings["params_dtype"] is torch.bfloat16 and settings["moe_router_dtype"] == "fp32"
    assert "fp8_param" not in settings
    assert "fp8" not in transformer_settings(make(), dict(SHAPE))


@pytest.mark.parametrize("there", [True, False])
def test_fused_kernels_are_used_where_they_are(there: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "have_transformer_engine", lambda: there)

    def found(**model: Any) -> tuple[bool, bool]:
        settings = transformer_settings(make(**model), dict(SHAPE))
        return settings["moe_permute_fusion"], settings["moe_grouped_gemm"]

    assert found() == (there, there)
    off = {"moe_permute_fusion": False, "overrides": {"moe_grouped_gemm": False}}
    assert found(**off) == (False, False) and found(moe_permute_fusion=True) == (True, there)
    # To turn a kernel off needs nothing.
    monkeypatch.setattr(platform, "transformer_config_overrides", lambda: {"gradient_accumulation_fusion": True})
    assert unavailable_here(make(overrides={"gradient_accumulation_fusion": False})) == []


@pytest.mark.parametrize(
    ("model", "multiple"),
    [
        ({}, 8),
        ({"tensor_model_parallel_size": 4}, 8),
        ({"tensor_model_parallel_size": 3}, 24),
        ({"context_parallel_size": 2}, 16),
        ({"tensor_model_parallel_size": 2, "context_parallel_size": 4}, 32),
        ({"fp8": "hybrid", "fp8_recipe": "tensorwise"}, 16),
        ({"fp8": "hybrid", "fp8_recipe": "mxfp8", "tensor_model_parallel_size": 4}, 128),
        ({"fp8": "e4m3", "fp8_recipe": "blockwise", "context_parallel_size": 2}, 256),
    ],
)
def test_lengths_suit_every_part_of_a_sequence(model: dict[str, Any], multiple: int) -> None:
    config = make(**model)
    assert length_multiple(config) == multiple
    # Two chunks a context-parallel rank, each rank's part cut over the tensor-parallel ranks.
    parts = config.model.tensor_model_parallel_size * config.model.context_parallel_size
    assert multiple % parts == 0 and multiple % (2 * config.model.context_parallel_size) == 0


def test_interleaved_pipelines_work_on_groups_of_micro_batches() -> None:
    virtual = {"pipeline_model_parallel_size": 4, "virtual_pipeline_model_parallel_size": 2}
    assert micro_batch_multiple(make(pipeline_model_parallel_size=4)) == 1
    assert micro_batch_multiple(make(**virtual)) == 4
    assert micro_batch_multiple(make(**virtual, overrides={"microbatch_group_size_per_vp_stage": 6})) == 6


def test_refusals_name_the_setting_of_the_user() -> None:
    config = make(moe_token_dispatcher_type="flex", overrides={"moe_router_num_groups": 4, "no_such_field": 1})
    found = dict(zero_expert_refusals(config, dict(SHAPE), without=["no_such_field"]))
    # The flex dispatcher moves tokens between ranks: it is refused where there is one.
    assert found.keys() == {"model.overrides.moe_router_num_groups", "model.moe_token_dispatcher_type"}
    assert all("; " in message for message in found.values())  # with what to do instead
    assert zero_expert_refusals(make(), dict(SHAPE)) == []
    assert setting_of("bf16") == "model.bf16" and setting_of("moe_z_loss_coeff") == "model.overrides.moe_z_loss_coeff"


def test_refusals_do_not_hide_behind_megatrons_own() -> None:
    """Megatron-Core alone would stop at the first of them."""
    overrides = {"cpu_offloading": True, "moe_router_num_groups": 4, "transformer_impl": "inference_optimized"}
    config = make(overrides=overrides)
    keys = {key for key, _ in zero_expert_refusals(config, dict(SHAPE))}
    assert keys == {"model.overrides.moe_router_num_groups", "model.overrides.transformer_impl"}
    with pytest.raises(InputError) as caught:
        transformer_config(config, dict(SHAPE), where=Path("model"))
    assert "moe_router_num_groups" not in str(caught.value)


# ---- the machine -----------------------------------------------------------------------------------------------------


def test_what_needs_a_gpu_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "have_transformer_engine", lambda: False)
    monkeypatch.setattr(platform, "device", lambda: torch.device("cpu"))
    monkeypatch.setattr(platform, "transformer_config_overrides", dict)
    assert unavailable_here(make()) == []
    [line] = unavailable_here(make(fp8="hybrid", fp8_recipe="tensorwise"))
    assert line.startswith('model.fp8: "hybrid" needs Transformer Engine and a GPU')
    [line] = unavailable_here(make(recompute_granularity="selective", recompute_modules=["moe", "moe_act"]))
    assert line.startswith("model.recompute_modules: moe_act needs Transformer Engine")
    [line] = unavailable_here(make(moe_token_dispatcher_type="flex"))
    assert line.startswith("model.moe_token_dispatcher_type: ") and "DeepEP" in line and "alltoall" in line
    [line] = unavailable_here(
        make(moe_token_dispatcher_type="flex", overrides={"moe_flex_dispatcher_backend": "ncclep"})
    )
    assert "NCCL-EP" in line


@pytest.mark.parametrize(("supported", "lines"), [(True, 0), (False, 1)])
def test_transformer_engine_judges_the_recipe(supported: bool, lines: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(return_reason: bool) -> tuple[bool, str]:
        raise AssertionError("another recipe was asked for")

    engine = SimpleNamespace(
        is_fp8_available=never,
        is_mxfp8_available=never,
        is_fp8_block_scaling_available=lambda return_reason: (supported, "" if supported else "needs Hopper"),
    )
    monkeypatch.setitem(sys.modules, "transformer_engine", SimpleNamespace(pytorch=engine))
    monkeypatch.setattr(platform, "have_transformer_engine", lambda: True)
    monkeypatch.setattr(platform, "transformer_config_overrides", dict)
    found = unavailable_here(make(fp8="hybrid", fp8_recipe="blockwise"))
    assert len(found) == lines
    assert all(line == "model.fp8_recipe: blockwise cannot be used on this GPU: needs Hopper" for line in found)


@pytest.mark.parametrize("engine", [False, True])
def test_sequences_are_shared_in_bf16_where_transformer_engine_attends(
    engine: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "have_transformer_engine", lambda: engine)
    monkeypatch.setattr(platform, "transformer_config_overrides", dict)
    found = unavailable_here(make(bf16=False, context_parallel_size=2))
    assert [line.split(":")[0] for line in found] == (["model.bf16"] if engine else [])
    assert not unavailable_here(make(bf16=False)) and not unavailable_here(make(context_parallel_size=2))


@pytest.mark.parametrize("recipe", ["blockwise", "delayed"])
def test_a_recipe_that_transformer_engine_does_not_have(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    older = SimpleNamespace(is_fp8_available=lambda return_reason: (True, ""))
    monkeypatch.setitem(sys.modules, "transformer_engine", SimpleNamespace(pytorch=older))
    monkeypatch.setattr(platform, "have_transformer_engine", lambda: True)
    monkeypatch.setattr(platform, "transformer_config_overrides", dict)
    [line] = unavailable_here(make(fp8="hybrid", fp8_recipe=recipe))
    assert line == f"model.fp8_recipe: {recipe} is not in this Transformer Engine"


@pytest.mark.parametrize(
    ("backend", "flag"), [("deepep", "HAVE_DEEP_EP"), ("hybridep", "HAVE_HYBRIDEP"), ("ncclep", "HAVE_TE_EP")]
)
def test_dispatchers_are_there_when_megatron_core_could_import_them(
    backend: str, flag: str, monkeypatch: pytest.MonkeyPatch, megatron: None
) -> None:
    """An installed package is not enough: DeepEP without HybridEP, Transformer Engine without NCCL-EP."""
    from megatron.core.transformer.moe import fused_a2a

    monkeypatch.setattr(platform, "device", lambda: torch.device("cuda"))
    monkeypatch.setattr(platform, "transformer_config_overrides", dict)
    config = make(moe_token_dispatcher_type="flex", overrides={"moe_flex_dispatcher_backend": backend})
    for name in ("HAVE_DEEP_EP", "HAVE_HYBRIDEP", "HAVE_TE_EP"):
        monkeypatch.setattr(fused_a2a, name, name != flag)
    [line] = unavailable_here(config)
    assert line.startswith(f'model.moe_token_dispatcher_type: "flex" with backend {backend}')
    monkeypatch.setattr(fused_a2a, flag, True)
    assert unavailable_here(config) == []


def test_a_library_that_is_not_there_is_an_error_of_the_settings(
    monkeypatch: pytest.MonkeyPatch, megatron: None
) -> None:
    def build(*_: Any, **__: Any) -> Any:
        raise ImportError("DeepEP is not installed")

    monkeypatch.setattr(setup, "build_gpt_model", build)
    settings = SimpleNamespace(virtual_pipeline_model_parallel_size=None)
    with pytest.raises(InputError, match="DeepEP is not installed") as caught:
        setup.build_chunks({}, settings)
    assert "alltoall" in str(caught.value)


# ---- the banner ------------------------------------------------------------------------------------------------------


def kernels(**changes: Any) -> list[str]:
    settings = {
        "transformer_impl": "transformer_engine",
        "moe_grouped_gemm": True,
        "moe_permute_fusion": True,
        "moe_router_fusion": True,
        "apply_rope_fusion": True,
        "gradient_accumulation_fusion": True,
        "fp8": None,
        "fp8_recipe": "delayed",
    }
    return banner.kernel_lines(SimpleNamespace(**settings | changes))


def test_the_banner_names_the_kernels_and_what_their_absence_means() -> None:
    [line] = kernels()
    assert line.endswith(
        "Transformer Engine, grouped GEMM, permute fusion, router fusion, fused RoPE, fused weight gradient"
    )
    there, absent = kernels(gradient_accumulation_fusion=False)
    assert "fused weight gradient" not in there
    assert "by rounding only: fused weight gradient (" in absent and "apex" in absent
    fused = "moe_grouped_gemm moe_permute_fusion moe_router_fusion apply_rope_fusion gradient_accumulation_fusion"
    there, _ = kernels(transformer_impl="local", **dict.fromkeys(fused.split(), False))
    assert there == "fused kernels: none"


def test_a_checkpoint_says_that_fp8_is_compute_only() -> None:
    precision = checkpoint._precision(make(fp8="hybrid", fp8_recipe="tensorwise"))
    assert precision == {"parameters": "bf16", "compute": "fp8 hybrid tensorwise"}


def test_the_banner_says_that_fp8_is_compute_only() -> None:
    assert kernels(fp8="hybrid", fp8_recipe="tensorwise")[-1] == (
        "FP8: hybrid, tensorwise: linear layers compute in it, the router in fp32; "
        "parameters and checkpoints stay in bf16"
    )
