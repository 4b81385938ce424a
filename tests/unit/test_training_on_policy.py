"""Stage 2's data: which responses are asked for, what becomes of them, and what survives a kill."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from megatron_zeda.config import Config
from megatron_zeda.data import BatchBuilder, BatchLayout, PackedBatchBuilder
from megatron_zeda.distillation import SUM_NAMES, Objective
from megatron_zeda.errors import InputError, ZedaError
from megatron_zeda.rollout import codec as codecs
from megatron_zeda.rollout.engine import Request, Response, Sampling
from megatron_zeda.rollout.files import Prompt, read_rollouts
from megatron_zeda.training.on_policy import Interrupted, PromptOrder, PromptSet, Rollouts, load_prompts
from megatron_zeda.training.responses import Counts, check_engine, rollout_values, to_batch, to_samples
from megatron_zeda.training.rollout_files import next_weights, steps_of, weights_version
from megatron_zeda.training.setup import build_objective

VOCABULARY = 50


# ---- which responses -------------------------------------------------------------------------------------------------


def test_responses_are_asked_for_prompt_by_prompt_and_pass_by_pass() -> None:
    order = PromptOrder(5, samples_per_prompt=3, seed=7)
    wanted = order.rows(0, 45)  # three passes
    assert [item.row for item in wanted] == list(range(45))
    assert [item.sample for item in wanted] == [0, 1, 2] * 15
    prompts = [item.prompt for item in wanted[::3]]
    assert all(wanted[i].prompt == prompts[i // 3] for i in range(45))
    passes = [prompts[0:5], prompts[5:10], prompts[10:15]]
    assert all(sorted(one) == [0, 1, 2, 3, 4] for one in passes) and passes[0] != passes[1]
    # However a run is cut into steps, it asks for the same.
    assert order.rows(7, 9) + order.rows(16, 20) == wanted[7:36]
    assert PromptOrder(5, samples_per_prompt=3, seed=8).rows(0, 45) != wanted


def test_a_name_of_weights_tells_every_difference() -> None:
    config = Config()
    name = next_weights(config, "before", 1.5, 0.1)
    other = Config()
    other.optimizer.lr = 3e-5
    names = {
        name,
        next_weights(config, "other", 1.5, 0.1),
        next_weights(config, "before", 1.5, float(np.nextafter(0.1, 1))),
        next_weights(other, "before", 1.5, 0.1),
        next_weights(config, "before", float("nan"), 0.1),
    }
    for section, setting, value in (("rollout", "temperature", 0.5), ("teacher", "checkpoint", "t")):
        settings = Config()
        setattr(getattr(settings, section), setting, value)
        names.add(next_weights(settings, "before", 1.5, 0.1))
    assert len(names) == 7 and next_weights(Config(), "before", 1.5, 0.1) == name
    moved = Config()
    moved.logger.run_dir, moved.checkpoint.save_interval, moved.validation.eval_iters = "elsewhere", 7, 3
    assert next_weights(moved, "before", 1.5, 0.1) == name
    assert steps_of(weights_version(12, name)) == 12


def test_prompts_that_cannot_be_asked(tiny_static: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, shape = stage_2(), json.loads((tiny_static / "config.json").read_text())
    config.model.hf, config.rollout.prompts = str(tiny_static), [str(tmp_path / "prompts.jsonl")]
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "ab"}\n{"prompt": "z9"}\n')
    found = load_prompts(config, shape)
    assert [len(ids) for ids in found.ids] == [2, 2] and found.codec.context == 9
    largest = max(max(ids) for ids in found.ids)
    with pytest.raises(InputError, match=rf"prompts.jsonl:2: .*outside the vocabulary \(got {largest}\)"):
        load_prompts(config, shape | {"vocab_size": largest})
    monkeypatch.setattr(codecs, "eos_ids", lambda *_: [])
    with pytest.raises(InputError, match=r"no token ends a response.*rollout\.stop_token_ids"):
        load_prompts(config, shape)
    config.rollout.stop_token_ids = [1]
    assert load_prompts(config, shape).codec.eos_ids == []


# ---- what becomes of them --------------------------------------------------------------------------------------------


def stage_2(**rollout: Any) -> Config:
    config = Config()
    config.train.stage, config.train.train_iters, config.train.global_batch_size = 2, 100, 6
    config.model.seq_length = 8
    for name, value in rollout.items():
        setattr(config.rollout, name, value)
    return config


RESPONSES = [
    ([10, 11], Response([20, 21, 1], [-0.5, -1.0, -0.25], "stop", weights_version=5)),
    ([12], Response([22, 23], [-2.0, -3.0], "length", weights_version=5)),
    ([13], Response([1], [-0.1], "stop", weights_version=5)),  # nothing but its end
    ([14], Response([], [], "error", error="timed out")),
    ([15], Response([24, 1], [-1.0, -1.0], "stop", weights_version=3)),
    # Longer than the sequence: its last token is predicted and not read, and one more is too much.
    ([16, 17, 18], Response([25, 26, 27, 28, 29, 30, 1], [-1.0] * 7, "stop", weights_version=5)),
]


def test_every_response_is_trained_on_or_counted() -> None:
    samples, counts = to_samples(RESPONSES, stage_2(max_staleness=1), step=5, vocab_size=VOCABULARY, where="step 6")
    assert [sample.tokens.tolist() for sample in samples] == [
        [10, 11, 20, 21, 1],
        [12, 22, 23],
        [16, 17, 18, 25, 26, 27, 28, 29, 30],
    ]
    assert [sample.is_response.tolist() for sample in samples[:2]] == [
        [False, False, True, True, True],
        [False, True, True],
    ]
    assert samples[0].logprobs is not None and samples[0].logprobs.tolist() == [0.0, 0.0, -0.5, -1.0, -0.25]
    assert [sample.stopped_at_limit for sample in samples] == [False, True, False]
    assert [sample.cut_to_sequence for sample in samples] == [False, False, True]
    assert (counts.responses, counts.trained, counts.dropped) == (6, 3, 3)
    assert (counts.stopped, counts.cut, counts.empty, counts.failed, counts.too_old) == (3, 2, 1, 1, 1)
    assert (counts.tokens, counts.mean_length, counts.staleness) == (15, 3.0, 0)


def test_routing_is_cut_where_the_tokens_are() -> None:
    """What is read: all tokens of the sample but the last."""
    prompt, response = RESPONSES[-1]
    routing = np.arange(9 * 2 * 3).reshape(9, 2, 3)
    whole = Response(response.ids, response.logprobs, "stop", weights_version=5, routing=routing)
    (sample,), _ = to_samples([(prompt, whole)], stage_2(), step=5, vocab_size=VOCABULARY, where="step 6")
    assert sample.routing is not None and len(sample.tokens) == 9 and sample.logprobs is not None
    assert sample.routing.tolist() == routing[:8].tolist() and len(sample.logprobs) == 9


def test_cut_responses_are_dropped_where_that_is_asked_for() -> None:
    config = stage_2(max_staleness=2, cut_responses="drop")
    samples, counts = to_samples(RESPONSES, config, step=5, vocab_size=VOCABULARY, where="step 6")
    assert [sample.tokens[-1] for sample in samples] == [1, 1]
    assert (counts.cut, counts.too_old, counts.dropped, counts.staleness) == (2, 0, 4, 2)


def test_a_response_of_unknown_weights_is_as_old_as_can_be() -> None:
    pairs = [([10], Response([20, 1], [-1.0, -1.0], "stop"))]
    assert to_samples(pairs, stage_2(max_staleness=4), step=5, vocab_size=VOCABULARY, where="step 6")[1].too_old == 1
    assert to_samples(pairs, stage_2(max_staleness=5), step=5, vocab_size=VOCABULARY, where="step 6")[1].staleness == 5


def test_what_is_reported_of_a_step() -> None:
    """Means over its tokens, by their own names, and the largest gap as it is."""
    sums = dict(zip(SUM_NAMES, (4.0, 0.0, 0.0, 0.0, 6.0, 1.0, 3.0, 2.0, 8.0, 0.7), strict=True))
    values = rollout_values(Counts(responses=6, trained=2), sums, "step-0000003-w")
    assert (values["importance"], values["capped"], values["clipped"]) == (1.5, 0.25, 0.75)
    assert (values["logprob_gap"], values["kl_engine"], values["logprob_gap_max"]) == (0.5, 2.0, 0.7)
    assert (values["responses"], values["trained"], values["weights_version"]) == (6, 2, "step-0000003-w")
    nothing = rollout_values(Counts(), dict.fromkeys(SUM_NAMES, 0.0), "")
    assert math.isnan(nothing["importance"]) and math.isnan(nothing["logprob_gap"])


def test_an_engine_is_judged_by_fresh_responses_alone() -> None:
    config = stage_2(max_logprob_gap=0.5)
    check_engine(config, {"logprob_gap": 0.5, "staleness": 0}, 3)
    check_engine(config, {"logprob_gap": 0.6, "staleness": 1}, 3)  # the weights have moved since
    check_engine(config, {"logprob_gap": float("nan"), "staleness": 0}, 3)  # nothing was trained on
    check_engine(stage_2(max_logprob_gap=None), {"logprob_gap": 9.0, "staleness": 0}, 3)
    with pytest.raises(ZedaError, match=r"step 3: .*0\.6 nats"):
        check_engine(config, {"logprob_gap": 0.6, "staleness": 0}, 3)


def test_the_objective_has_every_setting() -> None:
    config = stage_2()
    settings = {
        "cross_entropy": 0.1,
        "forward_kl": 0.2,
        "reverse_kl": 0.3,
        "estimator": "topk",
        "topk": 5,
        "temperature": 2.0,
        "clip_ratio_low": 0.4,
        "clip_ratio_high": 0.6,
        "importance_cap": 3.0,
        "chunk_size": 7,
    }
    assert settings.keys() == {field.name for field in fields(Objective)}
    for name, value in settings.items():
        setattr(config.distillation, name, value)
    assert build_objective(config) == Objective(**settings)


def test_the_first_reason_is_the_one_that_is_told() -> None:
    failed = [([10], Response([], [], "error", error=reason)) for reason in ("timed out", "gone", "gone")]
    _, counts = to_samples(failed, stage_2(), step=5, vocab_size=VOCABULARY, where="step 6")
    assert counts.summary() == "3 responses, 3 failed (timed out)"


def test_an_engine_with_another_vocabulary_is_refused() -> None:
    with pytest.raises(ZedaError, match=r"step 6: .*outside the vocabulary \(got 29\); ids are 0 to 28"):
        to_samples(RESPONSES, stage_2(), step=5, vocab_size=29, where="step 6")


def builder(packed: bool = False, **layout: int) -> BatchBuilder:
    place = BatchLayout(length_multiple=4, **layout)
    if packed:
        return PackedBatchBuilder([], pack_length=16, global_batch_size=6, layout=place, device=torch.device("cpu"))
    return BatchBuilder([], micro_batch_size=2, global_batch_size=6, layout=place, device=torch.device("cpu"))


def test_a_batch_has_the_engines_log_probabilities_beside_the_labels() -> None:
    config = stage_2(max_staleness=1)
    samples, _ = to_samples(RESPONSES, config, step=5, vocab_size=VOCABULARY, where="step 6")
    batch = to_batch(samples, builder())
    assert batch is not None and batch.loss_tokens == 3 + 2 + 6 and len(batch.micro_batches) == 3
    first, second, third = batch.micro_batches
    assert first.old_logprobs is not None and third.old_logprobs is not None
    assert first.labels[0].tolist() == [11, 20, 21, 1, 0, 0, 0, 0]
    assert first.old_logprobs[0].tolist() == [0.0, -0.5, -1.0, -0.25, 0.0, 0.0, 0.0, 0.0]
    assert first.old_logprobs[1].tolist() == [-2.0, -3.0, 0, 0, 0, 0, 0, 0]
    # Three samples are left of six: what is missing is padding.
    assert second.padding_mask[1].all() and third.padding_mask.all() and not third.old_logprobs.any()
    assert to_batch([], builder()) is None


@pytest.mark.parametrize("packed", [False, True])
def test_a_token_keeps_its_log_probability_and_routing_wherever_it_lies(packed: bool) -> None:
    """Packs and context-parallel parts: what lies beside a token in a sample lies beside it in every batch."""
    numbers = np.random.default_rng(0)
    pairs = []
    for length in (3, 5, 2, 6):
        ids = numbers.permutation(np.arange(5, VOCABULARY))[: length + 2].tolist()
        routing = np.array(ids[:-1])[:, None, None] * 100 + np.arange(6).reshape(3, 2)
        pairs.append((ids[:2], Response(ids[2:], [-float(i) for i in ids[2:]], "stop", None, None, routing)))
    samples, _ = to_samples(pairs, stage_2(max_staleness=9), step=0, vocab_size=VOCABULARY, where="step 1")
    seen = 0
    for rank in (0, 1):
        batch = to_batch(samples, builder(packed, context_parallel_size=2, context_parallel_rank=rank))
        assert batch is not None
        for micro in batch.micro_batches:
            assert micro.old_logprobs is not None and micro.routing is not None and micro.routing.dtype == torch.int16
            counted = micro.loss_mask > 0
            assert torch.equal(micro.old_logprobs[counted], -micro.labels[counted].float())
            assert not micro.old_logprobs[~counted].any()
            real = ~micro.padding_mask
            expected = micro.tokens[real][:, None, None] * 100 + torch.arange(6).view(3, 2)
            assert torch.equal(micro.routing[real].long(), expected)
            assert (micro.routing[micro.padding_mask] == torch.arange(2)).all()  # valid choices
            seen += int(counted.sum())
    assert seen == 3 + 5 + 2 + 6


# ---- what survives a kill --------------------------------------------------------------------------------------------


class Engine:
    """Answers a prompt with its row's number, and dies at a call if it is told to."""

    name = "fake 1"

    def __init__(
        self, dies_at: int | None = None, refuse: frozenset[int] = frozenset(), *, collective: bool = True
    ) -> None:
        self.collective = collective
        self.calls: list[list[int]] = []
        self.dies_at, self.refuse = dies_at, refuse

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Response]:
        if len(self.calls) == self.dies_at:
            raise KeyboardInterrupt
        self.calls.append([request.row for request in requests])
        return [
            Response([], [], "error", error="no answer")
            if request.row in self.refuse
            else Response([5 + request.row % 40, 1], [-0.1 - request.row, -0.123457], "stop")
            for request in requests
        ]


