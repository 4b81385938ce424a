"""Configuration, injection and specs."""

from __future__ import annotations

import dataclasses
import sys
import types
from typing import Any

import pytest
import torch
from layers import E, K, Z, layer_config
from megatron.core.models.gpt import GPTModel

from megatron_zeda.zero_experts import (
    ZeroExpertMLATransformerConfig,
    draw_zero_entries,
    draw_zero_rows,
    get_zero_expert_block_spec,
    get_zero_expert_layer_spec,
    unsupported_settings,
    widen_gate,
)
from megatron_zeda.zero_experts.config import REFUSALS

# A setting that makes each refusal apply, keyed by the refusal's name: a new refusal without one fails the test below.
FLEX: dict[str, Any] = {"moe_token_dispatcher_type": "flex", "expert_model_parallel_size": 2}
NCCL_EP: dict[str, Any] = {**FLEX, "moe_flex_dispatcher_backend": "ncclep", "moe_expert_rank_capacity_factor": 2.0}
REFUSED: dict[str, dict[str, Any]] = {
    "moe_aux_loss_coeff": {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 1e-3},
    "moe_router_load_balancing_type=sinkhorn": {"moe_router_load_balancing_type": "sinkhorn"},
    "moe_router_load_balancing_type=quantile_balancing": {"moe_router_load_balancing_type": "quantile_balancing"},
    "moe_router_num_groups": {"moe_router_num_groups": 2, "moe_router_group_topk": 1},
    "moe_router_fusion with moe_enable_routing_replay": {"moe_router_fusion": True, "moe_enable_routing_replay": True},
    "moe_router_padding_for_quantization": {"moe_router_padding_for_quantization": True},
    "moe_pad_expert_input_to_capacity": {"moe_pad_expert_input_to_capacity": True, "moe_expert_capacity_factor": 1.0},
    "moe_pad_experts_for_cuda_graph_inference": {"moe_pad_experts_for_cuda_graph_inference": True},
    "moe_token_dispatcher_type=flex with one expert-parallel rank": {"moe_token_dispatcher_type": "flex"},
    "moe_expert_rank_capacity_factor missing with moe_flex_dispatcher_backend=ncclep": {
        **NCCL_EP,
        "bf16": True,
        "moe_expert_rank_capacity_factor": None,
    },
    "moe_flex_dispatcher_backend=ncclep without bf16": NCCL_EP,
    "moe_flex_dispatcher_backend=ncclep with a Transformer Engine whose ep_bootstrap needs num_topk": {
        **NCCL_EP,
        "bf16": True,
    },
    "moe_expert_rank_capacity_factor with moe_flex_dispatcher_backend=hybridep": {
        **FLEX,
        "moe_flex_dispatcher_backend": "hybridep",
        "moe_expert_rank_capacity_factor": 1.5,
    },
    "moe_ncclep_static_shape": {**NCCL_EP, "bf16": True, "moe_ncclep_static_shape": True},
    "moe_paged_stash": {**NCCL_EP, "bf16": True, "moe_paged_stash": True},
    "moe_shared_expert_overlap with moe_latent_size": {"moe_shared_expert_overlap": True, "moe_latent_size": 16},
    "mlp_chunks_for_training": {"mlp_chunks_for_training": 2},
    "overlap_moe_expert_parallel_comm": {"overlap_moe_expert_parallel_comm": True},
    "cuda_graph_impl": {"cuda_graph_impl": "transformer_engine"},
    "transformer_impl=inference_optimized": {"transformer_impl": "inference_optimized"},
}
# Old spellings that Megatron-Core translates, which are refused before that, too; and what a refusal covers besides.
ALIASES: dict[str, dict[str, Any]] = {
    "moe_router_num_groups": {"moe_router_topk_limited_devices": 2},
    "moe_router_padding_for_quantization": {"moe_router_padding_for_fp8": True},
    "cuda_graph_impl": {"enable_cuda_graph": True},
    "moe_ncclep_static_shape": {**NCCL_EP, "bf16": True, "moe_ncclep_zero_copy": True},
}
# Combinations that once were refused, or look like one that is.
SERVED: list[dict[str, Any]] = [
    {"moe_z_loss_coeff": 1e-3},
    {"moe_expert_capacity_factor": 1.0},
    {"moe_shared_expert_overlap": True, "moe_shared_expert_intermediate_size": 16},
    {"moe_layer_freq": [1]},
    {"mtp_num_layers": 1},
    {"moe_latent_size": 16},
    {"moe_router_fusion": True},
    {"moe_enable_routing_replay": True},
    {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.0},
    FLEX,
    {**FLEX, "moe_flex_dispatcher_backend": "hybridep", "expert_model_parallel_size": 1},
    {**NCCL_EP, "bf16": True},
    {"moe_ncclep_static_shape": True},  # of another dispatcher: without effect
    {**FLEX, "expert_model_parallel_size": 1, "expert_tensor_parallel_size": 2},
]


