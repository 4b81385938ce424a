"""The megatron engine at parallel layouts says what ``transformers`` says in one process, token by token."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import edit_config
from spawn import initialize_megatron, run_distributed
from tiny_hf import VOCABULARY, save_dynamic, save_static

from megatron_zeda.conversion import hf_to_megatron
from megatron_zeda.rollout import Request, Response, Sampling, TransformersEngine

WORLD_SIZE = 4
SAMPLED = Sampling(max_new_tokens=10, temperature=1.2, top_p=0.9, seed=3, stop_token_ids=(9, 14, 30, 31))
FAMILIES = ("qwen3_moe", "glm4_moe_lite")

# Family, sizes, rows per batch. Where experts are spread over replicas, one of these sometimes has no rows at all.
LAYOUTS: list[tuple[str, dict[str, int], int]] = [
    ("qwen3_moe", {"tp": 2, "pp": 2, "ep": 2}, 4),
    ("qwen3_moe", {"pp": 2, "vp": 2, "ep": 2}, 5),
    ("qwen3_moe", {"tp": 2, "ep": 4}, 5),
    ("qwen3_moe", {"ep": 4}, 2),
    ("qwen3_moe", {"tp": 2, "pp": 2, "etp": 2}, 64),
    ("qwen3_moe", {"pp": 2}, 3),
    ("glm4_moe_lite", {"tp": 2, "pp": 2, "ep": 2}, 4),
    ("glm4_moe_lite", {"tp": 2, "ep": 4}, 5),
]


def requests() -> list[Request]:
    rng = random.Random(0)
    prompts = [[rng.randrange(5, len(VOCABULARY)) for _ in range(rng.randrange(1, 12))] for _ in range(11)]
    return [Request(prompt, row) for row, prompt in enumerate(prompts)]


def build(folder: Path, sizes: dict[str, int], **settings: Any) -> tuple[list[Any], Any]:
    """This rank's chunks with their weights, in training mode as in a job, and an engine on them."""
    import torch

    from megatron_zeda.config_megatron import VIRTUAL_PIPELINE
    from megatron_zeda.models import build_transformer_config, load_hf_config
    from megatron_zeda.rollout.megatron_engine import MegatronEngine
    from megatron_zeda.training.checkpoint import load_weights
    from megatron_zeda.training.setup import build_chunks

    layout = {
        "tensor_model_parallel_size": sizes.get("tp", 1),
        "pipeline_model_parallel_size": sizes.get("pp", 1),
        "virtual_pipeline_model_parallel_size": sizes.get("vp"),
        "expert_model_parallel_size": sizes.get("ep", 1),
        "expert_tensor_parallel_size": sizes.get("etp", 1),
    }
    initialize_megatron(**layout)
    hf_config = load_hf_config(folder / "megatron" / "hf")
    config = build_transformer_config(
        hf_config,
        **layout,
        **(VIRTUAL_PIPELINE if "vp" in sizes else {}),
        sequence_parallel=sizes.get("tp", 1) > 1,
        pipeline_dtype=torch.float32,
        perform_initialization=False,
    )
    chunks = build_chunks(hf_config, config)
    load_weights(chunks, folder / "megatron")
    for chunk in chunks:
        chunk.train()
    return chunks, MegatronEngine(chunks, eos_ids=[], context=96, record_routing=True, **settings)


def generate(rank: int, world_size: int, folders: dict[str, Path]) -> list[list[Response]]:
    """What this rank's engine says at every layout; afterwards the model must be as it was."""
    results = []
    for family, sizes, batch_size in LAYOUTS:
        chunks, engine = build(folders[family], sizes, batch_size=batch_size)
        before = [_flags(chunk) for chunk in chunks]
        results.append(engine.generate(requests(), SAMPLED))
        assert [_flags(chunk) for chunk in chunks] == before
        assert engine.generate([], SAMPLED) == []
    return results


def _flags(chunk: Any) -> list[Any]:
    names = ("training", "counting", "sequence_parallel", "scatter_to_sequence_parallel", "reduce_scatter_embeddings")
    flags = [getattr(module, name, None) for module in chunk.modules() for name in names]
    return [*flags, chunk.config.sequence_parallel, chunk.config.fp8]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for family in FAMILIES:
        folder = tmp_path_factory.mktemp(family)
        hand = save_dynamic(
            save_static(folder / "static", family=family, num_hidden_layers=4, vocab_size=48), folder / "hand"
        )
        changes = {"zeda_latent_norm_eps": 1e-5} if family == "glm4_moe_lite" else {}
        hf_to_megatron(edit_config(hand, folder / "dynamic", **changes), folder / "megatron")
        made[family] = folder
    return made


def test_every_layout_says_what_transformers_says(folders: dict[str, Path]) -> None:
    wanted = {
        family: TransformersEngine(folder / "dynamic").generate(requests(), SAMPLED)
        for family, folder in folders.items()
    }
    ranks = run_distributed(generate, WORLD_SIZE, folders)
    routing: dict[str, list[Any]] = {}
    for number, (family, sizes, _) in enumerate(LAYOUTS):
        for responses in (rank[number] for rank in ranks):
            for found, theirs in zip(responses, wanted[family], strict=True):
                assert found.ids == theirs.ids, (family, sizes)
                assert found.finish_reason == theirs.finish_reason
                assert found.logprobs == pytest.approx(theirs.logprobs, abs=1e-5)
            chosen = [response.routing for response in responses]
            for ours, first in zip(chosen, routing.setdefault(family, chosen), strict=True):
                assert np.array_equal(ours, first), (family, sizes)
    lengths = [len(response.ids) for response in wanted["qwen3_moe"]]
    assert min(lengths) < 4 and max(lengths) == 10  # replicas end at different steps
    for family, layers in (("qwen3_moe", 4), ("glm4_moe_lite", 3)):
        for request, response, chosen in zip(requests(), wanted[family], routing[family], strict=True):
            assert chosen.shape == (len(request.prompt_ids) + len(response.ids) - 1, layers, 4)
            assert chosen.max() < 12