@dataclass
class State:
    iteration: int = 0
    consumed_samples: int = 0
    weights: str = "w0"
    rollout_version: str = ""

    def after(self, steps: int) -> State:
        return State(self.iteration + steps, self.consumed_samples + 6 * steps, f"w{self.iteration + steps}")


@pytest.fixture(autouse=True)
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)


@dataclass
class Run:
    """A run's rollouts over an engine of this test."""

    folder: Path
    settings: dict[str, Any] = field(default_factory=dict)

    def start(self, engine: Engine, *, layout: dict[str, int] | None = None, **arguments: Any) -> Rollouts:
        config = stage_2(samples_per_prompt=2, batch_size=4, **self.settings)
        config.logger.run_dir = str(self.folder)
        prompts = [Prompt(f"p{i}", f"prompt {i}", None, "task", f"f:{i}") for i in range(4)]
        codec: Any = SimpleNamespace(text=lambda response: " ".join(map(str, response.ids)))
        chosen = PromptSet(prompts, [[30 + i, 31 + i] for i in range(4)], codec, VOCABULARY)
        place = builder(**(layout or {}))
        return Rollouts(config, chosen, place, engine, **{"train_iters": 100, **arguments})

    def rows(self, step: int) -> list[int]:
        lines = read_rollouts(self.folder / f"rollouts/step_{step:07d}.jsonl")
        return [line.sampling["row"] for line in lines]


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    yield Run(tmp_path)


