"""Accuracy, its intervals, and the paired difference, against definitions and simulation."""

from __future__ import annotations

import math
import random
from fractions import Fraction

import pytest

from megatron_zeda.errors import InputError
from megatron_zeda.evaluation.accuracy import (
    Z_95,
    measure_accuracy,
    outcomes_of,
    paired_difference,
    wilson_interval,
)


@pytest.mark.parametrize(("correct", "count"), [(1, 10), (5, 10), (81, 263), (997, 1000)])
def test_wilson_ends_solve_the_score_equation(correct: int, count: int) -> None:
    share = correct / count
    for end in wilson_interval(correct, count):
        # The definition: the proportions p at which the observation is exactly z standard errors *of p* away.
        assert (share - end) ** 2 == pytest.approx(Z_95**2 * end * (1 - end) / count, rel=1e-9)


def test_wilson_known_values() -> None:
    # Newcombe, Statistics in Medicine 17 (1998), page 861, table I: 81/263, 15/148, 0/20, 1/29.
    for correct, count, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        assert wilson_interval(correct, count) == pytest.approx((low, high), abs=5e-5)
    assert wilson_interval(20, 20) == pytest.approx((1 - 0.1611, 1.0), abs=5e-5)
    assert wilson_interval(0, 7)[0] == 0.0
    assert wilson_interval(7, 7)[1] == 1.0


@pytest.mark.parametrize(("correct", "count"), [(0, 0), (3, 2), (-1, 2)])
def test_wilson_of_nothing_is_an_error(correct: int, count: int) -> None:
    with pytest.raises(ValueError, match="no proportion"):
        wilson_interval(correct, count)


def test_normalisers() -> None:
    responses, answers = [" 42 ", "Rome  is", "a"], ["42", "rome is", "a"]
    assert outcomes_of(responses, answers, "exact") == [False, False, True]
    assert outcomes_of(responses, answers) == [True, False, True]
    assert outcomes_of(responses, answers, "casefold") == [True, True, True]
    with pytest.raises(InputError, match="normaliser"):
        outcomes_of(responses, answers, "fuzzy")


def test_accuracy_per_task() -> None:
    total, tasks = measure_accuracy([True, False, True, True], ["b", "a", "b", None])
    assert (total.value, total.count) == (0.75, 4)
    assert total.interval == wilson_interval(3, 4)
    assert {name: (found.value, found.count) for name, found in tasks.items()} == {"b": (1.0, 2), "a": (0.0, 1)}
    assert list(tasks) == ["b", "a"]


def outcomes(both: int, first: int, second: int, neither: int) -> tuple[list[bool], list[bool]]:
    pairs = [(True, True)] * both + [(True, False)] * first + [(False, True)] * second + [(False, False)] * neither
    return [a for a, _ in pairs], [b for _, b in pairs]


def test_paired_difference_published_example() -> None:
    # Newcombe, Statistics in Medicine 17 (1998), page 2635, table II, method 10: 36, 12, 2, 0.
    found = paired_difference(*outcomes(36, 12, 2, 0))
    assert found.value == pytest.approx(0.2)
    assert found.interval == pytest.approx((0.0569, 0.3404), abs=5e-5)
    assert (found.only_first, found.only_second, found.count) == (12, 2, 50)


def test_paired_difference_worked_by_hand_with_positive_correlation() -> None:
    """25/40 and 23/40 right, 20 both, 12 neither: the correlation's numerator 20*12 - 5*3 is lowered by 40/2."""
    phi = 205 / math.sqrt(25 * 15 * 23 * 17)
    (low_1, high_1), (low_2, high_2) = wilson_interval(25, 40), wilson_interval(23, 40)
    down = ((0.625 - low_1) ** 2 - 2 * phi * (0.625 - low_1) * (high_2 - 0.575) + (high_2 - 0.575) ** 2) ** 0.5
    up = ((high_1 - 0.625) ** 2 - 2 * phi * (high_1 - 0.625) * (0.575 - low_2) + (0.575 - low_2) ** 2) ** 0.5
    found = paired_difference(*outcomes(20, 5, 3, 12))
    assert found.interval == pytest.approx((0.05 - down, 0.05 + up), rel=1e-12)


def test_paired_difference_covers_the_truth_as_often_as_it_says() -> None:
    rng = random.Random(0)
    covered, trials, count = 0, 1500, 120
    for _ in range(trials):
        first, second = [], []
        for _ in range(count):
            both = rng.random() < 0.85  # strongly correlated, like two models on the same prompts
            first.append(both and rng.random() < 0.97)
            second.append(both and rng.random() < 0.93)
        low, high = paired_difference(first, second).interval
        covered += low <= 0.85 * (0.97 - 0.93) <= high
    assert 0.935 < covered / trials < 0.985


def test_mcnemar_is_the_binomial_sum() -> None:
    found = paired_difference(*outcomes(10, 9, 2, 3))
    tail = sum(Fraction(math.comb(11, k), 2**11) for k in range(3))
    assert found.mcnemar_p == pytest.approx(float(2 * tail))
    assert paired_difference(*outcomes(5, 3, 3, 1)).mcnemar_p == 1.0
    assert paired_difference(*outcomes(5, 0, 0, 1)).mcnemar_p == 1.0


def test_paired_difference_is_antisymmetric_and_sane_at_the_ends() -> None:
    first, second = outcomes(50, 7, 3, 5)
    forward, backward = paired_difference(first, second), paired_difference(second, first)
    assert forward.value == -backward.value
    assert forward.interval == pytest.approx((-backward.interval[1], -backward.interval[0]))
    same = paired_difference([True] * 40, [True] * 40)
    assert same.value == 0
    assert -0.2 < same.interval[0] < 0 < same.interval[1] < 0.2
