"""The FLOP model against torch's own count of stock models, and against a count over every matrix product."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import load_hf_model, make_hf
from torch.utils.flop_counter import FlopCounterMode

from megatron_zeda.conversion import inject_zero_experts
from megatron_zeda.errors import InputError
from megatron_zeda.evaluation.flops import (
    ModelShape,
    expert_flops_saved,
    model_speedup,
    speedup_by_length,
    theoretical_speedup,
)
from megatron_zeda.evaluation.skip_rate import RoutingRecorder
from megatron_zeda.models import load_hf_config

QWEN_CONFIG: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoePlusPlusForCausalLM"],
    "vocab_size": 151936,
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "max_position_embeddings": 40960,
    "zce_nums": [64],
    "zce_types": ["zero"],
    "use_zce_mask": False,
}
QWEN = ModelShape.from_hf_config(QWEN_CONFIG)
IDS = torch.arange(2 * 13).reshape(2, 13) * 7 % 64


def product(rows: int, inner: int, columns: int) -> int:
    """FLOPs of ``[rows, inner] @ [inner, columns]``: one multiplication and one addition per term."""
    return 2 * rows * inner * columns


def qwen_layer(tokens: int, keys: list[int], real_slots: int, columns: int) -> int:
    """Count a layer of Qwen3-30B-A3B product by product: ``keys[i]`` keys are read by token i."""
    total = product(tokens, 2048, 4096)  # queries
    total += 2 * product(tokens, 2048, 512)  # keys and values
    total += product(tokens, 4096, 2048)  # output
    for count in keys:
        total += 32 * (product(1, 128, count) + product(1, count, 128))  # scores and mixing
    total += product(tokens, 2048, columns)  # router
    total += real_slots * 3 * product(1, 2048, 768)  # gate, up and down projections
    return total


@pytest.mark.parametrize("length", [1, 7])
def test_prefill_is_the_direct_count(length: int) -> None:
    static = 48 * qwen_layer(length, [length] * length, 8 * length, 128)
    assert QWEN.static().prefill_flops(length) == static
    half = 48 * qwen_layer(length, [length] * length, 4 * length, 192)
    assert QWEN.prefill_flops(length, 0.5) == pytest.approx(half, rel=1e-12)


@pytest.mark.parametrize(("length", "prefix"), [(1, 0), (9, 0), (4, 30)])
def test_decode_is_the_direct_count(length: int, prefix: int) -> None:
    keys = [prefix + i for i in range(length)]
    wanted = 48 * qwen_layer(length, keys, 4 * length, 192)
    assert QWEN.decode_flops(length, 0.5, prefix=prefix) == pytest.approx(wanted, rel=1e-12)


def counted(model: Any) -> int:
    """What torch counts in a forward pass without the head; ``eager`` because its fused kernels hide products."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.model(IDS)
    return counter.get_total_flops()


@pytest.mark.parametrize("family", ["qwen3_moe", "glm4_moe_lite", "glm4_moe"])
def test_prefill_is_what_torch_counts(tmp_path: Path, family: str) -> None:
    make_hf(tmp_path / "static", family=family, num_hidden_layers=3)
    inject_zero_experts(tmp_path / "static", tmp_path / "dynamic", num_zero_experts=3)
    options = {"attn_implementation": "eager", "experts_implementation": "eager"}
    rows, length = IDS.shape
    static, dynamic = (ModelShape.from_hf_config(load_hf_config(tmp_path / name)) for name in ("static", "dynamic"))
    assert dynamic.static() == static
    found = counted(load_hf_model(tmp_path / "static", **options))
    assert found == pytest.approx(rows * static.prefill_flops(length), rel=1e-12)
    model = load_hf_model(tmp_path / "dynamic", **options)
    with RoutingRecorder(model) as recorder:
        found = counted(model)
        skip_rate = float(recorder.zero_slots(IDS).double().mean()) / dynamic.topk
    assert 0.1 < skip_rate < 0.9
    assert found == pytest.approx(rows * dynamic.prefill_flops(length, skip_rate), rel=1e-12)


def speedup(shape: ModelShape, skip_rate: float, *, prompt: int, response: int) -> dict[str, float]:
    return model_speedup(
        shape, prompt_skip_rate=skip_rate, response_skip_rate=skip_rate, prompt=prompt, response=response
    )


def test_prefill_and_decode_have_their_own_skip_rates() -> None:
    found = model_speedup(QWEN, prompt_skip_rate=0.8, response_skip_rate=0.3, prompt=50, response=20)
    assert found["prefill"] == speedup(QWEN, 0.8, prompt=50, response=20)["prefill"]
    assert found["decode"] == speedup(QWEN, 0.3, prompt=50, response=20)["decode"]
    static = QWEN.static()
    wanted = static.prefill_flops(50) + static.decode_flops(20, prefix=50)
    wanted /= QWEN.prefill_flops(50, 0.8) + QWEN.decode_flops(20, 0.3, prefix=50)
    assert found["total"] == pytest.approx(wanted, rel=1e-12)


