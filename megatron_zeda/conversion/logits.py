"""Do two checkpoints compute the same: the largest difference after every layer and of the logits, on prompts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_zeda.conversion.hf_folder import HfFolder
from megatron_zeda.conversion.megatron_io import MegatronFolder
from megatron_zeda.conversion.streamed_models import States, run_streamed
from megatron_zeda.conversion.verification import open_checkpoint
from megatron_zeda.data import load_tokenizer
from megatron_zeda.data.jsonl import read_lines
from megatron_zeda.errors import InputError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
FLOAT32_TOLERANCE = 1e-4
"""Largest difference of a logit that another order of the same additions explains. In bfloat16 there is no such number:
a near-tie between two experts may fall the other way, and then values differ by as much as the experts do."""
DEFAULT_PROMPTS = (
    "The three laws of thermodynamics, in one sentence each:",
    "def quicksort(items):\n",
    "Q: A train leaves at 9:40 and arrives at 13:05. How long does it travel?\nA:",
    "Im Jahr 1905 veröffentlichte Albert Einstein",
)
MAX_TOKENS = 256
_RANDOM_PROMPTS, _RANDOM_LENGTH = 4, 32


@dataclass(frozen=True)
class Difference:
    """How far two tensors are from each other.

    Attributes:
        name: what is compared.
        largest: largest absolute difference.
        scale: largest absolute value on either side.
    """

    name: str
    largest: float
    scale: float


@dataclass(frozen=True)
class LogitsComparison:
    """The outcome.

    Attributes:
        layers: hidden states after each layer, in order.
        logits: the logits.
        mean_kl: mean KL divergence of the second's next-token distribution from the first's, in nats per token.
        same_next_token: share of positions with the same most likely next token.
        num_tokens: compared positions.
        prompts: where the prompts came from.
    """

    layers: tuple[Difference, ...]
    logits: Difference
    mean_kl: float
    same_next_token: float
    num_tokens: int
    prompts: str

    def lines(self) -> list[str]:
        """For people: one line per layer, then the logits."""
        differences = [*self.layers, self.logits]
        width = max(len(found.name) for found in differences)
        table = [
            f"{found.name:{width}}  largest difference {found.largest:.2e} of values up to {found.scale:.2e}"
            for found in differences
        ]
        words = f"{100 * self.same_next_token:.2f} % of next tokens are the same"
        return [*table, f"{self.num_tokens} tokens ({self.prompts}): mean KL {self.mean_kl:.2e}, {words}"]


def compare_logits(
    a: str | Path,
    b: str | Path,
    *,
    prompts: str | Path | None = None,
    dtype: str = "float32",
    max_tokens: int = MAX_TOKENS,
    mask_zero_experts: bool = False,
    hf_config: str | Path | None = None,
) -> LogitsComparison:
    """Run two checkpoints on the same prompts and compare what they compute, layer by layer.

    Each is a Hugging Face folder in any export form or a Megatron folder, static or dynamic. One layer is in memory at
    a time, so full-size checkpoints can be compared on any machine.

    Args:
        a: the first checkpoint.
        b: the second.
        prompts: ``.jsonl`` with ``{"prompt": text or messages}`` or ``{"prompt_ids": [...]}`` lines, or a text file
            with one prompt per line; by default four sentences, or fixed random ids where neither has a tokenizer.
        dtype: ``float32`` or ``bfloat16``.
        max_tokens: prompts are cut to this length.
        mask_zero_experts: turn the dial to -inf on both sides: a dynamic model then is its static one.
        hf_config: folder with ``config.json`` and tokenizer for Megatron folders that no import of ours made.

    Raises:
        InputError: for a checkpoint that is not complete, two that cannot be compared, and unusable prompts.
    """
    if dtype not in DTYPES:
        raise InputError("unknown type", where="--dtype", value=dtype, rule=" or ".join(DTYPES))
    if max_tokens < 1:
        raise InputError("no tokens left", where="--max-tokens", value=max_tokens, rule="at least 1")
    first, second = open_checkpoint(a, hf_config), open_checkpoint(b, hf_config)
    try:
        _check_comparable(first, second)
        rows, source = _prompts([first, second], prompts, max_tokens)
        ids, real = _padded(rows)
        dial = -math.inf if mask_zero_experts else None
        one = run_streamed(first, ids, dtype=DTYPES[dtype], dial=dial)
        two = run_streamed(second, ids, dtype=DTYPES[dtype], dial=dial)
    finally:
        for folder in (first, second):
            if isinstance(folder, HfFolder):
                folder.close()
    return _compare(one, two, real, source)


def _check_comparable(first: HfFolder | MegatronFolder, second: HfFolder | MegatronFolder) -> None:
    if first.family is not second.family:
        raise InputError(
            "the checkpoints are of two families",
            where=second.config.where,
            value=second.family.name,
            rule=first.family.name,
        )
    for key in ("num_hidden_layers", "hidden_size", "vocab_size"):
        if first.config[key] != second.config[key]:
            raise InputError(
                f"`{key}` is not the same in both",
                where=second.config.where,
                value=second.config[key],
                rule=str(first.config[key]),
            )


def _prompts(
    folders: Sequence[HfFolder | MegatronFolder], prompts: str | Path | None, max_tokens: int
) -> tuple[list[list[int]], str]:
    """Token ids, and where they come from."""
    vocab = folders[0].config["vocab_size"]
    homes = [folder.hf if isinstance(folder, MegatronFolder) else folder.path for folder in folders]
    tokenizer = next((found for home in homes if (found := load_tokenizer(home)) is not None), None)
    if prompts is None and tokenizer is None:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(vocab, (_RANDOM_PROMPTS, min(max_tokens, _RANDOM_LENGTH)), generator=generator)
        return ids.tolist(), "fixed random token ids (no tokenizer)"
    source = "built-in sentences" if prompts is None else str(prompts)
    rows: list[list[int]] = []
    for where, given in _given(prompts):
        if isinstance(given, list) and all(type(token) is int for token in given):
            tokens = given
        elif tokenizer is None:
            raise InputError("neither checkpoint has a tokenizer", where=where, fix="give `prompt_ids`")
        elif isinstance(given, list):
            tokens = tokenizer.encode_chat(given, add_generation_prompt=True)
        else:
            tokens = tokenizer.encode(given)
        if not tokens or any(not 0 <= token < vocab for token in tokens):
            raise InputError("no token, or one outside the vocabulary", where=where, rule=f"ids below {vocab}")
        rows.append(tokens[:max_tokens])
    return rows, source


def _given(prompts: str | Path | None) -> list[tuple[str, Any]]:
    """Place and content of every prompt: text, messages or token ids."""
    if prompts is None:
        return [("built-in prompt", text) for text in DEFAULT_PROMPTS]
    path = Path(prompts)
    if path.suffix == ".jsonl":
        found = [(where, line.get("prompt_ids", line.get("prompt"))) for where, line in read_lines(path)]
        for where, value in found:
            if not isinstance(value, (str, list)):
                raise InputError("no prompt", where=where, rule="`prompt` (text or messages) or `prompt_ids`")
    else:
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"cannot be read ({error})", where=path, rule="a text file or .jsonl") from None
        found = [(f"{path}:{number}", line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not found:
        raise InputError("no prompts", where=path, rule="one per line")
    return found


def _padded(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """``[B, S]`` ids padded on the right, and which of them are real."""
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    real = torch.nn.utils.rnn.pad_sequence([torch.ones(len(row), dtype=torch.bool) for row in rows], batch_first=True)
    return ids, real


def _compare(one: States, two: States, real: Tensor, source: str) -> LogitsComparison:
    layers = [
        _difference(f"layer {index}", left[real], right[real])
        for index, (left, right) in enumerate(zip(one.hidden, two.hidden, strict=True))
    ]
    left, right = one.logits[real], two.logits[real]
    logp, logq = left.log_softmax(-1), right.log_softmax(-1)
    return LogitsComparison(
        layers=tuple(layers),
        logits=_difference("logits", left, right),
        mean_kl=float((logp.exp() * (logp - logq)).sum(-1).mean().clamp(min=0)),
        same_next_token=float((left.argmax(-1) == right.argmax(-1)).float().mean()),
        num_tokens=int(real.sum()),
        prompts=source,
    )


def _difference(name: str, one: Tensor, two: Tensor) -> Difference:
    scale = max(float(one.abs().max()), float(two.abs().max()))
    return Difference(name, float((one - two).abs().max()), scale)
