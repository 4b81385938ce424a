"""Batched generation with a ``transformers`` model: left padding, a key-value cache, greedy or sampled.

A small loop of our own instead of ``model.generate``: it drops finished rows from the batch, draws each row's tokens
from the row's own random numbers (so that the batch size does not change a sample), and keeps the log-probabilities.
Greedy tokens are those of ``model.generate``. Shapes: B rows, S positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_zeda.errors import InputError, ZedaError
from megatron_zeda.rollout.files import FinishReason


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn.

    Attributes:
        max_new_tokens: longest response; the model's context may end it earlier.
        temperature: 0 is greedy.
        top_p: share of the probability mass that tokens are drawn from, most probable first.
        samples_per_prompt: responses per prompt.
        seed: of all random numbers.

    Raises:
        InputError: a value out of its range.
    """

    max_new_tokens: int = 4096
    temperature: float = 1.0
    top_p: float = 1.0
    samples_per_prompt: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        rules: list[tuple[str, bool, str]] = [
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature < float("inf"), "0 (greedy) or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0, at most 1"),
            ("samples_per_prompt", self.samples_per_prompt >= 1, "at least 1"),
            ("seed", self.seed >= 0, "0 or more"),
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


@dataclass
class Response:
    """One generated response.

    Attributes:
        ids: token ids without padding, with the end-of-sequence token when it was generated.
        logprobs: per token, natural logarithm, under the model's distribution at temperature 1 over all tokens.
        finish_reason: ``stop`` after an end-of-sequence token, ``length`` otherwise.
    """

    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: FinishReason = "length"


def left_pad(sequences: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return ``[B, S]`` ids padded on the left and the mask of the real tokens (int64, 1 for real)."""
    width = max(map(len, sequences))
    ids = torch.full((len(sequences), width), pad_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        ids[row, width - len(sequence) :] = torch.tensor(sequence)
        mask[row, width - len(sequence) :] = 1
    return ids.to(device), mask.to(device)


def draws(seed: int, row: int, count: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return the uniform random numbers in [0, 1) of one row: they depend on the seed and the row alone."""
    return np.random.default_rng([seed, row]).random(count)


def pick_tokens(logits: Tensor, uniform: Tensor | None, *, temperature: float, top_p: float) -> Tensor:
    """Return the next token of every row.

    Args:
        logits: ``[B, V]`` float32.
        uniform: ``[B]`` random numbers in [0, 1); ``None`` is greedy.
        temperature: divides the logits.
        top_p: the smallest set of most probable tokens with at least this mass is drawn from.

    Returns:
        ``[B]`` int64.
    """
    if uniform is None:
        return logits.argmax(-1)
    probs = (logits / temperature).softmax(-1)
    order = None
    if top_p < 1:
        probs, order = probs.sort(dim=-1, descending=True, stable=True)
        before = probs.cumsum(-1) - probs
        probs = probs.masked_fill(before >= top_p, 0.0)
    mass = probs.double().cumsum(-1)
    # The first token at which the mass exceeds the draw; a token without mass is never the first.
    drawn = torch.searchsorted(mass, uniform.double()[:, None] * mass[:, -1:], right=True)
    drawn = drawn.clamp(max=probs.shape[-1] - 1)
    return (drawn if order is None else order.gather(-1, drawn)).squeeze(-1)


@torch.inference_mode()
def decode(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    sampling: Sampling,
    rows: Sequence[int],
    eos_ids: Sequence[int],
    context: int,
) -> list[Response]:
    """Generate one response per prompt, all in one batch.

    Args:
        model: a ``transformers`` causal language model.
        prompts: token ids, each shorter than ``context``.
        sampling: how tokens are drawn (``samples_per_prompt`` is the caller's business).
        rows: number of each prompt in the whole run; names its random numbers.
        eos_ids: tokens that end a response.
        context: most positions of the model, prompt and response together.

    Raises:
        ZedaError: the model's logits are not finite.
    """
    from transformers import DynamicCache

    device = model.device
    limits = [min(sampling.max_new_tokens, context - len(prompt)) for prompt in prompts]
    responses = [Response() for _ in prompts]
    uniform = None
    if not sampling.greedy:
        uniform = np.stack([draws(sampling.seed, row, max(limits)) for row in rows])
    active = list(range(len(prompts)))  # response of each row still in the batch; None-free, compacted as rows finish
    stop = set(eos_ids)
    ids, mask = left_pad(prompts, 0, device)
    position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
    cache = DynamicCache(config=model.config)
    for step in range(max(limits)):
        output = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits = output.logits[:, -1].float()
        draw = None if uniform is None else torch.from_numpy(uniform[active, step]).to(device)
        tokens = pick_tokens(logits, draw, temperature=sampling.temperature, top_p=sampling.top_p)
        logprobs = logits.gather(-1, tokens[:, None]).squeeze(-1) - logits.logsumexp(-1)
        if not bool(torch.isfinite(logprobs).all()):
            raise ZedaError("the model's logits are not finite", where=type(model).__name__, fix="check its weights")
        keep = []
        for row, (token, logprob) in enumerate(zip(tokens.tolist(), logprobs.tolist(), strict=True)):
            response = responses[active[row]]
            response.ids.append(token)
            response.logprobs.append(round(logprob, 6))
            if token in stop:
                response.finish_reason = "stop"
            elif len(response.ids) < limits[active[row]]:
                keep.append(row)
        if not keep:
            break
        if len(keep) < len(active):
            kept = torch.tensor(keep, device=device)
            cache.batch_select_indices(kept)
            tokens, mask, position_ids = tokens[kept], mask[kept], position_ids[kept]
            active = [active[row] for row in keep]
        ids = tokens[:, None]
        mask = torch.cat([mask, mask.new_ones(len(active), 1)], dim=-1)
        position_ids = position_ids[:, -1:] + 1
    return responses
