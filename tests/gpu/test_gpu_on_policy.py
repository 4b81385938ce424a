"""Stage 2 on one GPU: what the engine samples and what the step makes of it against transformers; replay; memory."""

import json
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cpu_reference import call
from on_policy_runs import make_stage_2

from megatron_zeda import platform
from megatron_zeda.config import Config
from megatron_zeda.rollout.engine import Array, Request, Response, Sampling
from megatron_zeda.rollout.files import Rollout, read_rollouts
from megatron_zeda.rollout.hf_folder import load_model
from megatron_zeda.rollout.megatron_engine import MegatronEngine
from megatron_zeda.training import train

NUM_EXPERTS, TOPK = 8, 2
# fp32 GEMMs may run in TF32. In bf16 single tokens may be far off, where another expert was chosen: means are compared.
PRECISIONS: dict[str, tuple[dict[str, Any], float]] = {
    "fp32": ({"model.bf16": False}, 5e-3),
    "bf16": ({"model.bf16": True, "model.seq_length": 128}, 3e-2),
}
BF16 = PRECISIONS["bf16"][0]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Teacher, student and prompts, written by a process without GPU."""
    folder: Path = tmp_path_factory.mktemp("on-policy")
    call("on-policy", folder)
    return folder


def make(root: Path, name: str, settings: dict[str, Any]) -> Config:
    """Two steps of stage 2, with the fused kernels that there are."""
    config = make_stage_2(root, name)
    config.train.train_iters, config.optimizer.lr, config.optimizer.adam_eps = 2, 1e-3, 1e-5
    if platform.have_transformer_engine():
        config.model.moe_permute_fusion, config.model.overrides = True, {"moe_grouped_gemm": True}
    for key, value in settings.items():
        section, field = key.split(".")
        setattr(getattr(config, section), field, value)
    return config


def metrics(config: Config) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]


def rollouts(config: Config, step: int) -> list[Rollout]:
    return read_rollouts(config.run_dir / f"rollouts/step_{step:07d}.jsonl")


@torch.no_grad()
def log_probabilities(folder: Path, responses: Sequence[Rollout], dtype: str) -> list[torch.Tensor]:
    """Of all tokens at every position of the responses, by transformers on a CPU."""
    model = load_model(folder, device=torch.device("cpu"), dtype=dtype)
    result = []
    for response in responses:
        ids = torch.tensor([[*response.prompt_ids, *response.response_ids]])
        logits = model(input_ids=ids).logits[0, len(response.prompt_ids) - 1 : -1]
        result.append(logits.double().log_softmax(-1))
    return result


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_step_is_what_transformers_says(root: Path, precision: str, record: Callable[..., None]) -> None:
    """The engine's log-probabilities of what it sampled, and the reverse KL of the step that trains on it."""
    settings, tolerance = PRECISIONS[precision]
    config = make(root, f"step-{precision}", settings)
    assert train(config) == 0
    responses, line = rollouts(config, 1), metrics(config)[0]
    dtype = "bfloat16" if settings["model.bf16"] else "float32"
    student, teacher = (log_probabilities(root / name, responses, dtype) for name in ("student_hf", "teacher_hf"))
    gaps = torch.cat(
        [
            (p[range(len(r.response_ids)), r.response_ids] - torch.tensor(r.logprobs, dtype=torch.float64)).abs()
            for p, r in zip(student, responses, strict=True)
        ]
    )
    kl = torch.cat([(p.exp() * (p - q)).sum(-1) for p, q in zip(student, teacher, strict=True)])
    record(
        tokens=len(gaps),
        mean_gap=float(gaps.mean()),
        largest_gap=float(gaps.max()),
        kl=line["kl_reverse"],
        transformers_kl=float(kl.mean()),
        trainer_to_engine=line["rollout"]["logprob_gap"],
    )
    assert float(gaps.mean()) < tolerance and line["rollout"]["logprob_gap"] < tolerance
    assert line["kl_reverse"] == pytest.approx(float(kl.mean()), rel=10 * tolerance)
    assert line["rollout"]["trained"] + line["rollout"]["dropped"] == 8 and line["rollout"]["trained"] > 0


