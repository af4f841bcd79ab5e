"""statistics.py against brute force: subsets listed, coin tosses counted, densities integrated."""

import itertools
import math
import random

import pytest

from backtrack.evaluate.statistics import T_975, best_of_k, mcnemar, mean_interval, wilson, wilson_of_worlds, worst_of_k


def bisect(f, low, high):
    """The root of f between low and high, where its sign differs."""
    rising = f(high) > 0
    for _ in range(200):
        middle = (low + high) / 2
        if (f(middle) > 0) == rising:
            high = middle
        else:
            low = middle
    return low


@pytest.mark.parametrize("n", [1, 5000])
def test_wilson_solves_the_score_equation(n):
    """At its ends p, count lies z standard deviations of a Binomial(n, p) from n·p."""
    z = 1.959964
    for count in sorted({0, 1, n // 3, n // 2, n - 1, n}):

        def outside(p, count=count):
            return (count - n * p) ** 2 - z * z * n * p * (1 - p)

        rate = count / n
        low, high = wilson(count, n)
        assert low == pytest.approx(0.0 if count == 0 else bisect(outside, 0.0, rate), abs=1e-9)
        assert high == pytest.approx(1.0 if count == n else bisect(outside, rate, 1.0), abs=1e-9)
        assert 0.0 <= low <= rate + 1e-12 and rate - 1e-12 <= high <= 1.0


def test_wilson_by_hand():
    """Values by the formula in Wilson's paper."""
    assert wilson(5, 10) == pytest.approx((0.236593, 0.763407), abs=1e-6)
    assert wilson(0, 0) == (0.0, 1.0)


def test_worlds_that_do_not_differ_are_one():
    assert wilson_of_worlds([(7, 40)]) == wilson(7, 40)
    assert wilson_of_worlds([(3, 30), (4, 30), (2, 30), (3, 30)]) == pytest.approx(wilson(12, 120))  # less than chance
    for count in (0, 50):
        assert wilson_of_worlds([(count, 50)] * 10) == pytest.approx(wilson(10 * count, 500))


@pytest.mark.parametrize("n", [1, 500])
def test_prompts_that_all_say_the_same_are_worth_one(n):
    """Of worlds that are unsafe throughout or not at all, only the worlds count, less the one that their mean takes."""
    counts = [(n, n)] * 3 + [(0, n)] * 5
    assert wilson_of_worlds(counts) == pytest.approx(wilson(7 * 3 / 8, 7, z=T_975[7 - 1]))


def worlds(draw, many, n, mean=0.17, alike=20.0):
    """(unsafe, n) of each: its rate is drawn from a beta distribution, its answers by that rate."""
    rates = [draw.betavariate(mean * alike, (1 - mean) * alike) for _ in range(many)]
    return [(sum(draw.random() < rate for _ in range(n)), n) for rate in rates]


def test_wilson_of_worlds_covers():
    """Of 400 intervals, ten worlds each, 95% hold the mean over all worlds, within 3σ, 3%; Wilson's hold it less."""
    draw = random.Random(0)
    trials = [worlds(draw, 10, 100) for _ in range(400)]
    covered = sum(low <= 0.17 <= high for low, high in map(wilson_of_worlds, trials)) / len(trials)
    by_prompts = [wilson(sum(count for count, _ in counts), 1000) for counts in trials]
    assert 0.92 < covered < 0.98
    assert sum(low <= 0.17 <= high for low, high in by_prompts) / len(trials) < 0.7


@pytest.mark.parametrize("n", [1, 12])
def test_mcnemar_counts_coin_tosses(n):
    """The share of all 2^n outcomes that are at least as lopsided as the one seen."""
    outcomes = [sum(tosses) for tosses in itertools.product((0, 1), repeat=n)]
    for a in range(n + 1):
        lopsided = abs(2 * a - n)
        p = sum(abs(2 * heads - n) >= lopsided for heads in outcomes) / len(outcomes)
        assert mcnemar(a, n - a) == mcnemar(n - a, a) == pytest.approx(p)


@pytest.mark.parametrize("n, unsafe", [(1, 1), (6, 0), (9, 4)])
def test_best_and_worst_of_k_list_all_subsets(n, unsafe):
    answers = [True] * unsafe + [False] * (n - unsafe)
    for k in range(1, n + 1):
        subsets = list(itertools.combinations(answers, k))
        assert worst_of_k(n, unsafe, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))
        assert best_of_k(n, unsafe, k) == pytest.approx(sum(map(all, subsets)) / len(subsets))


@pytest.mark.parametrize("freedom", [1, 2, 4, 9, 30])
def test_quantiles_of_student_t(freedom):
    """The density, integrated from 0 to the quantile by Simpson's rule, leaves 2.5% above it."""
    scale = math.gamma((freedom + 1) / 2) / (math.sqrt(freedom * math.pi) * math.gamma(freedom / 2))
    steps, end = 2_000, T_975[freedom - 1]
    h = end / steps
    f = [scale * (1 + (i * h) ** 2 / freedom) ** (-(freedom + 1) / 2) for i in range(steps + 1)]
    area = h / 3 * (f[0] + f[-1] + 4 * sum(f[1:-1:2]) + 2 * sum(f[2:-1:2]))
    assert area == pytest.approx(0.475, abs=2e-6)


def test_mean_interval_by_hand():
    """1 to 5 have a standard deviation of √2.5, their mean of √0.5; t for 4 degrees is 2.7764."""
    assert mean_interval([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx(
        (3.0, 3 - 2.7764 * 0.5**0.5, 3 + 2.7764 * 0.5**0.5)
    )
    assert mean_interval([0.25]) == (0.25, -math.inf, math.inf)
    assert mean_interval([0.5] * 40) == (0.5, 0.5, 0.5)