def _config_with(changes: dict[str, Any]) -> Any:
    """Fields as given: Megatron's own validation may object to a combination for reasons of its own."""
    config = layer_config()
    for name, value in changes.items():
        assert hasattr(config, name), name
        object.__setattr__(config, name, value)
    return config


@pytest.fixture(autouse=True)
def _transformer_engine_ep(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether Transformer Engine's NCCL-EP has to be told K (as in 2.20) is the test's, not this machine's."""
    new = "num_topk" in request.node.name
    bootstrap = (lambda group, num_experts, num_topk: None) if new else (lambda group, num_experts: None)
    module = types.ModuleType("transformer_engine.pytorch")
    module.ep = types.SimpleNamespace(ep_bootstrap=bootstrap)
    monkeypatch.setitem(sys.modules, "transformer_engine", types.ModuleType("transformer_engine"))
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", module)


@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda refusal: refusal.setting)
def test_every_refusal_refuses(refusal: Any) -> None:
    config = _config_with(REFUSED[refusal.setting])
    assert unsupported_settings(config) == [f"{refusal.setting}: {refusal.reason}; {refusal.alternative}"]
    assert hasattr(config, refusal.setting.split("=")[0].split()[0])  # what `zeda check` takes for the setting's name
    config.num_zero_experts = 0
    assert unsupported_settings(config) == []  # upstream's business


@pytest.mark.parametrize("setting", ALIASES)
def test_other_names_are_refused_alike(setting: str) -> None:
    assert [line.split(":")[0] for line in unsupported_settings(_config_with(ALIASES[setting]))] == [setting]


@pytest.mark.parametrize("changes", SERVED, ids=str)
def test_what_is_served_is_not_refused(changes: dict[str, Any]) -> None:
    assert unsupported_settings(_config_with(changes)) == []


