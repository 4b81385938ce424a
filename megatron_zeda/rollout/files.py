"""The two jsonl formats of this room, one JSON object a line, read strictly and written line by line.

A prompt: ``{"prompt": [{"role", "content"}, ...] or "text", "id"?, "answer"?, "task"?}``. A list of messages is
rendered with the model's chat template; a text is tokenised as it is. ``answer`` and ``task`` make it a checkable
prompt. Other keys are ignored, so that prompt files may carry their provenance.

A rollout: ``{"id", "messages", "prompt_ids", "response_ids", "logprobs", "finish_reason", "sampling", "engine",
"weights_version", "answer"?, "task"?}``. The ids are the truth: no padding, with the end-of-sequence token when it was
generated. ``logprobs`` has one natural logarithm per response token, under the model's own distribution: softmax of the
logits at temperature 1, all tokens, whatever the sampling was. ``messages`` is for people and for trainers that
re-tokenise; a prompt that was plain text is shown there as a user message.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, get_args

from megatron_zeda.data.jsonl import parse_line, read_lines
from megatron_zeda.errors import InputError, ZedaError, disk_errors

FinishReason = Literal["stop", "length"]
FINISH_REASONS: tuple[str, ...] = get_args(FinishReason)


@dataclass(frozen=True)
class Prompt:
    """One line of a prompt file.

    Attributes:
        id: the line's ``id``, or its zero-based number in the file.
        content: messages for the chat template, or plain text.
        answer: what a correct response says, where the prompt can be checked.
        task: name of the group of prompts it belongs to.
        where: ``file:line``.
    """

    id: str | int
    content: list[dict[str, Any]] | str
    answer: str | None
    task: str | None
    where: str

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The prompt as messages."""
        return [{"role": "user", "content": self.content}] if isinstance(self.content, str) else self.content


@dataclass(frozen=True)
class Rollout:
    """One line of a rollout file; see the module's docstring for its fields."""

    id: str | int
    messages: list[dict[str, Any]]
    prompt_ids: list[int]
    response_ids: list[int]
    logprobs: list[float] | None
    finish_reason: FinishReason
    sampling: dict[str, Any]
    engine: str
    weights_version: str
    answer: str | None = None
    task: str | None = None

    def to_json(self) -> str:
        """Return the line, without its newline. ``answer`` and ``task`` are left out where there are none."""
        fields = asdict(self)
        for name in ("answer", "task"):
            if fields[name] is None:
                del fields[name]
        return json.dumps(fields, ensure_ascii=False, allow_nan=False)


def read_prompts(path: Path) -> list[Prompt]:
    """Read a prompt file.

    Raises:
        InputError: with ``file:line``, for everything that is not the format of this module, and for an ``id`` used
            twice.
    """
    prompts: list[Prompt] = []
    seen: dict[str | int, str] = {}
    for number, (where, line) in enumerate(read_lines(path)):
        prompt = _prompt(line, where, number)
        if prompt.id in seen:
            raise InputError(
                "this id was used before",
                where=where,
                value=prompt.id,
                rule=f"{seen[prompt.id]} has it",
                fix="make ids unique",
            )
        seen[prompt.id] = where
        prompts.append(prompt)
    return prompts


def _prompt(line: dict[str, Any], where: str, number: int) -> Prompt:
    if "prompt" not in line:
        raise InputError(
            "no `prompt`",
            where=where,
            value=sorted(line),
            rule='{"prompt": [{"role", "content"}, ...] or "text", "id"?, "answer"?, "task"?}',
        )
    content = line["prompt"]
    if isinstance(content, list):
        _check_messages(content, "prompt", where)
        if content[-1]["role"] == "assistant":
            raise InputError(
                "the prompt ends with an assistant message",
                where=where,
                rule="the response is what is generated",
                fix="remove the last message",
            )
    elif not isinstance(content, str) or not content:
        raise InputError(
            "`prompt` must be a list of messages or a text", where=where, value=content, fix="mend or delete the line"
        )
    texts: dict[str, str | None] = {}
    for key in ("answer", "task"):
        value = line.get(key)
        if value is not None and not isinstance(value, str):
            raise InputError(f"`{key}` must be a text", where=where, value=value, fix="put it in quotes")
        texts[key] = value
    return Prompt(_id(line.get("id", number), where), content, texts["answer"], texts["task"], where)


def _id(value: Any, where: str) -> str | int:
    if type(value) not in (str, int):
        raise InputError("`id` must be a text or an integer", where=where, value=value)
    return value


def _check_messages(messages: Any, key: str, where: str) -> None:
    rule = '[{"role": "user", "content": "..."}, ...]'
    if not isinstance(messages, list) or not messages:
        raise InputError(f"`{key}` must be a list with at least one message", where=where, value=messages, rule=rule)
    for index, message in enumerate(messages):
        for name in ("role", "content"):
            if not isinstance(message, dict) or not isinstance(message.get(name), str):
                raise InputError(f"`{key}`: message {index} has no text in `{name}`", where=where, rule=rule)


def read_rollouts(path: Path) -> list[Rollout]:
    """Read a rollout file.

    Raises:
        InputError: with ``file:line``, for everything that is not the format of this module.
    """
    return [parse_rollout(line, where) for where, line in read_lines(path)]