def tokens_of(batch: Any) -> list[list[Any]]:
    return [[micro.tokens.tolist(), micro.old_logprobs.tolist()] for micro in batch.micro_batches]


def test_responses_are_asked_for_in_groups_and_written_as_rollouts(run: Run) -> None:
    engine = Engine()
    state = State()
    batch, counts = run.start(engine).step(state)
    assert engine.calls == [[0, 1, 2, 3], [4, 5]] and counts.trained == 6 and counts.reused == 0
    assert state.rollout_version == "step-0000000-w0" and batch is not None
    lines = read_rollouts(run.folder / "rollouts/step_0000001.jsonl")
    assert [line.sampling["row"] for line in lines] == list(range(6))
    assert [line.sampling["sample"] for line in lines] == [0, 1] * 3
    assert {line.sampling["seed"] for line in lines} == {Config().train.seed} != {0}
    assert lines[0].weights_version == "step-0000000-w0" and lines[0].engine == "fake 1" and lines[0].task == "task"
    assert lines[0].messages[-1] == {"role": "assistant", "content": "5 1"}
    assert not list((run.folder / "rollouts").glob("*.partial"))


def test_replicas_answer_a_group_together_and_a_server_one_at_a_time(run: Run) -> None:
    three = {"data_parallel_size": 3}
    engine = Engine()
    run.start(engine, layout=three).step(State())
    server = Engine(collective=False)
    run.settings = {"engine": "openai"}
    run.folder = run.folder / "server"
    run.start(server, layout=three).step(State())
    assert (engine.calls, server.calls) == ([[0, 1, 2, 3, 4, 5]], [[0, 1, 2, 3], [4, 5]])


