"""Generation against ``model.generate`` and a fresh forward pass of the same model."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_hf import VOCABULARY

from megatron_zeda.errors import InputError, ZedaError
from megatron_zeda.rollout import Request, Response, Sampling, TransformersEngine
from megatron_zeda.rollout.decode import Rows, decode, draws, left_pad, pick_tokens

GREEDY = Sampling(max_new_tokens=12, temperature=0.0)


@pytest.fixture(scope="module", params=["tiny_static", "tiny_dynamic", "tiny_glm_static", "tiny_glm_dynamic"])
def engine(request: pytest.FixtureRequest) -> TransformersEngine:
    made = TransformersEngine(request.getfixturevalue(request.param))
    # End-of-sequence tokens that these random models do say, so that responses stop at different lengths.
    made.eos_ids = [9, 14, 45]
    return made


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(5, len(VOCABULARY)) for _ in range(rng.randrange(1, 12))] for _ in range(11)]


def run(
    engine: TransformersEngine, prompts: list[list[int]], sampling: Sampling, batch_size: int = 32
) -> list[Response]:
    engine.batch_size = batch_size
    return engine.generate([Request(prompt, row) for row, prompt in enumerate(prompts)], sampling)


def test_greedy_tokens_are_those_of_generate(engine: TransformersEngine, prompts: list[list[int]]) -> None:
    responses = run(engine, prompts, GREEDY)
    reasons = set()
    for prompt, response in zip(prompts, responses, strict=True):
        wanted = engine.model.generate(
            torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=engine.eos_ids, pad_token_id=0
        )[0, len(prompt) :].tolist()
        assert response.ids == wanted
        assert response.finish_reason == ("stop" if wanted[-1] in engine.eos_ids else "length")
        reasons.add(response.finish_reason)
    assert reasons == {"stop", "length"}


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(max_new_tokens=12, temperature=1.7, top_p=0.8, seed=3)])
def test_log_probabilities_are_those_of_a_fresh_forward(
    engine: TransformersEngine, prompts: list[list[int]], sampling: Sampling
) -> None:
    for prompt, response in zip(prompts, run(engine, prompts, sampling), strict=True):
        with torch.no_grad():
            logits = engine.model(torch.tensor([prompt + response.ids])).logits[0].double()
        wanted = logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(-1, torch.tensor(response.ids)[:, None])
        assert torch.allclose(torch.tensor(response.logprobs).double(), wanted.squeeze(-1), atol=2e-5)


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(max_new_tokens=12, temperature=1.0, top_p=0.9, seed=5)])
def test_the_batch_size_changes_nothing(
    engine: TransformersEngine, prompts: list[list[int]], sampling: Sampling
) -> None:
    wanted = run(engine, prompts, sampling, batch_size=1)
    for batch_size in (3, 64):
        found = run(engine, prompts, sampling, batch_size=batch_size)
        assert [r.ids for r in found] == [r.ids for r in wanted]
        assert [r.finish_reason for r in found] == [r.finish_reason for r in wanted]


def test_the_seed_names_the_samples(engine: TransformersEngine, prompts: list[list[int]]) -> None:
    first, again, other = (
        [r.ids for r in run(engine, prompts, Sampling(max_new_tokens=8, seed=seed))] for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other


def test_a_row_keeps_its_random_numbers_when_a_run_goes_on(
    engine: TransformersEngine, prompts: list[list[int]]
) -> None:
    sampling = Sampling(max_new_tokens=8, seed=4)
    whole = [r.ids for r in run(engine, prompts, sampling)]
    rest = engine.generate([Request(prompts[row], row) for row in range(4, len(prompts))], sampling)
    assert [r.ids for r in rest] == whole[4:]
    assert draws(4, 7, 3).tolist() == draws(4, 7, 9)[:3].tolist()
    assert draws(4, 7, 3).tolist() != draws(4, 8, 3).tolist()


def test_every_token_has_a_random_number_of_its_own() -> None:
    """Of equally probable tokens the draw names one: the first, second, ... number of the row."""
    rows = Rows([[5], [6, 7]], sampling=Sampling(max_new_tokens=4, seed=2), rows=[9, 3], eos_ids=[], context=8)
    active = [0, 1]
    while active:
        tokens, logprobs = rows.pick(torch.zeros(len(active), 1000), active)
        assert logprobs.tolist() == pytest.approx([-math.log(1000)] * len(active))
        active = [row for row, token in zip(active, tokens.tolist(), strict=True) if rows.add(row, token, 0.0)]
    for response, row in zip(rows.responses, (9, 3), strict=True):
        assert response.ids == (1000 * draws(2, row, 4)).astype(int).tolist() and len(set(response.ids)) == 4


def test_samples_have_the_models_probabilities() -> None:
    torch.manual_seed(0)
    logits = torch.randn(1, 6) * 1.5
    uniform = (torch.arange(20000, dtype=torch.float64) + 0.5) / 20000
    for temperature, top_p in ((1.0, 1.0), (0.5, 1.0), (2.0, 0.7), (1.0, 0.05)):
        tokens = pick_tokens(logits.expand(20000, -1), uniform, temperature=temperature, top_p=top_p)
        found = torch.bincount(tokens, minlength=6) / 20000
        probs = (logits[0].double() / temperature).softmax(-1)
        kept: list[int] = []
        for token in probs.argsort(descending=True).tolist():  # smallest set with at least top_p
            kept.append(token)
            if probs[kept].sum() >= top_p:
                break
        wanted = torch.zeros(6, dtype=torch.float64)
        wanted[kept] = probs[kept] / probs[kept].sum()
        assert torch.allclose(found.double(), wanted, atol=2e-4), (temperature, top_p)


def test_extreme_draws_never_pick_an_impossible_token() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]])
    for uniform in (0.0, 1 - 2**-53):
        token = pick_tokens(logits, torch.tensor([uniform], dtype=torch.float64), temperature=1.0, top_p=1.0)
        assert token.item() in (1, 3)


def test_the_context_ends_a_response(engine: TransformersEngine) -> None:
    prompt = [5] * (engine.context - 3)
    (response,) = decode(engine.model, [prompt], sampling=GREEDY, rows=[0], eos_ids=[], context=engine.context)
    assert len(response.ids) == 3
    assert response.finish_reason == "length"


def test_rows_of_different_limits_share_a_batch(engine: TransformersEngine) -> None:
    prompts = [[5] * (engine.context - 2), [6, 7]]
    long, short = decode(engine.model, prompts, sampling=GREEDY, rows=[0, 1], eos_ids=[], context=engine.context)
    assert (len(long.ids), len(short.ids)) == (2, 12)
    alone = decode(engine.model, prompts[1:], sampling=GREEDY, rows=[1], eos_ids=[], context=engine.context)
    assert alone[0].ids == short.ids


def test_every_row_counts_its_positions_from_zero(engine: TransformersEngine) -> None:
    """Rotary embeddings hide a shift that is the same for a whole row, so look at what the model is given."""
    given: list[list[list[int]]] = []
    handle = engine.model.register_forward_pre_hook(
        lambda module, args, kwargs: given.append(kwargs["position_ids"].tolist()), with_kwargs=True
    )
    try:
        decode(engine.model, [[5, 6, 7], [8]], sampling=GREEDY, rows=[0, 1], eos_ids=[], context=engine.context)
    finally:
        handle.remove()
    assert given[:3] == [[[0, 1, 2], [0, 0, 0]], [[3], [1]], [[4], [2]]]


def test_padding_is_on_the_left() -> None:
    ids, mask = left_pad([[1, 2, 3], [4]], 0, torch.device("cpu"))
    assert ids.tolist() == [[1, 2, 3], [0, 0, 4]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]


def test_logits_that_are_not_finite_are_an_error(tiny_static: Path) -> None:
    engine = TransformersEngine(tiny_static)
    torch.nn.init.constant_(engine.model.lm_head.weight, float("nan"))
    with pytest.raises(ZedaError, match="not finite"):
        run(engine, [[5, 6]], GREEDY)


@pytest.mark.parametrize(
    "settings",
    [
        {"max_new_tokens": 0},
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"samples_per_prompt": 0},
        {"seed": -1},
        {"temperature": 0.0, "samples_per_prompt": 2},
    ],
)
def test_impossible_sampling_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="samples_per_prompt" if len(settings) == 2 else next(iter(settings))):
        Sampling(**settings)