def parse_rollout(line: dict[str, Any], where: str) -> Rollout:
    """Return the rollout of one line, or raise an :class:`InputError` that names ``where`` and the key."""
    required = (
        "id",
        "messages",
        "prompt_ids",
        "response_ids",
        "finish_reason",
        "sampling",
        "engine",
        "weights_version",
    )
    missing = [key for key in required if key not in line]
    if missing:
        raise InputError(
            f"missing {', '.join(f'`{key}`' for key in missing)}",
            where=where,
            rule="a rollout line as `zeda rollout` writes it",
            fix="give a rollout file, not a prompt or chat file",
        )
    _check_messages(line["messages"], "messages", where)
    for key in ("prompt_ids", "response_ids"):
        ids = line[key]
        if not isinstance(ids, list) or not ids or not all(type(token) is int and token >= 0 for token in ids):
            raise InputError(f"`{key}` must be a list of at least one token id", where=where)
    logprobs = line.get("logprobs")
    if logprobs is not None and (
        not isinstance(logprobs, list)
        or len(logprobs) != len(line["response_ids"])
        or not all(type(value) in (int, float) for value in logprobs)
    ):
        raise InputError(
            "`logprobs` must have one number per response token", where=where, fix="mend or delete the line"
        )
    if line["finish_reason"] not in FINISH_REASONS:
        raise InputError(
            "unknown `finish_reason`", where=where, value=line["finish_reason"], rule=" or ".join(FINISH_REASONS)
        )
    for key, kind in (("sampling", dict), ("engine", str), ("weights_version", str)):
        if not isinstance(line[key], kind):
            raise InputError(
                f"`{key}` must be {'an object' if kind is dict else 'a text'}", where=where, value=line[key]
            )
    return Rollout(
        id=_id(line["id"], where),
        logprobs=logprobs,
        answer=line.get("answer"),
        task=line.get("task"),
        **{key: line[key] for key in required if key != "id"},
    )


@dataclass(frozen=True)
class Expected:
    """What a line of an output must have been made of for a run to go on after it."""

    id: str | int
    prompt_ids: list[int]
    sampling: dict[str, Any]


class RolloutWriter:
    """Streams rollouts into ``<output>.partial``, which becomes ``<output>`` when the last one is there.

    A run that was stopped goes on after the last complete line; a torn last line is cut. What is already there must be
    exactly the beginning of what this run would write: same prompts, sampling, engine and weights.
    """

    def __init__(self, output: Path, expected: Sequence[Expected], *, engine: str, weights_version: str) -> None:
        """Check what is there.

        Args:
            output: the rollout file.
            expected: one entry per line of the finished file.
            engine: value of the ``engine`` field.
            weights_version: value of the ``weights_version`` field.

        Raises:
            InputError: what is there was made with other settings, or is not a rollout file.
        """
        self.output, self.partial = output, output.with_name(output.name + ".partial")
        self.expected, self.engine, self.weights_version = expected, engine, weights_version
        if output.exists() and self.partial.exists():
            raise InputError(
                "both the output and its .partial exist", where=output, fix=f"remove one of them ({self.partial.name})"
            )
        source = output if output.exists() else self.partial
        self._keep = 0  # bytes of complete lines
        self.num_done = self._check(source) if source.exists() else 0

    def _check(self, source: Path) -> int:
        """Compare the complete lines of ``source`` with what this run would write, and return how many there are."""
        if not source.is_file():
            raise InputError("not a file", where=source, fix="choose another output")
        done = 0
        with source.open("rb") as file:
            for raw in file:
                if not raw.endswith(b"\n"):  # a line whose writing was interrupted
                    break
                where = f"{source}:{done + 1}"
                try:
                    found = parse_rollout(parse_line(raw.decode(), where), where)
                except UnicodeDecodeError as error:
                    raise InputError("not UTF-8 text", where=where, fix="remove the file") from error
                self._check_line(found, done, where)
                done += 1
                self._keep += len(raw)
        return done

    def _check_line(self, found: Rollout, index: int, where: str) -> None:
        if index >= len(self.expected):
            raise self._refusal("more lines than this run has responses", where, index + 1, len(self.expected))
        wanted = self.expected[index]
        for key, is_now in (
            ("weights_version", self.weights_version),
            ("engine", self.engine),
            ("sampling", wanted.sampling),
            ("id", wanted.id),
            ("prompt_ids", wanted.prompt_ids),
        ):
            was = getattr(found, key)
            if was != is_now:
                raise self._refusal(f"the file was made with another `{key}`", where, was, is_now)

    def _refusal(self, message: str, where: str, was: Any, is_now: Any) -> InputError:
        def shown(value: Any) -> Any:
            return f"{len(value)} ids" if isinstance(value, list) else value

        return InputError(
            message,
            where=where,
            value=shown(was),
            rule=f"this run has {shown(is_now)!r}",
            fix="remove the file or choose another output",
        )

    @property
    def complete(self) -> bool:
        """Whether every line is there."""
        return self.num_done == len(self.expected)

    def __enter__(self) -> Self:
        with disk_errors(self.output):
            self.output.parent.mkdir(parents=True, exist_ok=True)
            if self.output.exists():
                self.output.rename(self.partial)
            self._file = self.partial.open("ab")
            self._file.truncate(self._keep)
        return self

    def write(self, rollouts: Sequence[Rollout]) -> None:
        """Append lines and hand them to the operating system."""
        with disk_errors(self.partial):
            self._file.write("".join(f"{rollout.to_json()}\n" for rollout in rollouts).encode())
            self._file.flush()
        self.num_done += len(rollouts)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with disk_errors(self.partial):
            self._file.close()
        if kind is not None:
            return
        if not self.complete:
            raise ZedaError(f"{self.num_done} of {len(self.expected)} responses were written", where=self.partial)
        self.partial.replace(self.output)