def test_responses_of_older_weights_are_written_as_such(run: Run) -> None:
    """A server that has not loaded the latest weights: another start must not take them for new ones."""

    class Late(Engine):
        def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Response]:
            responses = super().generate(requests, sampling)
            for response in responses[:2]:
                response.weights_version = 2
            return responses

    run.settings = {"max_staleness": 1}
    state = State().after(3)
    _, counts = run.start(Late()).step(state)
    assert (counts.staleness, counts.trained) == (1, 6)
    lines = read_rollouts(run.folder / "rollouts/step_0000004.jsonl")
    versions = [line.weights_version for line in lines]
    assert versions == ["step-0000002-older"] * 2 + ["step-0000003-w3"] * 2 + versions[:2]
    engine = Engine()
    _, counts = run.start(engine).step(State().after(3))
    assert (counts.reused, len(engine.calls[0]), counts.staleness) == (2, 4, 0)


@pytest.mark.parametrize("collective", [True, False])  # False: a server
def test_a_run_killed_while_it_generates_keeps_what_it_has(run: Run, collective: bool) -> None:
    run.settings = {} if collective else {"engine": "openai"}
    whole = tokens_of(run.start(Engine(collective=collective)).step(State())[0])
    (run.folder / "rollouts/step_0000001.jsonl").unlink()
    with pytest.raises(KeyboardInterrupt):
        run.start(Engine(dies_at=1, collective=collective)).step(State())
    partial = run.folder / "rollouts/step_0000001.jsonl.partial"
    assert len(partial.read_text().splitlines()) == 4
    partial.write_text(partial.read_text()[:-20])  # the last line was cut short
    engine = Engine(collective=collective)
    batch, counts = run.start(engine).step(State())
    assert engine.calls == [[3, 4, 5]] and counts.reused == 3
    assert tokens_of(batch) == whole and run.rows(1) == list(range(6))
    # Finished: nothing is asked for again.
    again = Engine(collective=collective)
    batch, counts = run.start(again).step(State())
    assert again.calls == [] and counts.reused == 6 and tokens_of(batch) == whole


