"""Teacher-forced scoring of Hugging Face models: KL to the teacher and skip rate on rollouts, perplexity of a text.

A sequence of P prompt and R response ids is fed without its last token, as a generating engine would. Its last R
positions are the *response positions*: the last prompt token and all response tokens but the last. Their outputs
predict the R response tokens; KL and skip rate are taken there. The P - 1 positions before are the prompt's.

Logits are made for those positions only and in chunks, so that the vocabulary never sets the memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_zeda.data.jsonl import read_lines
from megatron_zeda.errors import InputError, ZedaError
from megatron_zeda.evaluation.skip_rate import RoutingRecorder
from megatron_zeda.rollout.files import Rollout

# Logits held at once, in elements: 64 MiB in fp32.
_CHUNK_ELEMENTS = 16 * 1024 * 1024


@dataclass(frozen=True)
class RolloutScores:
    """What :func:`score_rollouts` found.

    Attributes:
        kl_to_teacher: forward KL(teacher || model), mean over response tokens, nats, full vocabulary; ``None``
            without teacher.
        response_tokens: response tokens scored.
        prompt_tokens: prompt positions before them.
        skip_rate: share of the K slots that went to zero experts at the response positions, mean over layers.
        skip_rate_per_layer: the same per layer.
        skip_rate_prompt: the same at the prompt positions; ``None`` when every prompt has one token.
        skip_rate_prompt_per_layer: the same per layer; empty when every prompt has one token.
        real_rows: (token, real expert) pairs computed over all positions and layers.
        tokens: positions, counted once per layer.
    """

    kl_to_teacher: float | None
    response_tokens: int
    prompt_tokens: int
    skip_rate: float
    skip_rate_per_layer: list[float]
    skip_rate_prompt: float | None
    skip_rate_prompt_per_layer: list[float]
    real_rows: int
    tokens: int


@dataclass(frozen=True)
class TextScores:
    """Perplexity of a text, exp of the mean negative log-likelihood of ``tokens`` predicted tokens."""

    perplexity: float
    tokens: int


def check_ids(rollouts: Sequence[Rollout], *, vocab_size: int, context: int, where: str | Path) -> None:
    """Raise an :class:`InputError` for a rollout that the model cannot have produced: foreign ids, or too long."""
    for number, rollout in enumerate(rollouts, start=1):
        ids = rollout.prompt_ids + rollout.response_ids
        if max(ids) >= vocab_size:
            raise InputError(
                "token id outside the vocabulary",
                where=f"{where}:{number}",
                value=max(ids),
                rule=f"ids are 0 to {vocab_size - 1}",
                fix="give rollouts of a model with the same tokenizer",
            )
        if len(ids) > context:
            raise InputError(
                f"the rollout has {len(ids)} tokens",
                where=f"{where}:{number}",
                rule=f"at most {context}, the model's context",
            )


@torch.inference_mode()
def score_rollouts(
    model: Any, rollouts: Sequence[Rollout], *, teacher: Any | None = None, batch_size: int = 128
) -> RolloutScores:
    """Score a model on given responses.

    Args:
        model: a ``transformers`` causal language model, static or dynamic.
        rollouts: the responses, usually the teacher's own on held-out prompts; at least one.
        teacher: adds the KL.
        batch_size: sequences at once.

    Raises:
        ZedaError: logits that are not finite.
    """
    device = model.device
    with RoutingRecorder(model) as recorder:
        zero_slots = torch.zeros(2, recorder.num_layers, dtype=torch.long, device=device)  # prompt, response
        positions = torch.zeros(2, dtype=torch.long, device=device)
        total_kl = torch.zeros((), dtype=torch.float64, device=device)
        for batch in _batches(rollouts, batch_size):
            ids, is_real, is_response = _pad(batch, device)
            hidden = _hidden_states(model, ids)[is_response]
            counts = recorder.zero_slots(ids)
            for part, mask in enumerate((is_real & ~is_response, is_response)):
                zero_slots[part] += (counts * mask).sum((1, 2))
                positions[part] += mask.sum()
            if teacher is not None:
                total_kl += _kl_sum(teacher, _hidden_states(teacher, ids)[is_response], model, hidden)
    prompt_tokens, response_tokens = positions.tolist()
    slots = recorder.topk * positions.clamp(min=1)
    per_layer = (zero_slots.double() / slots[:, None]).tolist()
    kl = None if teacher is None else total_kl.item() / response_tokens
    if kl is not None and not math.isfinite(kl):
        raise ZedaError(
            "KL to the teacher is not finite", where=type(model).__name__, value=kl, fix="check the weights"
        )
    tokens = (prompt_tokens + response_tokens) * recorder.num_layers
    return RolloutScores(
        kl_to_teacher=kl,
        response_tokens=response_tokens,
        prompt_tokens=prompt_tokens,
        skip_rate=sum(per_layer[1]) / recorder.num_layers,
        skip_rate_per_layer=per_layer[1],
        skip_rate_prompt=sum(per_layer[0]) / recorder.num_layers if prompt_tokens else None,
        skip_rate_prompt_per_layer=per_layer[0] if prompt_tokens else [],
        real_rows=tokens * recorder.topk - int(zero_slots.sum()),
        tokens=tokens,
    )


def _batches(rollouts: Sequence[Rollout], batch_size: int) -> Iterator[list[Rollout]]:
    """Batches of similar length, longest first."""
    order = sorted(rollouts, key=lambda r: len(r.prompt_ids) + len(r.response_ids), reverse=True)
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def _pad(batch: Sequence[Rollout], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return ids ``[B, S]`` padded on the right, the mask of real positions and the mask of response positions."""
    sequences = [(r.prompt_ids + r.response_ids)[:-1] for r in batch]
    width = max(map(len, sequences))
    ids = torch.zeros(len(batch), width, dtype=torch.long)
    is_real = torch.zeros(len(batch), width, dtype=torch.bool)
    is_response = torch.zeros_like(is_real)
    for row, (rollout, sequence) in enumerate(zip(batch, sequences, strict=True)):
        ids[row, : len(sequence)] = torch.tensor(sequence)
        is_real[row, : len(sequence)] = True
        is_response[row, len(rollout.prompt_ids) - 1 : len(sequence)] = True
    return ids.to(device), is_real.to(device), is_response.to(device)


