"""What becomes of the responses of a step: trained on or counted, and what is reported of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from megatron_zeda.config import Config
from megatron_zeda.data import BatchBuilder, GlobalBatch, Sample
from megatron_zeda.errors import ZedaError
from megatron_zeda.rollout.engine import Response


@dataclass
class Counts:
    """What became of the responses of a step: the object ``rollout`` of its line in ``metrics.jsonl``.

    Attributes:
        responses: asked for.
        trained: in the batch.
        tokens: of the responses that the engine gave, dropped or not.
        mean_length: tokens of one of these.
        stopped: ended by themselves.
        cut: ended at ``max_new_tokens`` or at ``seq_length``.
        empty: said nothing.
        failed: the engine did not give them.
        too_old: sampled with weights from more than ``rollout.max_staleness`` steps before.
        dropped: not in the batch: empty, failed, too old, and cut ones under ``rollout.cut_responses=drop``.
        reused: found in the run's folder instead of generated.
        staleness: steps between the oldest weights that a response in the batch was sampled with and this step.
        seconds: spent on generating.
        error: why the first of the failed ones could not be had.
    """

    responses: int = 0
    trained: int = 0
    tokens: int = 0
    mean_length: float = float("nan")
    stopped: int = 0
    cut: int = 0
    empty: int = 0
    failed: int = 0
    too_old: int = 0
    dropped: int = 0
    reused: int = 0
    staleness: int = 0
    seconds: float = 0.0
    error: str | None = None

    def summary(self) -> str:
        """What was wrong with the responses, for the user."""
        wrong = [f"{getattr(self, name)} {name.replace('_', ' ')}" for name in _REMEDIES if getattr(self, name)]
        reason = f" ({self.error})" if self.error else ""
        return f"{self.responses} responses, {', '.join(wrong) or 'none dropped'}{reason}"

    def remedy(self) -> str:
        """What to do about the most frequent fault."""
        return _REMEDIES[max(_REMEDIES, key=lambda name: int(getattr(self, name)))]


# What to do about responses that are not trained on; of equally frequent faults the first one is named.
_REMEDIES = {
    "failed": "look at the log of the rollout engine, and at rollout.timeout_minutes",
    "too_old": "set rollout.reload, or raise rollout.max_staleness",
    "empty": "look at the prompts and at rollout.stop_token_ids",
    "cut": "raise rollout.max_new_tokens and model.seq_length, or set rollout.cut_responses=train",
}


def to_samples(
    responses: Sequence[tuple[list[int], Response]], config: Config, *, step: int, vocab_size: int, where: str
) -> tuple[list[Sample], Counts]:
    """Choose what is trained on, by token ids alone.

    Args:
        responses: prompt and response, in the order of their rows.
        config: says how old a response may be and what happens to cut ones.
        step: steps done before this one.
        vocab_size: ids must be below it.
        where: names the step in the samples.

    Raises:
        ZedaError: an id outside the vocabulary: the engine has another tokenizer.
    """
    counts = Counts(responses=len(responses))
    samples: list[Sample] = []
    keep = config.model.seq_length + 1  # the last token is predicted, not read
    for number, (prompt, response) in enumerate(responses):
        if response.finish_reason == "error":
            counts.failed += 1
            counts.error = counts.error or response.error
            continue
        counts.tokens += len(response.ids)
        outside = [i for i in response.ids if not 0 <= i < vocab_size]
        if outside:
            raise ZedaError(
                "the rollout engine gave a token id outside the vocabulary",
                where=where,
                value=outside[0],
                rule=f"ids are 0 to {vocab_size - 1}",
                fix="let the engine serve the student with its own tokenizer",
            )
        age = step - (response.weights_version or 0)
        cut_to_sequence = len(prompt) + len(response.ids) > keep
        cut = response.finish_reason == "length" or cut_to_sequence
        counts.stopped += not cut
        counts.cut += cut
        counts.empty += response.empty
        counts.too_old += age > config.rollout.max_staleness
        if response.empty or age > config.rollout.max_staleness or (cut and config.rollout.cut_responses == "drop"):
            continue
        counts.staleness = max(counts.staleness, age)
        samples.append(_sample(prompt, response, keep, where=f"{where}:{number + 1}"))
    counts.trained, counts.dropped = len(samples), len(responses) - len(samples)
    given = counts.responses - counts.failed
    counts.mean_length = counts.tokens / given if given else float("nan")
    return samples, counts


def _sample(prompt: list[int], response: Response, keep: int, *, where: str) -> Sample:
    tokens = [*prompt, *response.ids]
    logprobs = [*[0.0] * len(prompt), *response.logprobs]
    routing = None if response.routing is None else response.routing[: keep - 1].astype(np.int16)
    return Sample(
        tokens=np.array(tokens[:keep], dtype=np.int32),
        is_response=np.arange(len(tokens[:keep])) >= len(prompt),
        where=where,
        cut_to_sequence=len(tokens) > keep,
        stopped_at_limit=response.finish_reason == "length",
        logprobs=np.array(logprobs[:keep], dtype=np.float32),
        routing=routing,
    )


def to_batch(samples: Sequence[Sample], builder: BatchBuilder) -> GlobalBatch | None:
    """The batch of a step; dropped responses are empty rows of it. None where there is nothing to train on."""
    missing = builder.global_batch_size - len(samples)
    return builder.build_samples([*samples, *[None] * missing]) if samples else None


def rollout_values(counts: Counts, sums: Mapping[str, float], version: str) -> dict[str, Any]:
    """The object ``rollout`` of a step's line in ``metrics.jsonl``.

    Args:
        counts: of the responses.
        sums: of the step, by :data:`.estimators.SUM_NAMES`.
        version: of the weights that sampled the responses.
    """
    tokens = sums["tokens"] or float("nan")
    return {
        **asdict(counts),
        # How far trainer and engine are apart on the sampled tokens: |log p_trainer - log p_engine|.
        "logprob_gap": sums["logprob_gap"] / tokens,
        "logprob_gap_max": sums["logprob_gap_max"],
        "kl_engine": sums["logprob_gap_k3"] / tokens,
        "importance": sums["importance"] / tokens,
        "capped": sums["capped"] / tokens,
        "clipped": sums["clipped"] / tokens,
        "weights_version": version,
    }


def check_engine(config: Config, values: Mapping[str, Any], step: int) -> None:
    """Refuse to go on with an engine that computes with other weights than the trainer.

    A server may answer that it loaded new weights and go on with broken ones: nothing but its answers tells.

    Args:
        config: the configuration.
        values: of :func:`rollout_values`.
        step: for the message.

    Raises:
        ZedaError: responses of the present weights, which the trainer finds too improbable (or too probable).
    """
    limit, gap = config.rollout.max_logprob_gap, values["logprob_gap"]
    if limit is None or values["staleness"] > 0 or not gap > limit:
        return
    raise ZedaError(
        f"the engine's log-probabilities are {gap:.3g} nats from the trainer's, on average over the tokens of its "
        "responses: it does not compute with the weights it was given",
        where=f"step {step}",
        rule=f"at most {limit:g} (rollout.max_logprob_gap)",
        fix="restart the server with the newest folder of rollout_weights, or use rollout.engine=megatron; the last "
        "checkpoint is intact",
    )