def test_responses_that_could_not_be_had_are_counted_and_not_written(run: Run) -> None:
    _, counts = run.start(Engine(refuse=frozenset({1, 2}))).step(State())
    assert (counts.failed, counts.dropped, counts.trained) == (2, 2, 4) and run.rows(1) == [0, 3, 4, 5]
    assert counts.summary() == "6 responses, 2 failed (no answer)" and "rollout engine" in counts.remedy()
    # Another start asks for them again, whoever answers now.
    again = Engine()
    batch, counts = run.start(again).step(State())
    assert (again.calls, counts.failed, counts.reused) == ([[1, 2]], 0, 4) and sorted(run.rows(1)) == list(range(6))
    (run.folder / "rollouts/step_0000001.jsonl").unlink()
    assert tokens_of(batch) == tokens_of(run.start(Engine()).step(State())[0])


def test_what_is_no_response_is_removed_from_a_finished_file(run: Run) -> None:
    run.start(Engine()).step(State())
    path = run.folder / "rollouts/step_0000001.jsonl"
    first, *others = path.read_text().splitlines()
    without = json.dumps(json.loads(first) | {"logprobs": None})
    path.write_text("\n".join([without, *others, '{"id": ']))
    engine = Engine()
    _, counts = run.start(engine).step(State())
    assert (engine.calls, counts.reused) == ([[0]], 5) and sorted(run.rows(1)) == list(range(6))
    path.write_text(path.read_text() + "{")
    _, counts = run.start(engine).step(State())
    assert counts.reused == 6 and len(run.rows(1)) == 6


