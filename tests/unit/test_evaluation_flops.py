"""The FLOP model against a count over every matrix product of a layer."""

from __future__ import annotations

import pytest

from megatron_zeda.evaluation.flops import LayerShape, expert_flops_saved, theoretical_speedup

QWEN = LayerShape(hidden=2048, attention=4096, kv_share=1 / 8, expert_hidden=768, experts=128, topk=8, zero_experts=64)
SMALL = LayerShape(hidden=12, attention=24, kv_share=1 / 3, expert_hidden=5, experts=6, topk=2, zero_experts=3)


def product(rows: int, inner: int, columns: int) -> int:
    """FLOPs of ``[rows, inner] @ [inner, columns]``: one multiplication and one addition per term."""
    return 2 * rows * inner * columns


def direct_layer(shape: LayerShape, tokens: int, keys: list[int], real_slots: int) -> int:
    """Count a layer product by product: ``keys[i]`` keys are read by token i."""
    heads = 32 if shape.hidden == 2048 else 3
    head_dim = shape.attention // heads
    kv_width = round(shape.kv_share * shape.attention)
    total = product(tokens, shape.hidden, shape.attention)  # queries
    total += 2 * product(tokens, shape.hidden, kv_width)  # keys and values
    total += product(tokens, shape.attention, shape.hidden)  # output
    for count in keys:
        total += heads * (product(1, head_dim, count) + product(1, count, head_dim))  # scores and mixing
    total += product(tokens, shape.hidden, shape.experts + shape.zero_experts)  # router
    total += real_slots * 3 * product(1, shape.hidden, shape.expert_hidden)  # gate, up and down projections
    return total


@pytest.mark.parametrize("shape", [QWEN, SMALL])
@pytest.mark.parametrize("length", [1, 7])
def test_prefill_is_the_direct_count(shape: LayerShape, length: int) -> None:
    slots = shape.topk * length
    static = direct_layer(shape.static(), length, [length] * length, slots)
    assert shape.static().prefill_flops(length) == static
    half = direct_layer(shape, length, [length] * length, slots // 2)
    assert shape.prefill_flops(length, 0.5) == pytest.approx(half, rel=1e-12)


@pytest.mark.parametrize("shape", [QWEN, SMALL])
@pytest.mark.parametrize(("length", "prefix"), [(1, 0), (9, 0), (4, 30)])
def test_decode_is_the_direct_count(shape: LayerShape, length: int, prefix: int) -> None:
    keys = [prefix + i for i in range(length)]
    wanted = direct_layer(shape, length, keys, shape.topk * length // 2)
    assert shape.decode_flops(length, 0.5, prefix=prefix) == pytest.approx(wanted, rel=1e-12)


def speedup(shape: LayerShape, skip_rate: float, *, prompt: int, response: int) -> dict[str, float]:
    return theoretical_speedup(
        shape, prompt_skip_rate=skip_rate, response_skip_rate=skip_rate, prompt=prompt, response=response
    )


def test_prefill_and_decode_have_their_own_skip_rates() -> None:
    found = theoretical_speedup(QWEN, prompt_skip_rate=0.8, response_skip_rate=0.3, prompt=50, response=20)
    assert found["prefill"] == speedup(QWEN, 0.8, prompt=50, response=20)["prefill"]
    assert found["decode"] == speedup(QWEN, 0.3, prompt=50, response=20)["decode"]
    static = QWEN.static()
    wanted = static.prefill_flops(50) + static.decode_flops(20, prefix=50)
    wanted /= QWEN.prefill_flops(50, 0.8) + QWEN.decode_flops(20, 0.3, prefix=50)
    assert found["total"] == pytest.approx(wanted, rel=1e-12)


def test_worked_shape() -> None:
    """Qwen3-30B-A3B: 75.5 MFLOP of experts per token, and the prefill ratios of half of them skipped."""
    assert QWEN.expert_flops(1) == 6 * 8 * 2048 * 768 == 75_497_472
    assert QWEN.moe_flops(1) - QWEN.expert_flops(1) == 2 * 192 * 2048
    for length, wanted in ((1, 1.49), (4096, 1.26)):
        found = speedup(QWEN, 0.5, prompt=length, response=1)["prefill"]
        projections, scores = 4 * 9 / 8 * 2048 * 4096, 4 * length * 4096
        static = 75_497_472 + 2 * 128 * 2048 + projections + scores
        dynamic = 75_497_472 / 2 + 2 * 192 * 2048 + projections + scores
        assert found == pytest.approx(static / dynamic, rel=1e-12)
        assert found == pytest.approx(wanted, abs=0.005)


def test_speedup_of_nothing_skipped_is_the_price_of_the_wider_router() -> None:
    found = speedup(QWEN, 0.0, prompt=100, response=100)
    assert all(0.99 < value < 1 for value in found.values())
    static = QWEN.static()
    assert speedup(static, 0.0, prompt=3, response=2) == {"prefill": 1.0, "decode": 1.0, "total": 1.0}


def test_shape_of_a_configuration() -> None:
    config = {
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
    assert LayerShape.from_hf_config(config) == QWEN


def test_expert_flops_saved() -> None:
    assert expert_flops_saved(real_rows=30, tokens=10, topk=4) == 0.25
    assert expert_flops_saved(real_rows=40, tokens=10, topk=4) == 0.0