@pytest.mark.parametrize("recompute", [False, True])
def test_training_routes_as_the_rollout_says(
    root: Path, monkeypatch: pytest.MonkeyPatch, recompute: bool, record: Callable[..., None]
) -> None:
    """Even where that is not what it did: in the second layer two zero experts, in the first what was recorded."""
    kept: list[Array] = []
    generate = MegatronEngine.generate

    def told(self: MegatronEngine, requests: Sequence[Request], sampling: Sampling) -> list[Response]:
        responses = generate(self, requests, sampling)
        for response in responses:
            assert response.routing is not None and response.routing.shape[1:] == (2, TOPK)
            response.routing[:, 1] = [NUM_EXPERTS, NUM_EXPERTS + 3]
            kept.extend([] if response.empty else [response.routing])
        return responses

    monkeypatch.setattr(MegatronEngine, "generate", told)
    layers = {"granularity": "full", "method": "uniform", "num_layers": 1} if recompute else {}
    settings = {"rollout.routing_replay": True, "rollout.max_logprob_gap": None, "train.train_iters": 1}
    settings |= {f"model.recompute_{name}": value for name, value in layers.items()}
    config = make(root, f"replay-{recompute}", {**BF16, **settings})
    assert train(config) == 0
    (line,) = metrics(config)
    skipped = (np.concatenate(kept) >= NUM_EXPERTS).mean((0, 2))
    record(skip_rates=line["skip_rate_per_layer"], kl=line["kl_reverse"], gap=line["rollout"]["logprob_gap"])
    assert line["skip_rate_per_layer"] == pytest.approx(skipped.tolist(), abs=1e-12) and skipped[1] == 1.0 > skipped[0]
    assert line["grad_norm"] > 0


class Killed(BaseException):
    """As good as SIGKILL for a single process: nothing of ours catches it."""


def test_law_7_a_run_killed_while_it_generates(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it had is used, and the rest is sampled with the same weights: the gap to the trainer stays what it is."""
    config = make(root, "killed", {**BF16, "checkpoint.save_interval": 1})
    generate, calls = MegatronEngine.generate, count(1)

    def dying(self: MegatronEngine, requests: Sequence[Request], sampling: Sampling) -> list[Response]:
        if next(calls) == 4:  # the second half of the second step
            raise Killed
        return generate(self, requests, sampling)

    monkeypatch.setattr(MegatronEngine, "generate", dying)
    with pytest.raises(Killed):
        train(config)
    monkeypatch.undo()
    before = (config.run_dir / "rollouts/step_0000002.jsonl.partial").read_text().splitlines()
    assert train(config) == 0
    first, second = metrics(config)
    assert (first["rollout"]["reused"], second["rollout"]["reused"]) == (0, 4)
    assert (config.run_dir / "rollouts/step_0000002.jsonl").read_text().splitlines()[:4] == before
    assert second["rollout"]["logprob_gap"] < PRECISIONS["bf16"][1]


@pytest.mark.hardware
def test_generation_leaves_no_memory_behind(
    root: Path, monkeypatch: pytest.MonkeyPatch, record: Callable[..., None]
) -> None:
    """Neither the key-value cache nor logits; the first call may leave what is cached for good (rotary embeddings)."""
    left: list[int] = []
    generate = MegatronEngine.generate

    def measured(self: MegatronEngine, requests: Sequence[Request], sampling: Sampling) -> list[Response]:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        responses = generate(self, requests, sampling)
        left.append(torch.cuda.memory_allocated() - before)
        return responses

    monkeypatch.setattr(MegatronEngine, "generate", measured)
    assert train(make(root, "memory", BF16)) == 0
    record(bytes_left=left)
    assert len(left) == 4 and max(left[1:]) <= 1 << 16


@pytest.mark.hardware
@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise"])
def test_an_fp8_student_samples_in_bf16(root: Path, recipe: str, record: Callable[..., None]) -> None:
    """The engine turns FP8 off for its small batches; the trainer's log-probabilities differ by what FP8 rounds."""
    fp8 = {"model.fp8": "hybrid" if recipe == "tensorwise" else "e4m3", "model.fp8_recipe": recipe}
    config = make(root, f"fp8-{recipe}", {**BF16, **fp8})
    assert train(config) == 0
    gaps = [line["rollout"]["logprob_gap"] for line in metrics(config)]
    record(gaps=gaps, kl=[line["kl_reverse"] for line in metrics(config)])
    assert 0 < max(gaps) < 0.3