def test_a_run_killed_twice_keeps_what_the_second_start_had(run: Run) -> None:
    """Where a finished file of other weights lay in its place."""
    run.start(Engine()).step(State())
    with pytest.raises(KeyboardInterrupt):
        run.start(Engine(dies_at=1)).step(State(weights="other"))
    engine = Engine()
    _, counts = run.start(engine).step(State(weights="other"))
    assert (engine.calls, counts.reused) == ([[4, 5]], 4)


def test_a_step_without_any_response_is_not_complete_for_ever(run: Run) -> None:
    everything = frozenset(range(6))
    _, counts = run.start(Engine(refuse=everything)).step(State())
    assert counts.failed == 6
    other, state = Engine(), State(weights="other")
    other.name = "another engine"
    batch, counts = run.start(other).step(state)
    assert sum(map(len, other.calls)) == 6 and counts.trained == 6 and batch is not None


def test_what_weights_that_are_gone_could_not_answer_is_not_asked_of_others(run: Run) -> None:
    run.settings = {"steps_per_rollout": 2, "max_staleness": 1}
    state = State()
    run.start(Engine(refuse=frozenset({7}))).step(state)
    resumed = state.after(1)
    resumed.rollout_version = state.rollout_version
    engine = Engine()
    _, counts = run.start(engine).step(resumed)
    assert engine.calls == [] and (counts.failed, counts.reused, counts.staleness) == (1, 5, 1)


def test_nothing_is_generated_for_steps_after_the_last(run: Run) -> None:
    run.settings = {"steps_per_rollout": 4, "max_staleness": 3}
    engine = Engine()
    rollouts = run.start(engine, train_iters=3)
    rollouts.config.train.train_iters = None  # train_epochs
    rollouts.step(State())
    assert sum(map(len, engine.calls)) == 18


@pytest.mark.parametrize("change", ["weights", "sampling", "engine", "prompt"])
def test_what_an_earlier_start_left_is_used_only_if_it_is_what_would_be_generated(run: Run, change: str) -> None:
    run.start(Engine()).step(State())
    engine, state = Engine(), State()
    if change == "weights":
        state.weights = "other"
    elif change == "sampling":
        run.settings["temperature"] = 0.5
    elif change == "engine":
        engine.name = "fake 2"
    rollouts = run.start(engine)
    if change == "prompt":
        rollouts.prompts.ids[:] = [[40 + i] for i in range(4)]
    _, counts = rollouts.step(state)
    assert sum(map(len, engine.calls)) == 6 and counts.reused == 0 and len(run.rows(1)) == 6


