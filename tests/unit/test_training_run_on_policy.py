"""Whole runs of stage 2 in this process: against transformers, killed and resumed, with routing replayed."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from completions_server import CompletionsServer, serving, transformers_completions
from on_policy_runs import add_prompts, make_stage_2
from training_runs import make_run

from megatron_zeda.config import Config
from megatron_zeda.conversion import megatron_to_hf, verify_checkpoint
from megatron_zeda.distillation import FrozenTeacher
from megatron_zeda.errors import ZedaError
from megatron_zeda.rollout.engine import Request, Response, Sampling
from megatron_zeda.rollout.files import Rollout, read_rollouts
from megatron_zeda.rollout.hf_folder import load_model
from megatron_zeda.rollout.megatron_engine import MegatronEngine
from megatron_zeda.training import checkpoint, train
from megatron_zeda.training import teacher as teachers
from megatron_zeda.training.rollout_files import first_weights

pytestmark = pytest.mark.slow  # whole training runs: `make test`, not `make check`


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("on-policy")
    make_run(folder)
    add_prompts(folder)
    return folder


@pytest.fixture(scope="module")
def whole(root: Path) -> Config:
    """An uninterrupted run that saved at steps 2 and 4."""
    config = make_stage_2(root, "whole")
    config.checkpoint.save_interval = 2
    assert train(config) == 0
    return config


def lines_of(config: Config) -> list[dict[str, Any]]:
    """The metrics without what depends on the clock or on what was found on disk."""
    lines = [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        del line["tokens_per_second"]
        for name in ("seconds", "reused"):
            del line["rollout"][name]
    return lines


def rollouts_of(config: Config, step: int) -> list[Rollout]:
    return read_rollouts(config.run_dir / f"rollouts/step_{step:07d}.jsonl")


@torch.no_grad()
def log_probabilities(folder: Path, rollouts: Sequence[Rollout]) -> list[torch.Tensor]:
    """Of all tokens at every position of the responses, by transformers."""
    model = load_model(folder, device=torch.device("cpu"))
    result = []
    for rollout in rollouts:
        ids = torch.tensor([[*rollout.prompt_ids, *rollout.response_ids]])
        logits = model(input_ids=ids).logits[0, len(rollout.prompt_ids) - 1 : -1]
        result.append(logits.double().log_softmax(-1))
    return result


def test_the_first_step_is_the_reverse_kl_of_what_the_student_said(root: Path, whole: Config) -> None:
    rollouts, line = rollouts_of(whole, 1), lines_of(whole)[0]
    student, teacher = (log_probabilities(root / name, rollouts) for name in ("student_hf", "teacher_hf"))
    kl = torch.cat([(p.exp() * (p - q)).sum(-1) for p, q in zip(student, teacher, strict=True)])
    assert line["kl_reverse"] == pytest.approx(float(kl.mean()), rel=1e-5) and line["ce"] is None
    assert line["loss"] == pytest.approx(line["kl_reverse"] + 0.1 * 2 * line["balance_loss"], rel=1e-6)
    gaps = []
    for rollout, logprobs in zip(rollouts, student, strict=True):
        chosen = logprobs[range(len(rollout.response_ids)), rollout.response_ids]
        assert rollout.logprobs == pytest.approx(chosen.tolist(), abs=2e-6)
        gaps += (chosen - torch.tensor(rollout.logprobs, dtype=torch.float64)).abs().tolist()
    assert line["rollout"]["logprob_gap"] == pytest.approx(np.mean(gaps), abs=1e-6)
    assert 0 <= line["rollout"]["logprob_gap_max"] < 1e-5 and abs(line["rollout"]["kl_engine"]) < 1e-9
    assert line["rollout"]["importance"] == pytest.approx(1.0, abs=1e-5)


def test_what_a_run_leaves(root: Path, whole: Config) -> None:
    lines, seen = lines_of(whole), []
    for step, line in enumerate(lines, start=1):
        rollouts = rollouts_of(whole, step)
        seen += [(rollout.id, rollout.sampling["sample"]) for rollout in rollouts]
        counts = line["rollout"]
        assert counts["responses"] == len(rollouts) == 8 and counts["trained"] + counts["dropped"] == 8
        assert counts["stopped"] == sum(rollout.finish_reason == "stop" for rollout in rollouts)
        assert counts["stopped"] + counts["cut"] == 8 and counts["failed"] == counts["too_old"] == 0
        assert counts["tokens"] == sum(len(rollout.response_ids) for rollout in rollouts)
        assert {rollout.weights_version for rollout in rollouts} == {counts["weights_version"]}
        assert counts["weights_version"].startswith(f"step-{step - 1:07d}-")
        for rollout in rollouts:
            assert (rollout.response_ids[-1] in (1, 2, 3, 4, 5)) == (rollout.finish_reason == "stop")
    # Ten prompts, two responses to each: the first 20 of 32 are one pass.
    assert sorted(seen[:20]) == sorted((f"p{i}", sample) for i in range(10) for sample in (0, 1))
    names = [line["rollout"]["weights_version"].split("-")[2] for line in lines]
    assert len(set(names)) == 4 and names[0] == first_weights(whole)
    kl = [line["kl_reverse"] for line in lines]
    assert all(value > 0 for value in kl) and all(line["skipped_steps"] == 0 for line in lines)
    # Two responses to a prompt differ, and so do those to it in another pass.
    texts = {tuple(rollout.response_ids) for step in (1, 2, 3, 4) for rollout in rollouts_of(whole, step)}
    assert len(texts) > 24


class Killed(BaseException):
    """As good as SIGKILL for a single process: nothing of ours catches it."""


def test_law_7_a_run_killed_while_it_generates(root: Path, whole: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed in the rollout of step 4, two steps after the last checkpoint."""
    config = make_stage_2(root, "killed")
    config.checkpoint.save_interval = 2
    generate, calls = MegatronEngine.generate, [0]

    def dying(self: MegatronEngine, requests: Sequence[Request], sampling: Sampling) -> list[Response]:
        calls[0] += 1
        if calls[0] == 8:  # the second group of the fourth step
            raise Killed
        return generate(self, requests, sampling)

    monkeypatch.setattr(MegatronEngine, "generate", dying)
    with pytest.raises(Killed):
        train(config)
    assert (config.save_dir / "latest_checkpointed_iteration.txt").read_text().strip() == "2"
    calls[0] = 10
    assert train(config) == 0
    assert calls[0] == 11  # the rest of step 4: step 3 and half of step 4 were there
    assert lines_of(config) == lines_of(whole)
    assert [rollouts_of(config, step) for step in (1, 2, 3, 4)] == [rollouts_of(whole, step) for step in (1, 2, 3, 4)]
    for run in (config, whole):
        megatron_to_hf(run.save_dir, run.run_dir / "hf")
    assert verify_checkpoint(whole.run_dir / "hf", config.run_dir / "hf") == []


