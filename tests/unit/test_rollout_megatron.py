"""The decode loop over a Megatron-Core model against ``transformers`` with the same weights."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import edit_config, load_megatron, megatron_model, newest_iteration
from megatron.core.transformer.moe.router import TopKRouter
from tiny_hf import VOCABULARY, save_dynamic, save_static

from megatron_zeda.conversion import hf_to_megatron
from megatron_zeda.errors import InputError
from megatron_zeda.models import load_hf_config
from megatron_zeda.rollout import Request, Response, Sampling, TransformersEngine, megatron_decode
from megatron_zeda.rollout.megatron_engine import MegatronEngine
from megatron_zeda.zero_experts import router_statistics, set_loss_tokens

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


def test_recorded_routing_is_that_of_a_fresh_pass(megatron: None, folders: tuple[Path, Path]) -> None:
    """Without a cache, without batches: every response in one pass of its own."""
    engine = build(folders, batch_size=3, record_routing=True)
    responses = engine.generate(requests(7), SAMPLED)
    (model,) = engine.chunks
    routers = [module for module in model.modules() if isinstance(module, TopKRouter)]
    seen: list[torch.Tensor] = []
    handles = [router.register_forward_hook(lambda *call: seen.append(call[2][1])) for router in routers]
    for request, response in zip(requests(7), responses, strict=True):
        ids = torch.tensor([request.prompt_ids + response.ids[:-1]])
        seen.clear()
        with torch.no_grad():
            model(ids, torch.arange(ids.shape[1])[None], None)
        wanted = [[row.nonzero().flatten().tolist() for row in layer] for layer in seen]
        assert response.routing is not None and response.routing.dtype == np.int16
        assert response.routing.transpose(1, 0, 2).tolist() == wanted
    for handle in handles:
        handle.remove()


def test_the_model_is_as_it_was_afterwards(megatron: None, folders: tuple[Path, Path]) -> None:
    engine = build(folders)
    (model,) = engine.chunks
    model.train()
    model.config.fp8 = "hybrid"  # not for the few rows of a batch
    router_statistics([model])
    ids = torch.tensor([[7, 8, 9, 10]])
    seen: list[tuple[bool, Any]] = []
    handle = model.register_forward_pre_hook(lambda *_: seen.append((model.training, model.config.fp8)))
    engine.generate([Request([7, 8, 9], 0)], GREEDY)
    handle.remove()
    assert set(seen) == {(False, None)} and model.config.fp8 == "hybrid"
    model.config.fp8 = None
    assert model.training and all(module.training for module in model.modules())
    assert all(sum(found) == 0 for found in [router_statistics([model]).num_selections])
    for router in (module for module in model.modules() if hasattr(module, "counting")):
        assert router.counting
    set_loss_tokens(3.0)
    # Rotary embeddings of the same length are cached; training must be able to use what generation left.
    model(ids, torch.arange(4)[None], None, labels=ids).sum().backward()


def test_growing_and_shrinking_caches_change_nothing(
    megatron: None, folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = build(folders, weights_version=4)
    wanted = engine.generate(requests(), SAMPLED)
    monkeypatch.setattr(megatron_decode, "_FIRST_ROOM", 1)
    for batch_size in (1, 4, 64):
        engine.batch_size = batch_size
        found = engine.generate(requests(), SAMPLED)
        same(found, wanted)
        assert {response.weights_version for response in found} == {4}


def test_the_cache_is_never_longer_than_what_is_read(
    megatron: None, folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    rooms: list[int] = []
    move = megatron_decode.CachedModel._move

    def moved(self: megatron_decode.CachedModel, places: Any, room: int) -> None:
        rooms.append(room)
        move(self, places, room)

    monkeypatch.setattr(megatron_decode, "_FIRST_ROOM", 5)
    monkeypatch.setattr(megatron_decode.CachedModel, "_move", moved)
    endless = replace(GREEDY, stop_token_ids=())
    build(folders).generate([Request([7] * 3, 0), Request([7] * 6, 1)], endless)
    assert max(rooms) == 6 + 12 - 1  # not 2 * 16: the last token is not read


def test_the_context_ends_a_response(megatron: None, folders: tuple[Path, Path]) -> None:
    engine = build(folders)
    long, short = engine.generate([Request([7] * 93, 0), Request([7], 1)], replace(GREEDY, stop_token_ids=()))
    assert (len(long.ids), long.finish_reason, len(short.ids)) == (3, "length", 12)
    for prompt in ([], [7] * 96):
        with pytest.raises(InputError, match="impossible length of a prompt"):
            engine.generate([Request(prompt, 0)], GREEDY)


def test_logits_that_are_not_finite_fail_the_response(megatron: None, folders: tuple[Path, Path]) -> None:
    engine = build(folders, record_routing=True)
    with torch.no_grad():
        engine.chunks[0].output_layer.weight.fill_(torch.nan)
    for response in engine.generate(requests(3), GREEDY):
        assert (response.finish_reason, response.ids, response.logprobs) == ("error", [], [])
        assert response.routing is None
        assert response.error == "the model's logits are not finite"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("context_parallel_size", 2),
        ("moe_expert_capacity_factor", 1.0),
        ("cuda_graph_impl", "local"),
        ("flash_decode", True),
    ],
)
def test_settings_that_cannot_generate_are_refused(
    megatron: None, folders: tuple[Path, Path], name: str, value: Any
) -> None:
    engine = build(folders)
    setattr(engine.chunks[0].config, name, value)
    with pytest.raises(InputError, match=f"model.{name}"):
        MegatronEngine(engine.chunks, eos_ids=[], context=96)


def test_an_empty_response_says_nothing() -> None:
    assert Response(ids=[9], logprobs=[-1.0], finish_reason="stop").empty
    assert Response(finish_reason="error").empty
    assert not Response(ids=[9], logprobs=[-1.0], finish_reason="length").empty
    assert not Response(ids=[8, 9], logprobs=[-1.0, -1.0], finish_reason="stop").empty
