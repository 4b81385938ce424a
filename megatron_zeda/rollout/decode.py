"""Batched generation: what all decode loops share, and the one for a ``transformers`` model (left padding, a cache).

A small loop of our own instead of ``model.generate``: it drops finished rows from the batch, draws each row's tokens
from the row's own random numbers (so that the batch size does not change a sample), and keeps the log-probabilities.
Greedy tokens are those of ``model.generate``. Shapes: B rows, S positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_zeda.errors import ZedaError
from megatron_zeda.rollout.engine import Array, Response, Sampling


def left_pad(sequences: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return ``[B, S]`` ids padded on the left and the mask of the real tokens (int64, 1 for real)."""
    width = max(map(len, sequences))
    ids = torch.full((len(sequences), width), pad_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        ids[row, width - len(sequence) :] = torch.tensor(sequence)
        mask[row, width - len(sequence) :] = 1
    return ids.to(device), mask.to(device)


def draws(seed: int, row: int, count: int) -> Array:
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


class Rows:
    """The rows of one batch while their responses grow: draws tokens, keeps them, says which rows go on.

    Attributes:
        positions: most tokens that a model reads for one of them: prompt and response but its last token.
    """

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        sampling: Sampling,
        rows: Sequence[int],
        eos_ids: Sequence[int],
        context: int,
    ) -> None:
        """Args as of :func:`decode`."""
        self.responses = [Response() for _ in prompts]
        self._sampling = sampling
        self._limits = [min(sampling.max_new_tokens, context - len(prompt)) for prompt in prompts]
        self.positions = max((len(p) + most - 1 for p, most in zip(prompts, self._limits, strict=True)), default=0)
        self._stop = frozenset(eos_ids if sampling.stop_token_ids is None else sampling.stop_token_ids)
        self._uniform = None
        if prompts and not sampling.greedy:
            most = max(self._limits)
            self._uniform = np.stack([draws(sampling.seed, row, most) for row in rows])

    def pick(self, logits: Tensor, active: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Draw the next token of some rows.

        Args:
            logits: ``[B, V]`` float32.
            active: which rows these are.

        Returns:
            Tokens ``[B]`` and their log-probabilities ``[B]``, which are not finite where the logits are not.
        """
        draw = None
        if self._uniform is not None:
            steps = [len(self.responses[row].ids) for row in active]
            draw = torch.from_numpy(self._uniform[list(active), steps]).to(logits.device)
        tokens = pick_tokens(logits, draw, temperature=self._sampling.temperature, top_p=self._sampling.top_p)
        return tokens, logits.gather(-1, tokens[:, None]).squeeze(-1) - logits.logsumexp(-1)

    def add(self, row: int, token: int, logprob: float) -> bool:
        """Append a token to a row, and return whether the row goes on."""
        response = self.responses[row]
        response.ids.append(token)
        response.logprobs.append(round(logprob, 6))
        if token in self._stop:
            response.finish_reason = "stop"
            return False
        return len(response.ids) < self._limits[row]


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
    batch = Rows(prompts, sampling=sampling, rows=rows, eos_ids=eos_ids, context=context)
    active = list(range(len(prompts)))
    ids, mask = left_pad(prompts, 0, device)
    position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
    cache = DynamicCache(config=model.config)
    while True:
        output = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        tokens, logprobs = batch.pick(output.logits[:, -1].float(), active)
        if not bool(torch.isfinite(logprobs).all()):
            raise ZedaError("the model's logits are not finite", where=type(model).__name__, fix="check its weights")
        picked = zip(active, tokens.tolist(), logprobs.tolist(), strict=True)
        keep = [place for place, (row, token, logprob) in enumerate(picked) if batch.add(row, token, logprob)]
        if not keep:
            return batch.responses
        if len(keep) < len(active):
            kept = torch.tensor(keep, device=device)
            cache.batch_select_indices(kept)
            tokens, mask, position_ids = tokens[kept], mask[kept], position_ids[kept]
            active = [active[place] for place in keep]
        ids = tokens[:, None]
        mask = torch.cat([mask, mask.new_ones(len(active), 1)], dim=-1)
        position_ids = position_ids[:, -1:] + 1
