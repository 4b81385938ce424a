"""What vLLM's plugin reads from ``config.json`` and refuses of the engine's arguments. vLLM itself is not needed."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from megatron_zeda.serving import vllm as plugin
from megatron_zeda.serving.vllm.settings import NEVER_CHOSEN, ZeroExperts, read_zero_experts

KEYS = {"zce_nums": [4], "zce_types": ["zero"], "use_zce_mask": False}
STATIC = {"architectures": ["Qwen3MoeForCausalLM"], "num_experts": 8, "num_experts_per_tok": 4}


def _asked(config: dict[str, Any], **changed: Any) -> Any:
    engine: dict[str, Any] = {"enable_eplb": False, "enable_elastic_ep": False, "lora": None, "captures": False}
    engine |= changed
    return SimpleNamespace(
        model_config=SimpleNamespace(hf_text_config=SimpleNamespace(**config)),
        aux_output_config=SimpleNamespace(enable_return_routed_experts=engine["captures"]),
        parallel_config=SimpleNamespace(
            enable_eplb=engine["enable_eplb"], enable_elastic_ep=engine["enable_elastic_ep"]
        ),
        lora_config=engine["lora"],
    )


def test_a_static_model_stays_vllms_own() -> None:
    assert read_zero_experts(_asked(STATIC, enable_eplb=True)) is None


def test_a_dynamic_model_under_its_native_name() -> None:
    found = read_zero_experts(_asked(STATIC | KEYS))
    assert found == ZeroExperts(num_real=8, num_zero=4, dial=0.0, renormalizes=False, latent_norm_eps=None)


def test_glm_names_its_experts_otherwise() -> None:
    config = {name: value for name, value in STATIC.items() if name != "num_experts"}
    config |= KEYS | {"n_routed_experts": 8, "n_group": 1, "zeda_latent_norm_eps": 1e-6, "zeda_renormalize": True}
    found = read_zero_experts(_asked(config | {"zeda_zero_logit_bias": float("-inf")}))
    assert found == ZeroExperts(num_real=8, num_zero=4, dial=NEVER_CHOSEN, renormalizes=True, latent_norm_eps=1e-6)


@pytest.mark.parametrize("key", sorted(KEYS))
@pytest.mark.parametrize("name", ["Qwen3MoeForCausalLM", "Qwen3MoePlusPlusForCausalLM"])
def test_a_missing_key_is_never_a_static_model(key: str, name: str) -> None:
    config = STATIC | {"architectures": [name]} | {other: value for other, value in KEYS.items() if other != key}
    with pytest.raises(ValueError, match=f"`{key}` is missing"):
        read_zero_experts(_asked(config))


def test_the_name_alone_makes_it_dynamic() -> None:
    with pytest.raises(ValueError, match="`zce_nums` is missing"):
        read_zero_experts(_asked(STATIC | {"architectures": ["Qwen3MoePlusPlusForCausalLM"]}))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"zce_types": ["copy"], "zeda_expert_type": "copy"}, "method `copy`; serve it with transformers"),
        ({"zeda_dynamic_skipping_beta": 0.0}, "method `dynamic_skipping`; serve it with transformers"),
        ({"zce_types": ["copy"]}, "`zce_types` must be"),
        ({"use_zce_mask": True}, "`use_zce_mask` must be false"),
        ({"approximate_experts": {}}, "zeda_hf_overrides.json"),
        ({"n_group": 4}, "`n_group`"),
    ],
)
def test_models_that_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_zero_experts(_asked(STATIC | KEYS | config))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"enable_eplb": True}, "without --enable-eplb"),
        ({"enable_elastic_ep": True}, "without --enable-eplb and --enable-elastic-ep"),
        ({"lora": object()}, "without --enable-lora"),
    ],
)
def test_engines_that_are_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_zero_experts(_asked(STATIC | KEYS, **changed))


def test_simulated_routing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_MOE_ROUTING_SIMULATION_STRATEGY", "uniform_random")
    with pytest.raises(ValueError, match="unset it"):
        read_zero_experts(_asked(STATIC | KEYS))


@pytest.mark.parametrize(("num_real", "refused"), [(252, False), (253, True), (256, True), (257, False)])
def test_ids_that_one_byte_cannot_hold(num_real: int, refused: bool) -> None:
    asked = _asked(STATIC | KEYS | {"num_experts": num_real}, captures=True)
    if refused:
        with pytest.raises(ValueError, match="in one byte"):
            read_zero_experts(asked)
    else:
        assert read_zero_experts(asked) is not None


def test_the_entry_point_names_classes_that_exist() -> None:
    import ast
    from importlib.metadata import entry_points
    from pathlib import Path

    (found,) = [point for point in entry_points(group="vllm.general_plugins") if point.name == "zeda"]
    assert found.load() is plugin.register
    tree = ast.parse((Path(plugin.__file__).parent / "models.py").read_text())
    assert set(plugin.MODELS.values()) <= {node.name for node in tree.body if isinstance(node, ast.ClassDef)}


@pytest.mark.parametrize(("version", "native"), [("0.32.0+cpu", True), ("0.33.1", True), ("0.34.0", False)])
def test_other_releases_keep_their_own_classes(monkeypatch: pytest.MonkeyPatch, version: str, native: bool) -> None:
    registered: dict[str, str] = {}
    logger = SimpleNamespace(warning_once=lambda *_: None)
    vllm = ModuleType("vllm")
    vllm.__dict__.update(__version__=version, ModelRegistry=SimpleNamespace(register_model=registered.__setitem__))
    log = ModuleType("vllm.logger")
    log.__dict__.update(init_logger=lambda name: logger)
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setitem(sys.modules, "vllm.logger", log)
    plugin.register()
    assert "Qwen3MoePlusPlusForCausalLM" in registered
    assert ("Qwen3MoeForCausalLM" in registered) is native
    assert (registered.keys() == plugin.MODELS.keys()) is native
