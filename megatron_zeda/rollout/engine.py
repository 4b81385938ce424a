"""What all rollout engines have in common: requests in, responses out, as token ids.

An engine is anything with the two members of :class:`RolloutEngine`. What a caller may rely on, whichever it is:

- ``responses[i]`` answers ``requests[i]``, and nothing is left out: a response that could not be had is there with
  ``finish_reason="error"`` and the reason in ``error``.
- ``ids`` are the very tokens that the model sampled, with the one that ended the response.
- ``logprobs`` has one natural logarithm per token, under the model's distribution at temperature 1 over all tokens.
- A row's random numbers depend on ``Sampling.seed`` and ``Request.row`` alone, not on what else is generated with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np

from megatron_zeda.errors import InputError

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn.

    Attributes:
        max_new_tokens: longest response; the model's context may end it earlier.
        temperature: 0 is greedy.
        top_p: share of the probability mass that tokens are drawn from, most probable first.
        samples_per_prompt: responses per prompt (the caller repeats the request).
        seed: of all random numbers.
        stop_token_ids: tokens that end a response; None: those of the engine's model.

    Raises:
        InputError: a value out of its range.
    """

    max_new_tokens: int = 4096
    temperature: float = 1.0
    top_p: float = 1.0
    samples_per_prompt: int = 1
    seed: int = 0
    stop_token_ids: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        stop = self.stop_token_ids or ()
        rules: list[tuple[str, bool, str]] = [
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature < float("inf"), "0 (greedy) or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0, at most 1"),
            ("samples_per_prompt", self.samples_per_prompt >= 1, "at least 1"),
            ("seed", self.seed >= 0, "0 or more"),
            ("stop_token_ids", all(token >= 0 for token in stop), "token ids, 0 or more"),
        ]
        for name, holds, rule in rules:
            if not holds:
                raise InputError("out of range", where=name, value=getattr(self, name), rule=rule)
        if self.greedy and self.samples_per_prompt > 1:
            raise InputError(
                "several greedy samples of a prompt are the same",
                where="samples_per_prompt",
                value=self.samples_per_prompt,
                fix="raise the temperature above 0 or ask for one sample",
            )

    @property
    def greedy(self) -> bool:
        """Whether the most probable token is always taken."""
        return self.temperature == 0


@dataclass(frozen=True)
class Request:
    """A response that is wanted.

    Attributes:
        prompt_ids: token ids, at least one.
        row: names the random numbers; two samples of a prompt have two rows.
    """

    prompt_ids: list[int]
    row: int


@dataclass
class Response:
    """One generated response.

    Attributes:
        ids: token ids without padding, with the end-of-sequence token when it was generated.
        logprobs: per token, natural logarithm, under the model's distribution at temperature 1 over all tokens.
        finish_reason: ``stop`` after an end-of-sequence token; ``length`` where the response was cut at
            ``max_new_tokens`` or the end of the context; ``error`` where there is none, with the reason in ``error``.
        weights_version: number of updates of the weights that sampled it, where the engine knows.
        error: why there is no response.
        routing: where it was asked for, the experts of every token that the model read, ``[prompt and response tokens
            but the last, MoE layers, K]`` int16, ascending, numbers from E on are zero experts.
    """

    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: Literal["stop", "length", "error"] = "length"
    weights_version: int | None = None
    error: str | None = None
    routing: Array | None = None

    @property
    def empty(self) -> bool:
        """Whether it says nothing: no token but the one that ended it."""
        return len(self.ids) <= (self.finish_reason == "stop")

    def fail(self, reason: str) -> None:
        """Turn it into a response that could not be had."""
        self.ids, self.logprobs, self.routing = [], [], None
        self.finish_reason, self.error = "error", reason


class RolloutEngine(Protocol):
    """Something that answers prompts."""

    @property
    def name(self) -> str:
        """Which engine, which version, how it computes: goes into rollout files."""
        ...

    @property
    def collective(self) -> bool:
        """Whether every process of a job makes every call, with the same requests, and gets all responses.

        If not, one process calls.
        """
        ...

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Response]:
        """Answer all requests; see the module's docstring.

        Raises:
            ZedaError: the engine as a whole cannot be used. What concerns one response is in the response.
        """
        ...
