"""KL, perplexity and skip rate against direct computations in float64, one sequence at a time."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_hf import VOCABULARY, save_dynamic, save_static, write_lines

from megatron_zeda.errors import InputError, ZedaError
from megatron_zeda.evaluation import scoring
from megatron_zeda.evaluation.scoring import check_ids, read_texts, score_rollouts, score_text
from megatron_zeda.evaluation.skip_rate import RoutingRecorder, find_gates
from megatron_zeda.rollout.files import Rollout
from megatron_zeda.rollout.hf_folder import load_model

CPU = torch.device("cpu")
TOPK, NUM_EXPERTS = 4, 8


@pytest.fixture(scope="module")
def teacher(tiny_static: Path) -> Any:
    return load_model(tiny_static, device=CPU)


@pytest.fixture(scope="module")
def student(tiny_dynamic: Path) -> Any:
    return load_model(tiny_dynamic, device=CPU)


def make_rollout(prompt_ids: list[int], response_ids: list[int]) -> Rollout:
    return Rollout(0, [{"role": "user", "content": "x"}], prompt_ids, response_ids, None, "length", {}, "e", "v")


@pytest.fixture(scope="module")
def rollouts() -> list[Rollout]:
    rng = random.Random(1)

    def ids(most: int) -> list[int]:
        return [rng.randrange(len(VOCABULARY)) for _ in range(rng.randrange(1, most))]

    return [make_rollout(ids(9), ids(7)) for _ in range(12)] + [make_rollout([7], [8])]


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "_CHUNK_ELEMENTS", 3 * len(VOCABULARY))


def log_probs(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].double().log_softmax(-1)


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_kl_is_the_float64_sum_over_the_vocabulary(
    teacher: Any, student: Any, rollouts: list[Rollout], batch_size: int, small_chunks: None
) -> None:
    total, tokens = 0.0, 0
    for rollout in rollouts:
        ids = rollout.prompt_ids + rollout.response_ids
        wanted, found = log_probs(teacher, ids), log_probs(student, ids)
        kl = (wanted.exp() * (wanted - found)).sum(-1)
        total += kl[len(rollout.prompt_ids) - 1 : -1].sum().item()
        tokens += len(rollout.response_ids)
    scores = score_rollouts(student, rollouts, teacher=teacher, batch_size=batch_size)
    assert scores.kl_to_teacher == pytest.approx(total / tokens, rel=1e-5)
    assert scores.kl_to_teacher > 0.01
    assert scores.response_tokens == tokens
    assert scores.prompt_tokens == sum(len(r.prompt_ids) - 1 for r in rollouts)


def test_kl_of_a_model_to_itself_is_zero_and_none_without_teacher(teacher: Any, rollouts: list[Rollout]) -> None:
    assert score_rollouts(teacher, rollouts, teacher=teacher).kl_to_teacher == 0.0
    assert score_rollouts(teacher, rollouts).kl_to_teacher is None


def dense_zero_slots(model: Any, gate_weights: list[torch.Tensor], ids: list[int]) -> torch.Tensor:
    """``[layers, S]`` zero slots, from the routers' inputs and the weights on disk: softmax, top-K, ids from N on."""
    inputs: dict[int, torch.Tensor] = {}
    handles = [
        gate.register_forward_pre_hook(lambda module, args, layer=layer: inputs.__setitem__(layer, args[0]))
        for layer, gate in enumerate(find_gates(model))
    ]
    with torch.no_grad():
        model(torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    counts = []
    for layer, weight in enumerate(gate_weights):
        logits = inputs[layer].reshape(len(ids), -1).double() @ weight.double().T
        chosen = logits.argsort(dim=-1, descending=True)[:, :TOPK]
        counts.append((chosen >= NUM_EXPERTS).sum(-1))
    return torch.stack(counts)


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_skip_rate_is_the_dense_count(
    student: Any, tiny_dynamic: Path, rollouts: list[Rollout], batch_size: int
) -> None:
    weights = load_file(tiny_dynamic / "model.safetensors")
    gates = [weights[f"model.layers.{layer}.mlp.gate.weight"] for layer in range(len(student.model.layers))]
    assert gates[0].shape[0] == NUM_EXPERTS + 4
    response, prompt = torch.zeros(len(gates)), torch.zeros(len(gates))
    for rollout in rollouts:
        first = len(rollout.prompt_ids) - 1
        counts = dense_zero_slots(student, gates, (rollout.prompt_ids + rollout.response_ids)[:-1])
        prompt += counts[:, :first].sum(-1)
        response += counts[:, first:].sum(-1)
    scores = score_rollouts(student, rollouts, batch_size=batch_size)
    wanted = response / (TOPK * scores.response_tokens)
    assert scores.skip_rate_per_layer == pytest.approx(wanted.tolist())
    assert scores.skip_rate == pytest.approx(wanted.mean().item())
    assert 0.1 < scores.skip_rate < 0.9
    assert scores.skip_rate_prompt_per_layer == pytest.approx((prompt / (TOPK * scores.prompt_tokens)).tolist())
    tokens = len(gates) * (scores.prompt_tokens + scores.response_tokens)
    assert scores.tokens == tokens
    assert scores.real_rows == TOPK * tokens - int((prompt + response).sum())


def test_a_static_model_skips_nothing(teacher: Any, rollouts: list[Rollout]) -> None:
    scores = score_rollouts(teacher, rollouts)
    assert scores.skip_rate == 0
    assert scores.skip_rate_per_layer == [0.0] * len(teacher.model.layers)
    assert scores.real_rows == TOPK * scores.tokens


def test_prompts_of_one_token_have_no_skip_rate_of_their_own(student: Any) -> None:
    scores = score_rollouts(student, [make_rollout([7], [8, 9])])
    assert scores.prompt_tokens == 0
    assert scores.skip_rate_prompt is None
    assert scores.skip_rate_prompt_per_layer == []


def test_the_dial_changes_the_skip_rate(tmp_path: Path, tiny_static: Path, rollouts: list[Rollout]) -> None:
    rates = [
        score_rollouts(
            load_model(save_dynamic(tiny_static, tmp_path / str(dial), dial=dial), device=CPU), rollouts
        ).skip_rate
        for dial in (-1e9, -1.0, 0.0, 1.0)
    ]
    assert rates[0] == 0
    assert rates == sorted(set(rates))


def test_the_recorder_leaves_no_hooks_and_refuses_what_it_cannot_read(student: Any, teacher: Any) -> None:
    ids = torch.tensor([[5, 6, 7]])
    with RoutingRecorder(student) as recorder:
        student(ids)
        assert recorder.zero_slots(ids).shape == (2, 1, 3)
        with pytest.raises(ZedaError, match="0 of 2 routers ran"):
            recorder.zero_slots(ids)
    assert not any(gate._forward_hooks for gate in find_gates(student))
    with pytest.raises(ZedaError, match="no mixture-of-experts block"):
        find_gates(torch.nn.Linear(2, 2))


def test_perplexity_is_the_direct_one(teacher: Any, small_chunks: None) -> None:
    rng = random.Random(2)
    documents = [[rng.randrange(len(VOCABULARY)) for _ in range(length)] for length in (23, 10, 1, 8)]
    total, tokens = 0.0, 0
    for document in documents:
        for start in range(0, len(document), 10):
            ids = document[start : start + 10]
            if len(ids) > 1:
                log_likelihood = log_probs(teacher, ids)[:-1].gather(-1, torch.tensor(ids[1:])[:, None])
                total -= log_likelihood.sum().item()
                tokens += len(ids) - 1
    for batch_size in (1, 3, 64):
        found = score_text(teacher, documents, window=10, batch_size=batch_size)
        assert found.tokens == tokens == 9 + 9 + 2 + 9 + 7
        assert found.perplexity == pytest.approx(math.exp(total / tokens), rel=1e-5)


def test_a_text_without_two_tokens_is_refused(teacher: Any) -> None:
    with pytest.raises(InputError, match="no text to predict"):
        score_text(teacher, [[5], []], window=10)


def test_weights_that_are_not_finite_are_an_error(tmp_path: Path, teacher: Any, rollouts: list[Rollout]) -> None:
    broken = load_model(save_static(tmp_path / "model"), device=CPU)
    torch.nn.init.constant_(broken.lm_head.weight, float("nan"))
    with pytest.raises(ZedaError, match="KL to the teacher is not finite"):
        score_rollouts(broken, rollouts, teacher=teacher)
    with pytest.raises(ZedaError, match="likelihood of the text is not finite"):
        score_text(broken, [[5, 6, 7]], window=10)


def test_rollouts_of_another_model_are_named(rollouts: list[Rollout]) -> None:
    bad = [*rollouts[:2], make_rollout([5], [len(VOCABULARY)])]
    with pytest.raises(InputError, match=r"r.jsonl:3: token id outside the vocabulary"):
        check_ids(bad, vocab_size=len(VOCABULARY), context=96, where="r.jsonl")
    bad = [make_rollout([5] * 60, [6] * 37)]
    with pytest.raises(InputError, match=r"r.jsonl:1: the rollout has 97 tokens; at most 96"):
        check_ids(bad, vocab_size=len(VOCABULARY), context=96, where="r.jsonl")


def test_texts_of_both_forms(tmp_path: Path) -> None:
    plain = tmp_path / "t.txt"
    plain.write_text("one\ntwo\n")
    assert read_texts(plain) == ["one\ntwo\n"]
    lines = write_lines(tmp_path / "t.jsonl", [{"text": "one"}, {"text": "two"}])
    assert read_texts(lines) == ["one", "two"]


def test_bad_texts_are_refused(tmp_path: Path) -> None:
    lines = write_lines(tmp_path / "t.jsonl", [{"text": "one"}, {"txt": "two"}])
    with pytest.raises(InputError, match=r"t.jsonl:2: no `text`"):
        read_texts(lines)
    empty, binary = tmp_path / "empty.txt", tmp_path / "binary.txt"
    empty.write_text(" \n")
    binary.write_bytes(b"\xff\xfe")
    for path, message in ((empty, "the file is empty"), (binary, "not UTF-8"), (tmp_path / "absent", "no such file")):
        with pytest.raises(InputError, match=message):
            read_texts(path)