def test_law_7_with_steps_that_share_a_rollout_and_without_the_files(root: Path) -> None:
    runs = []
    for name in ("shared", "shared-resumed"):
        config = make_stage_2(root, name)
        config.rollout.steps_per_rollout, config.rollout.max_staleness = 2, 1
        config.distillation.estimator, config.checkpoint.save_interval = "sampled", 3
        if name == "shared":
            assert train(config) == 0
        else:  # from the checkpoint between two steps that share a rollout
            shutil.copytree(runs[0].run_dir, config.run_dir)
            shutil.rmtree(config.save_dir / "iter_0000004")
            (config.save_dir / "latest_checkpointed_iteration.txt").write_text("3")
            assert train(config) == 0
        runs.append(config)
    assert lines_of(runs[0]) == lines_of(runs[1])
    assert [line["rollout"]["staleness"] for line in lines_of(runs[0])] == [0, 1, 0, 1]
    stale = lines_of(runs[0])[1]["rollout"]
    assert stale["logprob_gap_max"] > 1e-3 and stale["kl_engine"] > 0  # the weights have moved since


def test_a_run_that_trains_on_nothing_says_so_and_stops(root: Path) -> None:
    config = make_stage_2(root, "nothing")
    config.rollout.cut_responses, config.rollout.max_new_tokens, config.train.max_skipped_steps = "drop", 1, 2
    config.rollout.stop_token_ids = [0]
    with pytest.raises(ZedaError, match="2 steps in a row"):
        train(config)
    lines = lines_of(config)
    assert [line["rollout"]["trained"] for line in lines] == [0, 0] and lines[-1]["skipped_steps"] == 2
    assert [line["rollout"]["cut"] + line["rollout"]["empty"] for line in lines] == [8, 8]
    assert lines[0]["loss"] is None and lines[0]["grad_norm"] is None


