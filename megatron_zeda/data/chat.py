"""From jsonl lines to token ids with a mask on the response tokens.

A line is either a chat, ``{"messages": [{"role", "content"}, ...]}``, rendered with the tokenizer's chat template, or a
rollout, ``{"prompt_ids": [...], "response_ids": [...], ...}``, whose ids are used exactly as they are: decoding and
re-tokenising them would change the targets the teacher produced.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import TemplateError
from numpy.typing import NDArray

from megatron_zeda.data.jsonl import read_lines
from megatron_zeda.data.tokenizer import ChatTokenizer
from megatron_zeda.errors import InputError


@dataclass(frozen=True)
class Sample:
    """One training sequence.

    Attributes:
        tokens: ``[n]`` int32 token ids, prompt and responses.
        is_response: ``[n]`` bool, the tokens whose prediction is trained.
        where: ``file:line`` it came from.
        cut_to_sequence: the response ran past the sequence and was cut there.
        stopped_at_limit: a rollout that ended because it was long enough, not because it was finished.
        logprobs: ``[n]`` float32, the natural logarithm of each response token's probability as the engine that sampled
            it gave it, 0 elsewhere; None where nobody needs them.
        routing: ``[n - 1, L, K]`` int16, the experts that every token the model reads was routed to when the response
            was sampled, in each of its L MoE layers; None where nobody needs them.
    """

    tokens: NDArray[np.int32]
    is_response: NDArray[np.bool_]
    where: str
    cut_to_sequence: bool = False
    stopped_at_limit: bool = False
    logprobs: NDArray[np.float32] | None = None
    routing: NDArray[np.int16] | None = None

    @property
    def num_inputs(self) -> int:
        """Tokens the model reads: all but the last, which is only predicted."""
        return len(self.tokens) - 1

    @property
    def num_loss_tokens(self) -> int:
        """Response tokens that are predicted (the first token of a sequence never is)."""
        return int(self.is_response[1:].sum())


@dataclass(frozen=True)
class SampleStatistics:
    """What was read, for the start-up banner: counts of samples and tokens."""

    samples: int
    tokens: int
    loss_tokens: int
    longest: int
    cut_to_sequence: int
    stopped_at_limit: int

    @classmethod
    def of(cls, samples: Sequence[Sample]) -> SampleStatistics:
        """Count over samples."""
        return cls(
            samples=len(samples),
            tokens=sum(s.num_inputs for s in samples),
            loss_tokens=sum(s.num_loss_tokens for s in samples),
            longest=max(s.num_inputs for s in samples),
            cut_to_sequence=sum(s.cut_to_sequence for s in samples),
            stopped_at_limit=sum(s.stopped_at_limit for s in samples),
        )


def load_samples(path: Path, *, seq_length: int, vocab_size: int, tokenizer: ChatTokenizer | None) -> list[Sample]:
    """Read a jsonl file of chats and rollouts.

    Responses that run past ``seq_length`` are cut there and marked; everything else that does not fit is an error.

    Args:
        path: the jsonl file.
        seq_length: the most tokens the model reads at once.
        vocab_size: ids must be below it.
        tokenizer: renders ``messages``; may be ``None`` when every line carries ids.

    Raises:
        InputError: with ``file:line`` for an empty or malformed line, a missing key, an empty response, an id
            outside the vocabulary, a prompt that leaves no room for a response, or a chat template that cannot be
            masked.
    """
    samples: list[Sample] = []
    for where, line in read_lines(path):
        for tokens, is_response in _encode_line(line, where=where, tokenizer=tokenizer):
            _check(tokens, is_response, where=where, seq_length=seq_length, vocab_size=vocab_size)
            keep = seq_length + 1  # the last token is predicted, not read
            samples.append(
                Sample(
                    tokens=np.array(tokens[:keep], dtype=np.int32),
                    is_response=np.array(is_response[:keep], dtype=np.bool_),
                    where=where,
                    cut_to_sequence=len(tokens) > keep,
                    stopped_at_limit=line.get("finish_reason") == "length",
                )
            )
    return samples


def _encode_line(
    line: dict[str, Any], *, where: str, tokenizer: ChatTokenizer | None
) -> list[tuple[list[int], list[bool]]]:
    if "prompt_ids" in line or "response_ids" in line:
        prompt, response = _ids(line, "prompt_ids", where), _ids(line, "response_ids", where)
        return [(prompt + response, [False] * len(prompt) + [True] * len(response))]
    if "messages" not in line:
        keys = sorted(line)
        raise InputError(
            "no `messages` and no `prompt_ids`", where=where, value=keys, rule="a chat or a rollout is needed"
        )
    if tokenizer is None:
        raise InputError(
            "`messages` need a tokenizer and the model folder has none",
            where=where,
            fix="set model.hf to a folder with a tokenizer, or train on rollouts with token ids",
        )
    return encode_messages(line["messages"], tokenizer, where=where)


def _ids(line: dict[str, Any], key: str, where: str) -> list[int]:
    ids = line.get(key)
    if not isinstance(ids, list) or not all(type(i) is int for i in ids):
        found = "nothing" if ids is None else "something else"
        raise InputError(
            f"`{key}` must be a list of token ids, found {found}", where=where, rule="a rollout has both id lists"
        )
    if not ids:
        raise InputError(
            f"`{key}` is empty", where=where, rule="a sample needs a prompt and a response", fix="delete the line"
        )
    return ids


def encode_messages(messages: Any, tokenizer: ChatTokenizer, *, where: str) -> list[tuple[list[int], list[bool]]]:
    """Token ids and response mask of one conversation, by comparing renderings with and without each assistant turn.

    The response of a turn is what follows the generation prompt, up to and including the end-of-turn token. A template
    that rewrites history (drops the reasoning of earlier turns, say) makes every assistant turn a sample of its own,
    because that is what the model sees when it answers that turn. So does a tokenizer that reads a finished turn
    otherwise than it was generated.

    Returns:
        One ``(ids, is_response)`` per sample.

    Raises:
        InputError: malformed messages, no assistant turn, an empty response, or a template whose generation prompt is
            not the beginning of the rendered answer (its response cannot be told from its prompt).
    """
    _check_messages(messages, where)
    turns: list[tuple[list[int], int]] = []  # ids up to the end of the turn, and where the response starts
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt_text = _render(tokenizer, messages[:index], where, add_generation_prompt=True)
        text = _render(tokenizer, messages[: index + 1], where, add_generation_prompt=False)
        if not text.startswith(prompt_text):
            raise InputError(
                "the chat template's generation prompt is not the beginning of the rendered answer",
                where=where,
                rule="prompt and response must be separable",
                fix="mend the template, or train on rollouts, whose token ids are used as they are",
            )
        prompt, full = tokenizer.encode_rendered(prompt_text), tokenizer.encode_rendered(text)
        if full[: len(prompt)] != prompt:
            # A token of the whole reaches across the boundary ("assistant\n" and an answer that begins with a newline).
            # Generation starts after the tokens of the prompt alone.
            full = prompt + tokenizer.encode_rendered(text.removeprefix(prompt_text))
        end = _end_of_turn(full, len(prompt), tokenizer.eos_token_id)
        if end == len(prompt):
            raise InputError("the assistant turn is empty", where=where, value=index, fix="delete the line")
        turns.append((full[:end], len(prompt)))
    if not turns:
        raise InputError("no assistant turn to learn from", where=where, fix="add the response or delete the line")

    last, _ = turns[-1]
    if all(last[: len(ids)] == ids for ids, _ in turns):
        is_response = [False] * len(last)
        for ids, start in turns:
            is_response[start : len(ids)] = [True] * (len(ids) - start)
        return [(last, is_response)]
    return [(ids, [False] * start + [True] * (len(ids) - start)) for ids, start in turns]


def _render(tokenizer: ChatTokenizer, messages: list[Any], where: str, *, add_generation_prompt: bool) -> str:
    try:
        return tokenizer.render_chat(messages, add_generation_prompt=add_generation_prompt)
    except TemplateError as error:  # templates raise when they do not know a role or an order of turns
        raise InputError(
            f"the chat template refuses these messages: {error}", where=where, fix="mend the line or the template"
        ) from error


def _end_of_turn(ids: Sequence[int], start: int, eos: int | None) -> int:
    """Templates put a newline after the end-of-turn token; a model that stops there never says it."""
    for position in range(len(ids) - 1, start - 1, -1):
        if ids[position] == eos:
            return position + 1
    return len(ids)


def _check_messages(messages: Any, where: str) -> None:
    if not isinstance(messages, list) or not messages:
        raise InputError("`messages` must be a list with at least one message", where=where)
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise InputError(f"message {index} has no `role`", where=where, rule='{"role": ..., "content": ...}')
        content = message.get("content")
        if not isinstance(content, str):
            raise InputError(
                f"message {index} has no text in `content`", where=where, rule='{"role": ..., "content": ...}'
            )
        if message["role"] == "assistant" and not content:
            raise InputError("the assistant turn is empty", where=where, value=index, fix="delete the line")


def _check(tokens: list[int], is_response: list[bool], *, where: str, seq_length: int, vocab_size: int) -> None:
    outside = [i for i in tokens if not 0 <= i < vocab_size]
    if outside:
        raise InputError(
            "token id outside the vocabulary",
            where=where,
            value=outside[0],
            rule=f"ids are 0 to {vocab_size - 1}",
            fix="use the tokenizer that belongs to the model",
        )
    prompt_length = is_response.index(True)
    if prompt_length > seq_length:
        raise InputError(
            f"the prompt has {prompt_length} tokens and model.seq_length is {seq_length}",
            where=where,
            rule="a prompt must leave room for its response",
            fix="raise model.seq_length or delete the line",
        )
