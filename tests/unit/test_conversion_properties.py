"""Law 4 for any small model: whatever its sizes, types, files and layouts, it comes back bit by bit.

Hypothesis draws the models. Between import and export a stock Megatron-Core job is played: its
``dist_checkpointing`` loads every tensor at one random layout and saves it at another.
"""

from __future__ import annotations

import itertools
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import assert_same_bits, make_hf, read_tensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_zeda.conversion import hf_to_megatron, inject_zero_experts, megatron_to_hf, verify_checkpoint

FAMILIES = ("qwen3_moe", "glm4_moe_lite", "glm4_moe")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
EXAMPLES = settings(
    max_examples=8,
    deadline=None,  # nothing here is timed
    derandomize=True,  # the same models on every machine
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@st.composite
def models(draw: st.DrawFn, family: str) -> dict[str, Any]:
    """Arguments of :func:`checkpoints.make_hf`."""
    glm = family != "qwen3_moe"
    experts = draw(st.integers(2, 6))
    heads, groups = draw(st.sampled_from([(4, 4), (4, 2), (4, 1), (6, 3), (3, 3), (1, 1)]))
    layers = draw(st.integers(2, 4) if glm else st.integers(1, 3))
    fused = draw(st.booleans())
    chosen: dict[str, Any] = {
        "family": family,
        "dtype": draw(st.sampled_from(DTYPES)),
        "fused": fused,
        "shards": not fused and draw(st.booleans()),
        "mtp": glm and not fused and draw(st.booleans()),
        "seed": draw(st.integers(0, 5)),
        "vocab_size": draw(st.sampled_from([33, 64, 100])),
        "hidden_size": draw(st.sampled_from([8, 24, 40])),
        "intermediate_size": draw(st.sampled_from([8, 20])),
        "moe_intermediate_size": draw(st.sampled_from([2, 4, 12])),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_experts_per_tok": draw(st.integers(2 if glm else 1, experts)),
        "tie_word_embeddings": draw(st.booleans()),
    }
    chosen["n_routed_experts" if glm else "num_experts"] = experts
    if glm:
        chosen["first_k_dense_replace"] = draw(st.integers(1, layers - 1))
        chosen["n_shared_experts"] = draw(st.integers(1, 2))
    if family == "glm4_moe_lite":
        chosen["num_key_value_heads"] = heads
        chosen |= {"q_lora_rank": draw(st.sampled_from([8, 20])), "kv_lora_rank": draw(st.sampled_from([4, 16]))}
        chosen |= {"qk_nope_head_dim": draw(st.sampled_from([4, 12])), "v_head_dim": draw(st.sampled_from([6, 16]))}
    else:
        chosen |= {"num_key_value_heads": groups, "head_dim": draw(st.sampled_from([4, 8, 16]))}
    return chosen


def _random_chunks(tensor: torch.Tensor, draw: Any) -> list[tuple[tuple[int, int, int], ...]]:
    """A random layout of a tensor: of every axis how many equal parts; returns the place of every part."""
    parts = []
    for size in tensor.shape:
        parts.append(draw(st.sampled_from([n for n in (1, 2, 3, 4, size) if n <= max(size, 1) and size % n == 0])))
        if len(parts) > 1 and parts[-1] > 4:  # at most two axes in many parts, or it takes long
            parts[-1] = 1
    places = itertools.product(*[range(count) for count in parts])
    return [tuple(zip(range(len(parts)), place, parts, strict=True)) for place in places]


def _sharded(key: str, tensor: torch.Tensor, chunks: list[tuple[tuple[int, int, int], ...]]) -> dict[str, Any]:
    """What the ranks of a layout would hold of a tensor, as Megatron-Core's sharded tensors."""
    from megatron.core.dist_checkpointing import ShardedTensor

    state = {}
    for place in chunks:
        part = tensor
        for axis, index, count in place:
            part = part.chunk(count, dim=axis)[index]
        state[f"{key}{place}"] = ShardedTensor.from_rank_offsets(key, part.contiguous(), *place)
    return state


def play_a_job(source: Path, target: Path, draw: Any) -> None:
    """Load with stock Megatron-Core at a random layout, check every value, save at another as iteration 5."""
    from megatron.core import dist_checkpointing

    from megatron_zeda.conversion.megatron_io import latest_checkpoint_dir

    folder = str(latest_checkpoint_dir(source))
    whole = {}
    for key, meta in dist_checkpointing.load_tensors_metadata(folder).items():
        shape, dtype = meta.global_shape, meta.dtype
        empty = torch.full(shape, float("nan"), dtype=dtype)
        chunks = _random_chunks(empty, draw)
        loaded = dist_checkpointing.load(_sharded(key, empty, chunks), folder)
        whole[key] = torch.empty(shape, dtype=dtype)
        for place in chunks:
            part = whole[key]
            for axis, index, count in place:
                part = part.chunk(count, dim=axis)[index]
            part.copy_(loaded[f"{key}{place}"])
    state: dict[str, Any] = {"iteration": 5, "args": None}
    for key, tensor in whole.items():
        state |= _sharded(key, tensor, _random_chunks(tensor, draw))
    shutil.copytree(source / "hf", target / "hf")
    (target / "iter_0000005").mkdir()
    dist_checkpointing.save(state, str(target / "iter_0000005"))
    (target / "latest_checkpointed_iteration.txt").write_text("5")
    if draw(st.booleans()):  # a job that knows nothing of our manifest
        manifest = json.loads((source / "zeda_manifest.json").read_text())
        (target / "zeda_manifest.json").write_text(json.dumps(manifest))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_law_4_for_any_small_model(megatron: None, family: str) -> None:
    @EXAMPLES
    @given(st.data())
    def check(data: st.DataObject) -> None:
        model = data.draw(models(family))
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            static = make_hf(folder / "static", **model)
            source = static
            if zero := data.draw(st.integers(0, 5), label="zero experts"):
                size = data.draw(st.sampled_from([4_000, 20_000, 10**9]), label="shard bytes")
                inject_zero_experts(static, folder / "dynamic", num_zero_experts=zero, shard_bytes=size)
                source = folder / "dynamic"
                _check_injection(read_tensors(static), read_tensors(source), zero)
            size = data.draw(st.sampled_from([5_000, 20_000, 10**9]), label="file bytes")
            hf_to_megatron(source, folder / "megatron", file_bytes=size)
            played = data.draw(st.booleans(), label="a job in between")
            if played:
                play_a_job(folder / "megatron", folder / "job", data.draw)
            megatron = folder / ("job" if played else "megatron")
            size = data.draw(st.sampled_from([4_000, 20_000, 10**9]), label="shard bytes")
            megatron_to_hf(megatron, folder / "back", shard_bytes=size)
            if (megatron / "zeda_manifest.json").exists():
                assert_same_bits(read_tensors(source), read_tensors(folder / "back"))
            else:  # the layout of the experts is not known then
                assert verify_checkpoint(megatron, source) == []
            assert verify_checkpoint(source, megatron) == []
            config, back = (json.loads((path / "config.json").read_text()) for path in (source, folder / "back"))
            assert back == config

    check()


def _check_injection(static: dict[str, torch.Tensor], dynamic: dict[str, torch.Tensor], zero: int) -> None:
    """Routers have more rows; the old ones and everything else are untouched."""
    assert static.keys() == dynamic.keys()
    for name, tensor in static.items():
        grown = ".mlp.gate." in name
        assert len(dynamic[name]) == len(tensor) + (zero if grown else 0), name
        assert dynamic[name][: len(tensor)].contiguous().view(torch.uint8).equal(tensor.view(torch.uint8)), name
