"""Law 3 for stage 2: TP 2 x PP 2 x EP 2 generates and trains as one process does, with routing replayed too."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from on_policy_runs import add_prompts, make_stage_2
from spawn import run_distributed
from training_runs import make_run, run_training

from megatron_zeda.rollout.files import read_rollouts

pytestmark = pytest.mark.distributed

# A micro-step is four responses over all data-parallel ranks, as in one process: the balancing loss is about it.
LAYOUT: dict[str, Any] = {
    "model.tensor_model_parallel_size": 2,
    "model.sequence_parallel": True,
    "model.pipeline_model_parallel_size": 2,
    "model.expert_model_parallel_size": 2,
    "train.micro_batch_size": 2,
}
FULL: dict[str, Any] = {}
REPLAYED: dict[str, Any] = {
    "rollout.routing_replay": True,
    "distillation.estimator": "sampled",
    "dataset.packing": True,
    "zero_experts.balance_coeff": 0.0,  # packs are other micro-steps
    "model.recompute_granularity": "full",
    "model.recompute_method": "uniform",
    "model.recompute_num_layers": 1,
}


def train_one(root: Path, name: str, settings: dict[str, Any], *, steps: int = 2) -> None:
    config = make_stage_2(root, name)
    config.train.train_iters = steps
    config.optimizer.adam_eps = 1e-5  # or Adam makes whole steps of the rounding noise in gradients that are nearly 0
    for key, value in settings.items():
        section, field = key.split(".")
        setattr(getattr(config, section), field, value)
    run_training(config)


@contextmanager
def engine_that(meddles: Callable[[int, list[Any]], None]) -> Iterator[None]:
    """An engine whose responses somebody else has in hand; told which call this is, from 1."""
    from megatron_zeda.rollout.megatron_engine import MegatronEngine

    generate, calls = MegatronEngine.generate, count(1)

    def generating(self: Any, requests: Any, sampling: Any) -> Any:
        responses = generate(self, requests, sampling)
        meddles(next(calls), [(request.row, answer) for request, answer in zip(requests, responses, strict=True)])
        return responses

    MegatronEngine.generate = generating  # type: ignore[method-assign]
    try:
        yield
    finally:
        MegatronEngine.generate = generate  # type: ignore[method-assign]


def train_with_holes(root: Path, name: str, settings: dict[str, Any]) -> None:
    """One data-parallel rank has an empty micro-batch in step 1, all ranks have one in step 3; step 2 has nothing."""
    lost = {1, 2, 5, *range(8, 16), 17, 19, 20, 22}

    def lose(_: int, answers: list[Any]) -> None:
        for row, response in answers:
            if row in lost:
                response.fail("lost")

    with engine_that(lose):
        train_one(root, name, settings | {"checkpoint.save_interval": 1}, steps=3)


def train_stopped(root: Path, rank: int) -> None:
    """One rank is asked to stop in the middle of the second rollout; then the run goes on."""
    settings = LAYOUT | {"rollout.batch_size": 2}  # two groups a step

    def stop(call: int, _: list[Any]) -> None:
        if call == 3 and rank == 5:
            signal.raise_signal(signal.SIGTERM)

    with engine_that(stop):
        train_one(root, "stopped", settings)
    if rank == 0:
        shutil.copytree(root / "stopped/checkpoints", root / "stopped-at")
    train_one(root, "stopped", settings)


def all_runs(rank: int, world_size: int, root: str) -> None:
    train_one(Path(root), "full", FULL | LAYOUT)
    train_one(Path(root), "replayed", REPLAYED | LAYOUT)
    train_with_holes(Path(root), "holes", LAYOUT)
    train_stopped(Path(root), rank)
    # Where it was: in this layout the files of another start are used by all ranks, and the run is the same.
    if rank == 0:
        shutil.copytree(Path(root) / "full", Path(root) / "again")
        shutil.rmtree(Path(root) / "again/checkpoints")
        (Path(root) / "again/metrics.jsonl").unlink()
    import torch

    torch.distributed.barrier()
    train_one(Path(root), "again", FULL | LAYOUT)


def metrics(root: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (root / name / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("on-policy-layouts")
    make_run(folder)
    add_prompts(folder)
    train_one(folder, "one-full", FULL)
    train_one(folder, "one-replayed", REPLAYED | {"dataset.packing": False})
    train_with_holes(folder, "one-holes", {})
    run_distributed(all_runs, 8, str(folder))
    return folder


@pytest.mark.parametrize("name", ["full", "replayed"])
def test_law_3_stage_2(root: Path, name: str) -> None:
    expected, actual = metrics(root, f"one-{name}"), metrics(root, name)
    assert len(expected) == len(actual) == 2
    for step, (one, other) in enumerate(zip(expected, actual, strict=True), start=1):
        rollouts = [read_rollouts(root / run / f"rollouts/step_{step:07d}.jsonl") for run in (f"one-{name}", name)]
        for a, b in zip(*rollouts, strict=True):
            assert (a.id, a.sampling, a.prompt_ids, a.response_ids) == (b.id, b.sampling, b.prompt_ids, b.response_ids)
            assert a.logprobs == pytest.approx(b.logprobs, abs=5e-5)
        for key, tolerance in {"kl_reverse": 2e-4, "grad_norm": 2e-3, "loss": 2e-4}.items():
            assert other[key] == pytest.approx(one[key], rel=tolerance, abs=2e-6), (step, key)
        if name == "full":
            assert other["balance_loss"] == pytest.approx(one["balance_loss"], rel=1e-4)
        assert other["skip_rate_per_layer"] == pytest.approx(one["skip_rate_per_layer"], abs=1e-12)
        same = ("responses", "trained", "tokens", "stopped", "cut", "empty", "failed", "dropped")
        assert [other["rollout"][key] for key in same] == [one["rollout"][key] for key in same]
        assert abs(other["rollout"]["logprob_gap_max"]) < 1e-4


def test_what_another_start_has_generated_is_used_at_every_rank(root: Path) -> None:
    for line, again in zip(metrics(root, "full"), metrics(root, "again"), strict=True):
        assert again["rollout"]["reused"] == 8 and line["rollout"]["reused"] == 0
        assert again["kl_reverse"] == line["kl_reverse"] and again["grad_norm"] == line["grad_norm"]


def test_law_3_with_responses_that_are_not_there(root: Path) -> None:
    expected, actual = metrics(root, "one-holes"), metrics(root, "holes")
    assert [line["rollout"]["trained"] for line in actual] == [5, 0, 4]
    assert [line["rollout"]["failed"] for line in actual] == [3, 8, 4] and actual[-1]["skipped_steps"] == 1
    assert actual[1]["kl_reverse"] is None and actual[1]["rollout"]["error"] == "lost"
    for one, other in zip(expected[::2], actual[::2], strict=True):
        assert other["rollout"]["tokens"] == one["rollout"]["tokens"]
        for key, tolerance in {"kl_reverse": 2e-4, "grad_norm": 2e-3, "loss": 2e-4, "balance_loss": 1e-4}.items():
            assert other[key] == pytest.approx(one[key], rel=tolerance, abs=2e-6), (one["step"], key)


def test_law_7_one_of_the_ranks_is_asked_to_stop(root: Path) -> None:
    assert (root / "stopped-at/latest_checkpointed_iteration.txt").read_text().strip() == "1"
    for line, expected in zip(metrics(root, "stopped"), metrics(root, "full"), strict=True):
        assert line["rollout"]["reused"] == (4 if line["step"] == 2 else 0)
        for key in ("kl_reverse", "grad_norm", "loss", "balance_loss"):
            assert line[key] == pytest.approx(expected[key], rel=1e-4), (line["step"], key)
