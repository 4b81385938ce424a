"""What the plugin refuses before a model is built, in vLLM's own configuration classes: a renamed option is seen here.

That a refusal stops a running engine is in ``test_vllm_serving.py``.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from transformers import Glm4MoeLiteConfig, Qwen3MoeConfig
from vllm.config import ParallelConfig
from vllm.config.aux_output import AuxOutputConfig

from megatron_zeda.serving.vllm.settings import NEVER_CHOSEN, read_zero_experts

KEYS: dict[str, Any] = {"zce_nums": [4], "zce_types": ["zero"], "use_zce_mask": False}
NATIVE = {"architectures": ["Qwen3MoeForCausalLM"]}


def _engine(config: Any = None, **changed: Any) -> SimpleNamespace:
    """What the plugin reads of vLLM's configuration, for a model of 8 + 4 experts; ``None`` removes a key."""
    if config is None:
        keys = {"architectures": ["Qwen3MoePlusPlusForCausalLM"], "num_experts": 8} | KEYS | changed
        config = Qwen3MoeConfig(**{key: value for key, value in keys.items() if value is not None})
    return SimpleNamespace(
        model_config=SimpleNamespace(hf_text_config=config),
        parallel_config=ParallelConfig(),
        aux_output_config=AuxOutputConfig(),
        lora_config=None,
    )


def _refused(engine: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        read_zero_experts(engine)
    assert "\n" not in str(caught.value)


def test_what_is_read() -> None:
    for names in ({}, NATIVE):
        found = read_zero_experts(_engine(**names))
        assert found is not None
        assert (found.num_real, found.num_zero, found.dial, found.renormalizes) == (8, 4, 0.0, False)
        assert found.latent_norm_eps is None
    glm = Glm4MoeLiteConfig(**KEYS, n_routed_experts=8, zeda_latent_norm_eps=1e-5, zeda_zero_logit_bias=-float("inf"))
    found = read_zero_experts(_engine(glm))
    assert found is not None
    assert (found.num_real, found.latent_norm_eps, found.dial) == (8, 1e-5, NEVER_CHOSEN)


def test_a_static_model_is_left_alone() -> None:
    engine = _engine(**NATIVE, zce_nums=None, zce_types=None, use_zce_mask=None)
    engine.parallel_config.enable_eplb = True
    assert read_zero_experts(engine) is None


@pytest.mark.parametrize("names", [{}, NATIVE], ids=["own name", "native name"])
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"zce_nums": None}, "`zce_nums` is missing"),
        ({"zce_types": None}, "`zce_types` is missing"),
        ({"use_zce_mask": None}, "`use_zce_mask` is missing"),
        ({"zce_nums": [4, 4]}, "`zce_nums` must be a list of one positive integer"),
        ({"zce_types": ["copy"]}, "`zce_types` must be"),
        ({"use_zce_mask": True}, "`use_zce_mask` must be false"),
        ({"zeda_expert_type": "copy", "zce_types": ["copy"]}, "does not run method `copy`"),
        ({"zeda_dynamic_skipping_beta": 0.3, "zce_nums": None}, "does not run method `dynamic_skipping`"),
        ({"approximate_experts": {"0": [8]}}, "`approximate_experts` beside zero experts"),
        ({"n_group": 2}, "`n_group`"),
    ],
)
def test_keys_that_are_refused(names: dict[str, Any], changed: dict[str, Any], message: str) -> None:
    _refused(_engine(**names, **changed), message)


def test_every_key_missing_under_the_own_name_is_refused() -> None:
    _refused(_engine(zce_nums=None, zce_types=None, use_zce_mask=None), "`zce_nums` is missing")


@pytest.mark.parametrize("option", ["enable_eplb", "enable_elastic_ep"])
def test_moving_experts_is_refused(option: str) -> None:
    engine = _engine()
    assert getattr(engine.parallel_config, option) is False  # vLLM's own name and default
    setattr(engine.parallel_config, option, True)
    _refused(engine, "without --enable-eplb and --enable-elastic-ep")


def test_lora_is_refused() -> None:
    engine = _engine()
    engine.lora_config = object()
    _refused(engine, "without --enable-lora")


def test_simulated_routing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm import envs

    assert "VLLM_MOE_ROUTING_SIMULATION_STRATEGY" in envs.environment_variables
    monkeypatch.setenv("VLLM_MOE_ROUTING_SIMULATION_STRATEGY", "uniform_random")
    _refused(_engine(), "unset it")


@pytest.mark.parametrize(("num_real", "refused"), [(8, False), (252, False), (256, True), (257, False)])
def test_reports_that_have_no_room_for_the_ids(num_real: int, refused: bool) -> None:
    engine = _engine(num_experts=num_real)
    engine.aux_output_config = AuxOutputConfig(enable_return_routed_experts=True)
    if refused:
        _refused(engine, "in one byte")
    else:
        assert read_zero_experts(engine) is not None