def test_worked_shape() -> None:
    """Qwen3-30B-A3B: 75.5 MFLOP of experts per token and layer, and the prefill ratios of half of them skipped."""
    assert QWEN.expert_flops(1) == 48 * 6 * 8 * 2048 * 768 == 48 * 75_497_472
    for length, wanted in ((1, 1.49), (4096, 1.26)):
        found = speedup(QWEN, 0.5, prompt=length, response=1)["prefill"]
        projections, scores = 4 * 9 / 8 * 2048 * 4096, 4 * length * 4096
        static = 75_497_472 + 2 * 128 * 2048 + projections + scores
        dynamic = 75_497_472 / 2 + 2 * 192 * 2048 + projections + scores
        assert found == pytest.approx(static / dynamic, rel=1e-12)
        assert found == pytest.approx(wanted, abs=0.005)


def test_worked_shape_of_glm() -> None:
    """GLM-4.7-Flash by hand: 46 layers of 64 experts beside a shared one, one dense layer, latent attention."""
    from test_models_glm4_moe_lite import GLM_47_FLASH

    shape = ModelShape.from_hf_config(GLM_47_FLASH)
    attention = 2048 * 768 + 768 * 20 * 256 + 2048 * (512 + 64) + 512 * 20 * (192 + 256) + 20 * 256 * 2048
    assert shape.fixed == 47 * attention + 46 * 3 * 2048 * 1536 + 3 * 2048 * 10240
    assert shape.expert == 46 * 3 * 2048 * 1536
    assert shape.router_column == 46 * 2048
    assert shape.scores == 47 * 20 * (256 + 256)
    assert (shape.experts, shape.topk) == (64, 4)


def test_speedup_of_nothing_skipped_is_the_price_of_the_wider_router() -> None:
    found = speedup(QWEN, 0.0, prompt=100, response=100)
    assert all(0.99 < value < 1 for value in found.values())
    static = QWEN.static()
    assert speedup(static, 0.0, prompt=3, response=2) == {"prefill": 1.0, "decode": 1.0, "total": 1.0}


def test_expert_flops_saved() -> None:
    assert expert_flops_saved(real_rows=30, tokens=10, topk=4) == 0.25
    assert expert_flops_saved(real_rows=40, tokens=10, topk=4) == 0.0


LAYER: dict[str, Any] = {
    "hidden_size": 2,
    "attention_size": 4,
    "kv_ratio": 0.5,
    "expert_size": 3,
    "num_experts": 4,
    "num_zero_experts": 2,
    "topk": 2,
    "skip_rate": 0.5,
    "seq_length": 3,
    "stage": "prefill",
}


def test_the_papers_layer_by_hand() -> None:
    # Experts 216 or 108, router 48 or 72, projections 144; scores 144 in prefill, 48 in decode.
    assert theoretical_speedup(**LAYER) == (216 + 48 + 144 + 144) / (108 + 72 + 144 + 144)
    assert theoretical_speedup(**LAYER | {"stage": "decode"}) == (216 + 48 + 144 + 48) / (108 + 72 + 144 + 48)
    assert theoretical_speedup(**LAYER | {"skip_rate": 0.0, "num_zero_experts": 0}) == 1.0
    assert theoretical_speedup(**LAYER | {"skip_rate": 0.0}) == (216 + 48 + 288) / (216 + 72 + 288)


def test_the_papers_layer_at_the_size_of_qwen() -> None:
    """The paper's shape and skip rate; a model of 48 such layers gives the same."""
    sizes = {"hidden_size": 2048, "attention_size": 4096, "kv_ratio": 1 / 8, "expert_size": 768}
    sizes |= {"num_experts": 128, "num_zero_experts": 64, "topk": 8, "skip_rate": 0.512}
    prefill, decode = (theoretical_speedup(**sizes, seq_length=8192, stage=stage) for stage in ("prefill", "decode"))
    # Per token, in MFLOP: experts 75.497, router 0.524 or 0.786, projections 37.749, scores 134.218 or half of it.
    assert prefill == pytest.approx((75.497 + 0.524 + 37.749 + 134.218) / (36.843 + 0.786 + 37.749 + 134.218), abs=1e-5)
    assert decode == pytest.approx((75.497 + 0.524 + 37.749 + 67.101) / (36.843 + 0.786 + 37.749 + 67.101), abs=1e-5)
    (row,) = speedup_by_length(QWEN, prompt_skip_rate=0.512, response_skip_rate=0.512, lengths=[8192])
    assert row == pytest.approx({"seq_length": 8192, "prefill": prefill, "decode": decode}, rel=1e-12)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("skip_rate", 1.5),
        ("skip_rate", -0.1),
        ("skip_rate", float("nan")),
        ("stage", "training"),
        ("seq_length", 0),
        ("kv_ratio", 8),
        ("topk", 5),
        ("num_zero_experts", -1),
    ],
)
def test_what_the_papers_layer_refuses(name: str, value: Any) -> None:
    with pytest.raises(InputError, match=f"{name}: out of range"):
        theoretical_speedup(**LAYER | {name: value})