@pytest.mark.parametrize("name", ["moe_aux_loss_coeff", "moe_pad_expert_input_to_capacity", "mlp_chunks_for_training"])
def test_construction_raises(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        layer_config(**REFUSED[name])


def test_all_problems_at_once_and_bad_values() -> None:
    with pytest.raises(ValueError) as error:
        layer_config(
            num_zero_experts=2, zero_expert_weight=0.0, zero_expert_balance_coeff=-1.0, mlp_chunks_for_training=2
        )
    for part in ("zero_expert_weight", "zero_expert_balance_coeff", "mlp_chunks_for_training"):
        assert part in str(error.value)
    with pytest.raises(ValueError, match="must not be negative"):
        layer_config(num_zero_experts=-1)
    with pytest.raises(ValueError, match="real experts"):
        layer_config(moe_router_topk=E + 1)


def test_fields_survive_replace() -> None:
    config = dataclasses.replace(layer_config(zero_expert_weight=3.0), num_layers=2)
    assert (config.num_zero_experts, config.zero_expert_weight) == (Z, 3.0)
    names = {field.name for field in dataclasses.fields(ZeroExpertMLATransformerConfig)}
    assert {"num_zero_experts", "zero_expert_weight", "q_lora_rank"} <= names


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_injected_rows_follow_the_columns(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    scale, shift = torch.linspace(0.1, 3.0, 64), torch.linspace(-2, 2, 64)
    gate = (torch.randn(128, 64, generator=generator) * scale + shift).to(dtype)
    rows = draw_zero_rows(gate, 4096, seed=7, name="model.layers.0.mlp.gate.weight")
    assert rows.dtype == dtype and rows.shape == (4096, 64)
    old, new = gate.double(), rows.double()
    # Standard errors of 4,096 draws: sigma / 64 for a mean, sigma / 90 for a deviation; five of them.
    assert ((new.mean(0) - old.mean(0)).abs() < 5 * old.std(0) / 64 + 1e-2 * (dtype == torch.bfloat16)).all()
    assert ((new.std(0) / old.std(0) - 1).abs() < 5 / 90).all()


@pytest.mark.parametrize("shift", [0.0, 7.0, -7.0])
def test_injected_selection_biases_stand_where_the_old_ones_do(shift: float) -> None:
    bias = 0.3 * torch.randn(64, generator=torch.Generator().manual_seed(0)) + shift
    entries = draw_zero_entries(bias, 4096, seed=7, name="bias")
    assert entries.dtype == torch.float32 and entries.shape == (4096,)
    assert abs(entries.double().mean() - bias.double().mean()) < 5 * bias.std() / 64
    assert abs(entries.double().std() / bias.double().std() - 1) < 5 / 90
    torch.testing.assert_close(draw_zero_entries(bias + 1, 4096, seed=7, name="bias"), entries + 1, atol=1e-5, rtol=0)
    assert not entries.equal(draw_zero_entries(bias, 4096, seed=7, name="other"))
    assert draw_zero_entries(torch.full((4,), 3.0), 2, seed=0, name="bias").equal(torch.full((2,), 3.0))


def test_injection_is_seeded_by_seed_and_name_only() -> None:
    gate = torch.randn(16, 8)
    draw = lambda seed, name: draw_zero_rows(gate, 4, seed=seed, name=name)  # noqa: E731
    torch.manual_seed(123)
    first = draw(0, "a")
    torch.randn(10)
    assert torch.equal(draw(0, "a"), first)
    assert not torch.equal(draw(1, "a"), first)
    assert not torch.equal(draw(0, "b"), first)
    wide = widen_gate(gate, 4, seed=0, name="a")
    assert torch.equal(wide[:16], gate) and torch.equal(wide[16:], first)


def test_injection_bad_input() -> None:
    with pytest.raises(ValueError, match="not all finite"):
        draw_zero_rows(torch.full((4, 4), float("nan")), 2, seed=0, name="gate")
    with pytest.raises(ValueError, match="2 or more"):
        draw_zero_rows(torch.zeros(1, 4), 2, seed=0, name="gate")
    with pytest.raises(ValueError, match="positive"):
        draw_zero_rows(torch.randn(4, 4), 0, seed=0, name="gate")
    with pytest.raises(ValueError, match="2 or more"):
        draw_zero_entries(torch.zeros(1), 2, seed=0, name="bias")
    with pytest.raises(ValueError, match="not all finite"):
        draw_zero_entries(torch.full((4,), float("inf")), 2, seed=0, name="bias")


@pytest.mark.usefixtures("megatron")
def test_checkpoint_names_are_transformer_engines() -> None:
    config = layer_config(num_layers=2)
    model = GPTModel(config, get_zero_expert_layer_spec(config), vocab_size=64, max_sequence_length=32)
    keys = {tensor.key for tensor in model.sharded_state_dict().values() if hasattr(tensor, "key")}
    prefix = "decoder.layers."
    assert {
        prefix + "self_attention.linear_qkv.layer_norm_weight",
        prefix + "pre_mlp_layernorm.weight",
        prefix + "mlp.router.weight",
        prefix + "mlp.experts.experts.linear_fc1.weight",
        prefix + "mlp.experts.experts.linear_fc2.weight",
    } <= keys
    assert not any("input_layernorm" in key or "mlp.linear_fc1" in key for key in keys)


def test_an_unknown_form_of_spec_is_not_silently_static(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core.models.gpt import gpt_layer_specs
    from megatron.core.transformer.moe.moe_layer import MoELayer
    from megatron.core.transformer.spec_utils import ModuleSpec

    stock = gpt_layer_specs.get_gpt_layer_local_spec

    def older_form(**settings: Any) -> ModuleSpec:
        spec = stock(**settings)
        if settings["num_experts"]:
            spec.submodules.mlp = ModuleSpec(module=MoELayer, submodules=spec.submodules.mlp.keywords["submodules"])
        return spec

    monkeypatch.setattr(gpt_layer_specs, "get_gpt_layer_local_spec", older_form)
    with pytest.raises(RuntimeError, match="another way"):
        get_zero_expert_layer_spec(layer_config())
    for frequency in ([0, 0, 1], 2):  # models with dense layers, too
        config = layer_config(num_layers=3, moe_layer_freq=frequency)
        with pytest.raises(RuntimeError, match="another way"):
            get_zero_expert_block_spec(config, pp_rank=0)


# What a configuration can ask of Transformer Engine's layer spec, each away from its default.
SPEC_SETTINGS: dict[str, Any] = {
    "moe_grouped_gemm": False,
    "qk_layernorm": True,
    "qk_l2_norm": True,
    "use_te_activation_func": True,
    "use_kitchen": True,
    "use_kitchen_attention": True,
    "kitchen_attention_backend": "fa",
    "mla_down_proj_fusion": True,
}


@pytest.mark.parametrize("changes", [{}, *({name: value} for name, value in SPEC_SETTINGS.items())], ids=str)
def test_both_specs_ask_transformer_engine_for_the_same_layer(
    changes: dict[str, Any], megatron: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Transformer Engine is not needed: what counts is which arguments upstream's function gets."""
    from megatron.core.models.gpt import gpt_layer_specs

    asked: list[dict[str, Any]] = []

    def transformer_engine_spec(**settings: Any) -> Any:
        asked.append(settings)
        return gpt_layer_specs.get_gpt_layer_local_spec(num_experts=settings["num_experts"])

    monkeypatch.setattr(gpt_layer_specs, "get_gpt_layer_with_transformer_engine_spec", transformer_engine_spec)
    config = layer_config()
    for name, value in changes.items():
        object.__setattr__(config, name, value)
    built = []
    for build in (get_zero_expert_layer_spec, get_zero_expert_block_spec):
        asked.clear()
        build(config, use_transformer_engine=True)
        built.append([settings for settings in asked if settings["num_experts"]])
    assert built[0] == built[1] and len(built[0]) == 1
    assert changes.items() <= built[0][0].items()


@pytest.mark.usefixtures("megatron")
def test_latent_attention_configuration_builds_the_same_layer() -> None:
    fields = {field.name: getattr(layer_config(), field.name) for field in dataclasses.fields(layer_config())}
    config = ZeroExpertMLATransformerConfig(**{**fields, "multi_latent_attention": True, "num_query_groups": 4})
    layer = get_zero_expert_layer_spec(config).submodules.mlp(config=config)
    assert layer.router.weight.shape[0] == E + Z and layer.router.num_real_experts == E


def test_specs_say_what_they_cannot_do() -> None:
    with pytest.raises(ValueError, match="num_moe_experts"):
        get_zero_expert_layer_spec(layer_config(num_moe_experts=None, num_zero_experts=0, moe_ffn_hidden_size=None))
    with pytest.raises(ValueError, match="get_zero_expert_block_spec"):
        get_zero_expert_layer_spec(layer_config(num_layers=2, moe_layer_freq=[0, 1]))


@pytest.mark.usefixtures("megatron")
def test_block_spec_mixes_dense_and_dynamic_layers() -> None:
    config = layer_config(num_layers=2, moe_layer_freq=[0, 1])
    model = GPTModel(config, get_zero_expert_block_spec(config), vocab_size=64, max_sequence_length=32)
    kinds = [type(layer.mlp).__name__ for layer in model.decoder.layers]
    assert kinds == ["MLP", "ZeroExpertMoELayer"]
    assert model.decoder.layers[1].mlp.router.weight.shape[0] == E + Z
    assert K <= E
