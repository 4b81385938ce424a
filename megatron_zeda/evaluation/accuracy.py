"""Exact-match accuracy with its uncertainty, and the difference of two models on the same prompts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_zeda.errors import InputError

# Half of the 95 % of a normal distribution lies within this many standard deviations.
Z_95 = 1.959963984540054

NORMALISERS: dict[str, Callable[[str], str]] = {
    "exact": lambda text: text,
    "strip": str.strip,
    "casefold": lambda text: " ".join(text.casefold().split()),
}
"""How response and answer are made comparable: not at all; without outer space; also without case and double space."""


@dataclass(frozen=True)
class Accuracy:
    """Share of correct responses.

    Attributes:
        value: correct / count.
        interval: 95 % Wilson score interval.
        count: number of responses.
    """

    value: float
    interval: tuple[float, float]
    count: int


@dataclass(frozen=True)
class PairedDifference:
    """Accuracy of one model minus that of another on the same prompts.

    Attributes:
        value: the difference.
        interval: 95 % interval (Newcombe's method 10 for paired proportions).
        mcnemar_p: two-sided exact McNemar test of "no difference".
        only_first: prompts that only the first model got right.
        only_second: prompts that only the second model got right.
        count: number of prompts.
    """

    value: float
    interval: tuple[float, float]
    mcnemar_p: float
    only_first: int
    only_second: int
    count: int


def wilson_interval(correct: int, count: int) -> tuple[float, float]:
    """Return the 95 % Wilson score interval of a proportion (Wilson 1927).

    Raises:
        ValueError: no observations.
    """
    if count < 1 or not 0 <= correct <= count:
        raise ValueError(f"{correct} of {count} is no proportion")
    share, z2 = correct / count, Z_95**2
    centre = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = Z_95 / (1 + z2 / count) * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2))
    # The interval of 0 and of all is closed at 0 and at 1; rounding must not move it.
    return (0.0 if correct == 0 else centre - half, 1.0 if correct == count else centre + half)


def accuracy_of(outcomes: Sequence[bool]) -> Accuracy:
    """Return the accuracy of a list of right and wrong responses (at least one)."""
    correct = sum(outcomes)
    return Accuracy(correct / len(outcomes), wilson_interval(correct, len(outcomes)), len(outcomes))


def outcomes_of(responses: Sequence[str], answers: Sequence[str], normaliser: str = "strip") -> list[bool]:
    """Return whether each response equals its answer after normalisation.

    Raises:
        InputError: no such normaliser.
    """
    if normaliser not in NORMALISERS:
        raise InputError("unknown", where="normaliser", value=normaliser, rule=" or ".join(NORMALISERS))
    normalise = NORMALISERS[normaliser]
    return [normalise(given) == normalise(wanted) for given, wanted in zip(responses, answers, strict=True)]


def measure_accuracy(outcomes: Sequence[bool], tasks: Sequence[str | None]) -> tuple[Accuracy, dict[str, Accuracy]]:
    """Return the accuracy of everything, and per named task in the order in which tasks first appear."""
    by_task: dict[str, list[bool]] = {}
    for outcome, task in zip(outcomes, tasks, strict=True):
        if task is not None:
            by_task.setdefault(task, []).append(outcome)
    return accuracy_of(outcomes), {task: accuracy_of(found) for task, found in by_task.items()}


def paired_difference(first: Sequence[bool], second: Sequence[bool]) -> PairedDifference:
    """Compare two models on the same prompts.

    The interval is Newcombe's method 10 (Statistics in Medicine 17, 1998, pages 2635 to 2650): Wilson intervals of
    the two shares, combined with the correlation of the two outcomes. It is right near 100 % too, where the usual
    normal interval is not.

    Args:
        first: outcomes of one model.
        second: outcomes of the other, prompt by prompt.
    """
    count = len(first)
    both = sum(a and b for a, b in zip(first, second, strict=True))
    only_first, only_second = sum(first) - both, sum(second) - both
    neither = count - both - only_first - only_second
    share_1, share_2 = sum(first) / count, sum(second) / count
    low_1, high_1 = wilson_interval(sum(first), count)
    low_2, high_2 = wilson_interval(sum(second), count)
    phi = _correlation(both, only_first, only_second, neither)
    down = _combine(share_1 - low_1, high_2 - share_2, phi)
    up = _combine(high_1 - share_1, share_2 - low_2, phi)
    value = share_1 - share_2
    return PairedDifference(
        value, (value - down, value + up), _mcnemar(only_first, only_second), only_first, only_second, count
    )


def _combine(first: float, second: float, phi: float) -> float:
    return math.sqrt(max(first**2 - 2 * phi * first * second + second**2, 0.0))


def _correlation(both: int, only_first: int, only_second: int, neither: int) -> float:
    """Correlation of the two outcomes, with Newcombe's continuity correction when it is positive."""
    margins = (both + only_first) * (only_second + neither) * (both + only_second) * (only_first + neither)
    if margins == 0:
        return 0.0
    product: float = both * neither - only_first * only_second
    if product > 0:
        product = max(product - (both + only_first + only_second + neither) / 2, 0)
    return product / math.sqrt(margins)


def _mcnemar(only_first: int, only_second: int) -> float:
    """Two-sided exact test: under no difference, each disagreement falls either way with probability 1/2."""
    total, fewer = only_first + only_second, min(only_first, only_second)
    tail = sum(math.comb(total, k) for k in range(fewer + 1))
    return min(1.0, 2 * tail / 2**total)
