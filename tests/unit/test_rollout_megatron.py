"""The decode loop over a Megatron-Core model against ``transformers`` with the same weights."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from checkpoints import edit_config, load_megatron, megatron_model, newest_iteration
from tiny_hf import VOCABULARY, save_dynamic, save_static

from megatron_zeda.conversion import hf_to_megatron
from megatron_zeda.models import load_hf_config
from megatron_zeda.rollout import Request, Response, Sampling, TransformersEngine
from megatron_zeda.rollout.megatron_engine import MegatronEngine

STOP = (9, 14, 30)
GREEDY = Sampling(max_new_tokens=12, temperature=0.0, stop_token_ids=STOP)
SAMPLED = Sampling(max_new_tokens=12, temperature=1.2, top_p=0.9, seed=3, stop_token_ids=STOP)


def requests(count: int = 11, seed: int = 0) -> list[Request]:
    rng = random.Random(seed)
    prompts = [[rng.randrange(5, len(VOCABULARY)) for _ in range(rng.randrange(1, 12))] for _ in range(count)]
    return [Request(prompt, 3 * row) for row, prompt in enumerate(prompts)]


def same(found: list[Response], wanted: list[Response]) -> None:
    assert [r.ids for r in found] == [r.ids for r in wanted]
    assert [r.finish_reason for r in found] == [r.finish_reason for r in wanted]
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=5e-6)


@pytest.fixture(scope="module", params=["qwen3_moe", "glm4_moe_lite", "glm4_moe"])
def folders(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A dynamic Hugging Face folder, and the Megatron checkpoint made of it."""
    folder = tmp_path_factory.mktemp(request.param)
    dynamic = save_dynamic(save_static(folder / "static", family=request.param), folder / "hand")
    if request.param == "glm4_moe_lite":
        dynamic = edit_config(dynamic, folder / "dynamic", zeda_latent_norm_eps=1e-5)
    hf_to_megatron(dynamic, folder / "megatron")
    return dynamic, folder / "megatron"


def build(folders: tuple[Path, Path], **settings: Any) -> MegatronEngine:
    hf, checkpoint = folders
    model = megatron_model(load_hf_config(hf), perform_initialization=False)
    load_megatron(model, newest_iteration(checkpoint))
    return MegatronEngine([model], **{"eos_ids": [], "context": 96} | settings)


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_it_says_what_transformers_says(megatron: None, folders: tuple[Path, Path], sampling: Sampling) -> None:
    engine = build(folders, batch_size=4)
    theirs = build_transformers(folders)
    found, wanted = engine.generate(requests(), sampling), theirs.generate(requests(), sampling)
    same(found, wanted)
    assert {r.finish_reason for r in found} == {"stop", "length"}


def build_transformers(folders: tuple[Path, Path]) -> TransformersEngine:
    return TransformersEngine(folders[0])