def test_steps_that_share_a_rollout_and_a_kill_between_them(run: Run) -> None:
    run.settings = {"steps_per_rollout": 2, "max_staleness": 1}
    engine, state, told = Engine(), State(), list[str]()
    rollouts = run.start(engine, begin=told.append)
    _, first = rollouts.step(state)
    assert (
        told == ["step-0000000-w0"]
        and engine.calls == [[0, 1, 2, 3], [4, 5], [6, 7, 8, 9], [10, 11]]
        and first.staleness == 0
    )
    later = state.after(1)
    later.rollout_version = state.rollout_version
    whole, second = rollouts.step(later)
    assert second.staleness == 1 and len(engine.calls) == 4
    # Started anew at step 2, with the version that its checkpoint holds.
    resumed = state.after(1)
    resumed.rollout_version = state.rollout_version
    fresh = Engine()
    batch, counts = run.start(fresh).step(resumed)
    assert fresh.calls == [] and counts.staleness == 1 and tokens_of(batch) == tokens_of(whole)
    # If the file is gone, the weights of now answer.
    (run.folder / "rollouts/step_0000002.jsonl").unlink()
    _, counts = run.start(fresh).step(resumed)
    assert fresh.calls == [[6, 7, 8, 9], [10, 11]] and counts.staleness == 0
    assert resumed.rollout_version == "step-0000001-w1"
    # So they do if a part of it is gone: one step has responses of one version.
    run.folder = run.folder / "again"
    run.start(Engine()).step(State())
    path, state = run.folder / "rollouts/step_0000002.jsonl", State().after(1)
    path.with_name(f"{path.name}.partial").write_text("".join(path.read_text().splitlines(keepends=True)[:3]))
    path.unlink()
    state.rollout_version, last = "step-0000000-w0", Engine()
    _, counts = run.start(last).step(state)
    assert last.calls == [[6, 7, 8, 9], [10, 11]] and (counts.staleness, counts.reused) == (0, 0)
    assert run.rows(2) == list(range(6, 12)) and state.rollout_version == "step-0000001-w1"


def test_a_run_that_is_asked_to_stop_does_not_finish_the_rollout(run: Run) -> None:
    answers = iter([False, True])
    with pytest.raises(Interrupted):
        run.start(Engine(), stopping=lambda: next(answers)).step(State())
    engine = Engine()
    run.start(engine).step(State())
    assert engine.calls == [[4, 5]]


def test_routing_is_in_no_file_so_that_what_is_replayed_is_generated_again(run: Run) -> None:
    run.settings = {"routing_replay": True}
    run.start(Engine()).step(State())
    engine = Engine()
    run.start(engine).step(State())
    assert sum(map(len, engine.calls)) == 6


def test_a_server_that_is_never_told_answers_with_its_first_weights(run: Run) -> None:
    run.settings = {"engine": "openai", "max_staleness": 2}
    engine = Engine(collective=False)
    rollouts = run.start(engine)
    ages = [rollouts.step(State().after(step))[1] for step in range(4)]
    assert [counts.staleness for counts in ages] == [0, 1, 2, 0] and [c.too_old for c in ages] == [0, 0, 0, 6]
    assert engine.calls[:2] == [[0, 1, 2, 3], [4, 5]]  # what is done is on disk before the rest is asked for
    assert json.loads((run.folder / "rollouts/step_0000004.jsonl").read_text().splitlines()[0])["weights_version"] == (
        "step-0000000-first"
    )


def test_a_failing_server_fails_the_run(run: Run) -> None:
    class Broken(Engine):
        collective = False

        def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Response]:
            raise ZedaError("no answer", where="http://localhost")

    with pytest.raises(ZedaError, match="http://localhost: no answer"):
        run.start(Broken()).step(State())
