"""Everything ``zeda eval`` measures on one exported folder, as one dictionary.

Keys of the result (those of a measurement that was not asked for are absent):

    model                       path, architecture, weights_version, compute, num_layers, num_experts, num_zero_experts,
                                num_experts_per_token (the K in use)
    accuracy                    share of correct greedy responses; accuracy_interval (95 %, Wilson), accuracy_count,
                                accuracy_by_task {task: {accuracy, interval, count}}, stopped_share (responses that
                                ended by themselves), outcomes {prompts, correct: one 0 or 1 per prompt}
    kl_to_teacher               forward KL(teacher || model), nats per response token, full vocabulary
    skip_rate                   on response tokens, mean over layers; skip_rate_per_layer; skip_rate_prompt and
                                skip_rate_prompt_per_layer for the prompt tokens; response_tokens and prompt_tokens are
                                the counts
    expert_flops_saved          1 - real rows / (T K) over prompt and response tokens and all layers; K of config.json,
                                or the one before NET lowered it
    theoretical_speedup         static over dynamic FLOPs at the mean lengths of the rollouts (prefill, decode, total),
                                prefill with prompt_saved, decode with response_saved: the shares of the K slots of
                                config.json that prompt and response tokens do not compute; by_length: the same of
                                a prefill, and of a decode, of that many tokens
    perplexity                  of the held-out text; perplexity_tokens
    inputs                      the files that were read, how much of them, who made the rollouts; teacher
    seconds                     per measurement
    versions                    of the libraries
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import megatron_zeda
from megatron_zeda.errors import InputError
from megatron_zeda.evaluation.accuracy import measure_accuracy, outcomes_of
from megatron_zeda.evaluation.flops import ModelShape, expert_flops_saved, model_speedup, speedup_by_length
from megatron_zeda.evaluation.scoring import check_ids, read_texts, score_rollouts, score_text
from megatron_zeda.models import teacher_topk
from megatron_zeda.rollout.engine import Request, Sampling
from megatron_zeda.rollout.files import Prompt, Rollout, read_prompts, read_rollouts
from megatron_zeda.rollout.hf_folder import read_config, weights_version
from megatron_zeda.rollout.transformers_engine import TransformersEngine

# Perplexity is taken over windows of at most this many tokens: longer ones cost memory and hardly change it.
_LONGEST_WINDOW = 2048


@dataclass(frozen=True)
class EvaluationInputs:
    """What to measure. At least one of ``prompts``, ``rollouts`` and ``text``.

    Attributes:
        model: Hugging Face folder, static or dynamic.
        teacher: Hugging Face folder; adds the KL on the rollouts.
        prompts: prompt file with answers, for the accuracy of greedy responses.
        rollouts: rollout file, for KL and skip rate on its response tokens.
        text: held-out text, for perplexity.
        num_experts_per_token: evaluate a static model with another K.
        limit: use only that many prompts and rollouts, from the beginning.
        max_new_tokens: longest greedy response.
        normaliser: name of a rule in :data:`megatron_zeda.evaluation.accuracy.NORMALISERS`.
        batch_size: sequences at once.
        dtype: see :func:`megatron_zeda.rollout.hf_folder.resolve_dtype`.
        trust_remote_code: run modelling code found in the folders.
    """

    model: Path
    teacher: Path | None = None
    prompts: Path | None = None
    rollouts: Path | None = None
    text: Path | None = None
    num_experts_per_token: int | None = None
    limit: int | None = None
    max_new_tokens: int = 4096
    normaliser: str = "strip"
    batch_size: int = 128
    dtype: str = "auto"
    trust_remote_code: bool = False

    def check(self) -> None:
        """Raise an :class:`InputError` for a combination that measures nothing or cannot be."""
        if self.prompts is None and self.rollouts is None and self.text is None:
            raise InputError("nothing to measure", where="zeda eval", fix="give --prompts, --rollouts or --text")
        if self.teacher is not None and self.rollouts is None:
            raise InputError(
                "no responses to compare on",
                where="--teacher",
                rule="the KL is taken on rollouts",
                fix="give --rollouts",
            )
        for name in ("limit", "batch_size", "max_new_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError("out of range", where=name, value=value, rule="at least 1")


def evaluate(inputs: EvaluationInputs, *, device: torch.device | None = None) -> dict[str, Any]:
    """Measure one model; see the module's docstring for the result.

    Raises:
        InputError: wrong inputs, a model folder or file that cannot be used, prompts without answers, rollouts or a
            teacher of another vocabulary.
    """
    inputs.check()
    seconds: dict[str, float] = {}
    prompts = read_checkable(inputs.prompts, inputs.limit) if inputs.prompts else []
    rollouts = read_rollouts(inputs.rollouts)[: inputs.limit] if inputs.rollouts else []
    texts = read_texts(inputs.text) if inputs.text else []
    with _timed(seconds, "load"):
        engine = _engine(inputs, inputs.model, inputs.num_experts_per_token, device)
        teacher = _teacher(inputs, engine, device)
    result: dict[str, Any] = {"model": _describe(engine)}
    if prompts:
        with _timed(seconds, "accuracy"):
            result |= _accuracy(engine, prompts, inputs)
    if inputs.rollouts:
        check_ids(rollouts, vocab_size=engine.config["vocab_size"], context=engine.context, where=inputs.rollouts)
        with _timed(seconds, "rollouts"):
            scores = asdict(
                score_rollouts(
                    engine.model, rollouts, teacher=teacher.model if teacher else None, batch_size=inputs.batch_size
                )
            )
        result |= _savings(engine, scores.pop("real_rows"), scores.pop("tokens"), scores, len(rollouts))
        result |= {key: value for key, value in scores.items() if value is not None}
    if inputs.text:
        with _timed(seconds, "text"):
            found = score_text(
                engine.model,
                [engine.codec.tokenizer.encode(text) for text in texts],
                window=min(engine.context, _LONGEST_WINDOW),
                batch_size=inputs.batch_size,
                where=inputs.text,
            )
        result |= {"perplexity": found.perplexity, "perplexity_tokens": found.tokens}
    result["inputs"] = _record_inputs(inputs, prompts, rollouts)
    return result | {"seconds": seconds, "versions": _versions()}


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    started = time.monotonic()
    yield
    seconds[name] = round(time.monotonic() - started, 2)


def _engine(
    inputs: EvaluationInputs, folder: Path, num_experts_per_token: int | None, device: torch.device | None
) -> TransformersEngine:
    return TransformersEngine(
        folder,
        dtype=inputs.dtype,
        device=device,
        batch_size=inputs.batch_size,
        trust_remote_code=inputs.trust_remote_code,
        num_experts_per_token=num_experts_per_token,
    )


def _teacher(
    inputs: EvaluationInputs, engine: TransformersEngine, device: torch.device | None
) -> TransformersEngine | None:
    """The teacher; the model itself when it is its own teacher."""
    if inputs.teacher is None:
        return None
    if inputs.num_experts_per_token is None and inputs.teacher.resolve() == inputs.model.resolve():
        return engine
    theirs, ours = read_config(inputs.teacher)["vocab_size"], engine.config["vocab_size"]
    if theirs != ours:
        raise InputError(
            f"the teacher has {theirs} tokens in its vocabulary and the model {ours}",
            where=inputs.teacher,
            rule="KL compares distributions over the same tokens",
            fix="give the teacher that the model was made from",
        )
    teacher = _engine(inputs, inputs.teacher, None, device)
    known = (engine.codec.vocabulary, teacher.codec.vocabulary)
    if None not in known and known[0] != known[1]:
        raise InputError(
            "the teacher's tokenizer has other tokens than the model's",
            where=inputs.teacher,
            rule="KL compares distributions over the same tokens",
            fix="give the teacher that the model was made from",
        )
    return teacher


def read_checkable(path: Path, limit: int | None = None) -> list[Prompt]:
    """Read prompts of which every one has an answer.

    Raises:
        InputError: what :func:`read_prompts` refuses, or a prompt without ``answer``.
    """
    prompts = read_prompts(path)[:limit]
    for prompt in prompts:
        if prompt.answer is None:
            raise InputError(
                "no `answer`",
                where=prompt.where,
                rule="accuracy needs an answer in every prompt",
                fix="add or delete it",
            )
    return prompts


def _accuracy(engine: TransformersEngine, prompts: Sequence[Prompt], inputs: EvaluationInputs) -> dict[str, Any]:
    sampling = Sampling(max_new_tokens=inputs.max_new_tokens, temperature=0.0)
    requests = [Request(engine.codec.encode(prompt), row) for row, prompt in enumerate(prompts)]
    responses = engine.generate(requests, sampling)
    answers = [prompt.answer or "" for prompt in prompts]
    outcomes = outcomes_of([engine.codec.text(response) for response in responses], answers, inputs.normaliser)
    total, by_task = measure_accuracy(outcomes, [prompt.task for prompt in prompts])
    asked = [[prompt.id, prompt.content, prompt.answer] for prompt in prompts]
    return {
        "accuracy": total.value,
        "accuracy_interval": list(total.interval),
        "accuracy_count": total.count,
        "accuracy_by_task": {
            task: {"accuracy": found.value, "interval": list(found.interval), "count": found.count}
            for task, found in by_task.items()
        },
        "stopped_share": sum(response.finish_reason == "stop" for response in responses) / len(responses),
        "outcomes": {
            "prompts": f"sha256:{hashlib.sha256(json.dumps(asked).encode()).hexdigest()}",
            "correct": "".join("01"[outcome] for outcome in outcomes),
        },
    }


def _savings(
    engine: TransformersEngine, real_rows: int, tokens: int, scores: dict[str, Any], count: int
) -> dict[str, Any]:
    full_topk, topk = teacher_topk(engine.config), engine.model.config.num_experts_per_tok
    saved = expert_flops_saved(real_rows, tokens, full_topk)

    def saved_by(skip_rate: float | None) -> float:
        """From a share of the K slots in use to one of those of config.json; prompts of one token say nothing."""
        return saved if skip_rate is None else 1 - (1 - skip_rate) * topk / full_topk

    speedup = {
        "prompt_saved": saved_by(scores["skip_rate_prompt"]),
        "response_saved": saved_by(scores["skip_rate"]),
        "prompt_tokens": max(1, round(scores["prompt_tokens"] / count) + 1),
        "response_tokens": max(1, round(scores["response_tokens"] / count)),
    }
    shape = ModelShape.from_hf_config(engine.config)
    rates = {"prompt_skip_rate": speedup["prompt_saved"], "response_skip_rate": speedup["response_saved"]}
    found = model_speedup(shape, **rates, prompt=speedup["prompt_tokens"], response=speedup["response_tokens"])
    by_length = speedup_by_length(shape, **rates)
    return {"expert_flops_saved": saved, "theoretical_speedup": {**found, **speedup, "by_length": by_length}}


def _describe(engine: TransformersEngine) -> dict[str, Any]:
    shape = ModelShape.from_hf_config(engine.config)
    return {
        "path": str(engine.folder),
        "architecture": type(engine.model).__name__,
        "weights_version": weights_version(engine.folder),
        "compute": engine.name,
        "num_layers": engine.config["num_hidden_layers"],
        "num_experts": shape.experts,
        "num_zero_experts": shape.zero_experts,
        "num_experts_per_token": engine.model.config.num_experts_per_tok,
    }


def _record_inputs(inputs: EvaluationInputs, prompts: Sequence[Prompt], rollouts: Sequence[Rollout]) -> dict[str, Any]:
    record: dict[str, Any] = {}
    if inputs.prompts is not None:
        record["prompts"] = {
            "path": str(inputs.prompts),
            "count": len(prompts),
            "max_new_tokens": inputs.max_new_tokens,
            "normaliser": inputs.normaliser,
        }
    if inputs.rollouts is not None:
        record["rollouts"] = {
            "path": str(inputs.rollouts),
            "count": len(rollouts),
            "weights_versions": sorted({rollout.weights_version for rollout in rollouts}),
        }
    for name in ("text", "teacher"):
        path = getattr(inputs, name)
        if path is not None:
            record[name] = str(path)
    return record


def _versions() -> dict[str, str]:
    import transformers

    return {
        "megatron_zeda": megatron_zeda.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