def _hidden_states(model: Any, ids: Tensor) -> Tensor:
    """Return the decoder's output ``[B, S, D]``, what the head makes logits of.

    Attention is causal and the padding is on the right, so no real position sees any: a mask would only cost time.
    """
    return model.model(input_ids=ids, use_cache=False).last_hidden_state


def _log_probs(model: Any, hidden: Tensor) -> Tensor:
    """Return ``[T, V]`` float32 log-probabilities of positions ``[T, D]``."""
    return model.lm_head(hidden).float().log_softmax(-1)


def _kl_sum(teacher: Any, teacher_hidden: Tensor, model: Any, hidden: Tensor) -> Tensor:
    """Sum of KL(teacher || model) over positions, in float64."""
    total = torch.zeros((), dtype=torch.float64, device=hidden.device)
    chunk = max(1, _CHUNK_ELEMENTS // teacher.config.vocab_size)
    for wanted, given in zip(teacher_hidden.split(chunk), hidden.split(chunk), strict=True):
        expected, found = _log_probs(teacher, wanted), _log_probs(model, given)
        total += (expected.exp() * (expected - found)).sum(-1).double().sum()
    return total


def read_texts(path: Path) -> list[str]:
    """Return the documents of a held-out text: a plain UTF-8 file is one, a jsonl file has one per line.

    Raises:
        InputError: no such file, no text in it, or a malformed line.
    """
    if path.suffix == ".jsonl":
        texts = []
        for where, line in read_lines(path):
            if not isinstance(line.get("text"), str):
                raise InputError("no `text`", where=where, value=sorted(line), rule='{"text": "..."}')
            texts.append(line["text"])
        return texts
    if not path.is_file():
        raise InputError("no such file", where=path, rule="a UTF-8 text, or a .jsonl file with a `text` per line")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError("not UTF-8 text", where=path, fix="give a text file") from error
    if not text.strip():
        raise InputError("the file is empty", where=path, rule="a UTF-8 text, or a .jsonl file with a `text` per line")
    return [text]


@torch.inference_mode()
def score_text(
    model: Any, documents: Sequence[Sequence[int]], *, window: int, batch_size: int = 128, where: str | Path = "text"
) -> TextScores:
    """Measure perplexity.

    Each document is cut into consecutive windows of ``window`` tokens; the first token of a window is context only.

    Args:
        model: a ``transformers`` causal language model.
        documents: token ids.
        window: at most the model's context.
        batch_size: windows at once.
        where: named in errors.

    Raises:
        InputError: no document has two tokens.
        ZedaError: logits that are not finite.
    """
    windows = [list(ids[i : i + window]) for ids in documents for i in range(0, len(ids), window)]
    windows = sorted((ids for ids in windows if len(ids) > 1), key=len, reverse=True)
    if not windows:
        raise InputError("no text to predict", where=where, rule="a document of at least two tokens")
    total, tokens = 0.0, 0
    for start in range(0, len(windows), batch_size):
        batch = windows[start : start + batch_size]
        width = len(batch[0])
        ids = torch.zeros(len(batch), width, dtype=torch.long)
        is_real = torch.zeros(len(batch), width, dtype=torch.bool)
        for row, sequence in enumerate(batch):
            ids[row, : len(sequence)] = torch.tensor(sequence)
            is_real[row, : len(sequence)] = True
        ids, is_real = ids.to(model.device), is_real.to(model.device)
        predicted = is_real[:, 1:]
        hidden = _hidden_states(model, ids[:, :-1])[predicted]
        targets = ids[:, 1:][predicted]
        chunk = max(1, _CHUNK_ELEMENTS // model.config.vocab_size)
        for given, wanted in zip(hidden.split(chunk), targets.split(chunk), strict=True):
            total -= _log_probs(model, given).gather(-1, wanted[:, None]).double().sum().item()
        tokens += len(targets)
    mean = total / tokens
    if not math.isfinite(mean):
        raise ZedaError("the likelihood of the text is not finite", where=where, value=mean, fix="check the weights")
    return TextScores(math.exp(mean), tokens)