def replayed(root: Path, name: str, **settings: Any) -> list[dict[str, Any]]:
    config = make_stage_2(root, name)
    config.rollout.routing_replay, config.train.train_iters = True, 2
    for key, value in settings.items():
        section, field = key.split("__")
        setattr(getattr(config, section), field, value)
    assert train(config) == 0
    return lines_of(config)


def test_replayed_routing_is_that_of_the_rollout(root: Path, whole: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """In fp32 the trainer chooses what the engine chose; and where it is told something else, it does that."""
    for line, other in zip(replayed(root, "replayed"), lines_of(whole), strict=False):
        for key in ("kl_reverse", "grad_norm", "balance_loss"):
            assert line[key] == pytest.approx(other[key], rel=2e-5), key
        assert line["skip_rate_per_layer"] == other["skip_rate_per_layer"]

    generate = MegatronEngine.generate

    def zero_experts_only(self: MegatronEngine, requests: Sequence[Request], sampling: Sampling) -> list[Response]:
        responses = generate(self, requests, sampling)
        for response in responses:
            assert response.routing is not None and response.routing.shape[1:] == (2, 2)
            response.routing[:, 1] = [8, 11]  # of 8 real and 4 zero experts, in the second layer
        return responses

    monkeypatch.setattr(MegatronEngine, "generate", zero_experts_only)
    line, *_ = told = replayed(root, "told")
    assert line["skip_rate_per_layer"][1] == 1.0
    assert line["skip_rate_per_layer"][0] == lines_of(whole)[0]["skip_rate_per_layer"][0]
    assert line["kl_reverse"] > lines_of(whole)[0]["kl_reverse"] + 0.01
    # Layers that are computed again in the backward pass route as they are told, too.
    recompute = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    again = replayed(root, "recomputed", **{f"model__{key}": value for key, value in recompute.items()})
    for line, other in zip(again, told, strict=True):
        assert line["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-5)


def student_of(server: list[CompletionsServer], root: Path) -> Any:
    """Completions of whatever the server was told to load last; of the untrained student before."""
    completes: dict[str, Any] = {}

    def complete(body: dict[str, Any]) -> dict[str, Any]:
        path = server[0].loaded
        if path not in completes:
            folder = root / "student_hf" if path == "first" else Path(path)
            completes[path] = transformers_completions(load_model(folder, device=torch.device("cpu")))
        answer: dict[str, Any] = completes[path](body)
        return answer

    return complete


def without_ids_once() -> Callable[[dict[str, Any]], None]:
    """An edit that makes the fifth answer one that cannot be used."""
    calls = count()

    def edit(answer: dict[str, Any]) -> None:
        if next(calls) == 4:
            del answer["choices"][0]["token_ids"]

    return edit


def test_a_server_answers_with_the_weights_of_the_step(root: Path) -> None:
    box: list[CompletionsServer] = []
    with serving(student_of(box, root)) as server:
        box.append(server)
        runs = {}
        for reload in ("vllm", None):
            config = make_stage_2(root, f"server-{reload}")
            config.rollout.engine, config.rollout.url, config.rollout.reload = "openai", server.url, reload
            config.rollout.max_staleness, config.train.train_iters = 1, 3
            server.edit = without_ids_once() if reload else lambda answer: None
            assert train(config) == 0
            runs[reload] = [line["rollout"] for line in lines_of(config)]
            if reload:
                assert server.loaded == str(config.run_dir / "rollout_weights/2")
                server.loaded = "first"
    # Every step, the trainer computes the probabilities that the server gave: it had the trainer's weights.
    for counts in runs["vllm"]:
        assert counts["logprob_gap_max"] < 1e-4 and counts["staleness"] == counts["too_old"] == 0
    assert [counts["failed"] for counts in runs["vllm"]] == [1, 0, 0] and runs["vllm"][0]["trained"] <= 7
    # A server that is not told keeps the first weights: one step later they are too far, two steps later too old.
    first, second, third = runs[None]
    assert first["logprob_gap_max"] < 1e-4 < 1e-3 < second["logprob_gap_max"] and second["staleness"] == 1
    assert third["too_old"] == 8 and third["trained"] == 0


def test_a_server_that_only_says_it_loaded_the_weights_ends_the_run(root: Path) -> None:
    """Seen with a real server: a reload that reports success, and other tokens from then on."""
    complete = transformers_completions(load_model(root / "student_hf", device=torch.device("cpu")))
    config = make_stage_2(root, "server-that-lies")
    with serving(complete) as server:
        config.rollout.engine, config.rollout.url, config.rollout.reload = "openai", server.url, "vllm"
        config.rollout.max_logprob_gap, config.train.train_iters = 1e-4, 3
        with pytest.raises(ZedaError, match=r"step 2: the engine's log-probabilities are .* nats from the trainer's"):
            train(config)
    assert [line["rollout"]["staleness"] for line in lines_of(config)] == [0, 0]


# ---- what happens when things go wrong -------------------------------------------------------------------------------


def stopped_at(monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    """Ask the next run to stop while the engine answers for this time."""
    generate, calls = MegatronEngine.generate, count(1)

    def generating(self: MegatronEngine, requests: Sequence[Request], sampling: Sampling) -> list[Response]:
        if next(calls) == call:
            signal.raise_signal(signal.SIGTERM)
        return generate(self, requests, sampling)

    monkeypatch.setattr(MegatronEngine, "generate", generating)


def test_a_run_that_is_asked_to_stop_in_its_first_rollout(
    root: Path, whole: Config, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    config = make_stage_2(root, "stopped-early")
    config.checkpoint.save_interval = 2
    stopped_at(monkeypatch, 1)
    assert train(config) == 0
    assert "stopping after step 0: SIGTERM" in capfd.readouterr().out
    assert not config.save_dir.exists() and len(partial_of(config, 1)) == 4
    monkeypatch.undo()
    assert train(config) == 0
    assert lines_of(config) == lines_of(whole)


def partial_of(config: Config, step: int) -> list[str]:
    return (config.run_dir / f"rollouts/step_{step:07d}.jsonl.partial").read_text().splitlines()


def test_a_stop_in_a_rollout_leaves_the_checkpoint_before_it_alone(
    root: Path, whole: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_stage_2(root, "stopped-after-saving")
    config.checkpoint.save_interval = 2
    stopped_at(monkeypatch, 5)  # two calls a step: in the rollout of step 3, just after a checkpoint
    saved = list[int]()
    save = checkpoint.save_checkpoint

    def saving(config: Config, *state: Any) -> Path:
        saved.append(state[-1].iteration)
        return save(config, *state)

    monkeypatch.setattr(checkpoint, "save_checkpoint", saving)
    # What was written and never named is replaced, without a moment in which it is half of a checkpoint.
    (config.save_dir / "iter_0000002" / "left").mkdir(parents=True)
    removed, rmtree = list[str](), shutil.rmtree
    monkeypatch.setattr(shutil, "rmtree", lambda path, **kw: (removed.append(Path(path).name), rmtree(path, **kw)))
    assert train(config) == 0
    assert [name for name in removed if "iter_" in name] == [".iter_0000002.deleted"]
    assert saved == [2] and len(partial_of(config, 3)) == 4
    monkeypatch.undo()
    # One step later there is something to save.
    stopped_at(monkeypatch, 2)  # the rest of step 3, and half of step 4
    assert train(config) == 0
    assert (config.save_dir / "latest_checkpointed_iteration.txt").read_text().strip() == "3"
    monkeypatch.undo()
    assert train(config) == 0
    assert lines_of(config) == lines_of(whole)


def failing(monkeypatch: pytest.MonkeyPatch, calls: int) -> None:
    """Let the engine fail so many times."""
    generate, call = MegatronEngine.generate, count()

    def answer(self: MegatronEngine, requests: Sequence[Request], sampling: Sampling) -> list[Response]:
        responses = generate(self, requests, sampling)
        if next(call) < calls:
            for response in responses:
                response.fail("server hiccup")
        return responses

    monkeypatch.setattr(MegatronEngine, "generate", answer)


@pytest.mark.parametrize("offload", [False, True])
def test_a_step_without_responses_is_told_saved_and_over_with_the_next_start(
    root: Path, offload: bool, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def make(name: str) -> Config:
        config = make_stage_2(root, f"{name}-{offload}")
        config.optimizer.use_precision_aware_optimizer = config.optimizer.optimizer_cpu_offload = offload
        config.model.bf16, config.train.train_iters = offload, 3
        return config

    config = make("hiccup")
    config.checkpoint.save_interval, config.train.max_skipped_steps = 1, 2
    failing(monkeypatch, 100)
    with pytest.raises(ZedaError) as caught:
        train(config)
    told = "2 with nothing to train on (the latest responses: 8 responses, 8 failed (server hiccup))"
    assert told in str(caught.value) and "rollout engine" in str(caught.value) and "lr" not in str(caught.value)
    out = capfd.readouterr().out
    assert "step 1: nothing to train on: 8 responses, 8 failed (server hiccup)" in out and "loss nan" not in out
    assert [line["rollout"]["error"] for line in lines_of(config)] == ["server hiccup"] * 2
    # The checkpoint of a student without any update is one, and the step it lost is asked for again.
    assert (config.save_dir / "latest_checkpointed_iteration.txt").read_text().strip() == "1"
    monkeypatch.undo()
    assert train(config) == 0
    lines = lines_of(config)
    assert [line["rollout"]["failed"] for line in lines] == [8, 0, 0] and lines[-1]["skipped_steps"] == 1
    # Its first update is the one that an optimizer without a past makes.
    again = make("hiccup-uninterrupted")
    failing(monkeypatch, 2)
    assert train(again) == 0
    assert [line["kl_reverse"] for line in lines_of(again)] == [line["kl_reverse"] for line in lines]


@pytest.mark.parametrize("resumed", [False, True])
def test_law_8_a_wrong_teacher_is_found_at_the_first_responses(
    root: Path, resumed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_stage_2(root, f"wrong-teacher-{resumed}")
    failing(monkeypatch, 2)
    build = teachers.build

    def wrong(*arguments: Any) -> Any:
        teacher = build(*arguments)
        assert teacher is not None
        for weight in teacher.chunks[0].parameters():
            weight.data.mul_(1.1)
        return teacher

    if resumed:
        config.checkpoint.save_interval, config.train.train_iters = 1, 1
        assert train(config) == 0
        config.train.train_iters = 2
    monkeypatch.setattr(teachers, "build", wrong)
    with pytest.raises(ZedaError, match="the student is not the teacher"):
        train(config)
    assert [line["rollout"]["trained"] for line in lines_of(config)] == [0]


def test_the_gate_compares_in_the_students_precision(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the teacher computes in FP8 and the student does not, which needs a GPU: here only what it is asked for."""
    config = make_stage_2(root, "gate-precision")
    config.train.train_iters = 2
    asked = list[bool | None]()
    states = FrozenTeacher.states

    def asking(self: FrozenTeacher, batch: Any, *, fp8: bool | None = None) -> Any:
        asked.append(fp8)
        self.fp8 = True  # after the first call: computed without it
        return states(self, batch, fp8=False)

    monkeypatch.setattr(FrozenTeacher, "states", asking)
    assert train(config) == 0
    assert asked == [None, False, None]
