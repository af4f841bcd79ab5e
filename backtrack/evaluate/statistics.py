"""How sure is a rate, is one model really safer than another, and what do k attempts give? Numbers in, numbers out.

wilson(3, 100)                    # (0.0103, 0.0845): 95% interval of a rate
wilson_of_worlds([(3, 100), (9, 100), (0, 100)])    # (0.0039, 0.3083): of prompts in three worlds
mcnemar(12, 2)                    # 0.013: two models, the same prompts, 12 and 2 answers unsafe in one of them only
worst_of_k(64, 3, 8)              # 0.335: at least one of 8 unsafe, estimated from 64 samples of which 3 are
mean_interval([0.1, 0.2, 0.15])   # (0.15, 0.026, 0.274): over seeds
"""

import math

# 97.5% quantile of Student's t for 1, 2, … 30 degrees of freedom; tests/test_statistics.py integrates the density.
T_975 = (
    12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281,
    2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860,
    2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423,
)  # fmt: skip


def wilson(count: float, n: float, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's 95% score interval for a rate of count / n; unlike p ± 2·se it is right near 0 and 1 (Wilson 1927)."""
    if n == 0:
        return 0.0, 1.0
    p = count / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def wilson_of_worlds(counts: list[tuple[float, float]]) -> tuple[float, float]:
    """95% interval of a rate over several worlds, from (count, n) of each: what would other worlds have given?

    The prompts of one world succeed and fail together, so N of them in S worlds are worth fewer than N independent
    ones. How many shows in how far the worlds lie apart:

        v = S/(S − 1) · Σ (count_s − p·n_s)² / N²      the variance of p = Σ count_s / N, taken from the worlds
        n = p (1 − p) / v                              independent prompts would give this variance (Kish 1965)

    and the interval is Wilson's of p and n, with Student's t of S − 1 degrees of freedom for z (Dean and Pagano 2015,
    J. Surv. Stat. Methodol. 3, 484). If worlds lie no further apart than chance puts them, n ≥ N, it is Wilson's of
    all prompts. Unlike mean ± t·se it stays between 0 and 1 and has a width where every count is 0.
    """
    S, N = len(counts), sum(n for _, n in counts)
    p = sum(count for count, _ in counts) / N
    squares = sum((count - p * n) ** 2 for count, n in counts)
    if S < 2 or squares == 0:
        return wilson(p * N, N)
    v = S / (S - 1) * squares / N**2
    n = p * (1 - p) / v
    return wilson(p * N, N) if n >= N else wilson(p * n, n, z=t_975(S - 1))


def mcnemar(only_a: int, only_b: int) -> float:
    """p-value of "A and B are equally likely to fail", from the prompts on which just one of them did (McNemar 1947).

    Exact and two-sided: given n such prompts, only_a ~ Binomial(n, ½). It takes prompts to be independent; ours are six
    phrasings of a topic.
    """
    n, k = only_a + only_b, min(only_a, only_b)
    tail = sum(math.comb(n, i) for i in range(k + 1)) / 2**n
    return min(1.0, 2.0 * tail)


def worst_of_k(n: int, unsafe: int, k: int) -> float:
    """P(at least one of k answers is unsafe), from n ≥ k samples of which `unsafe` are: the share of k-subsets with an
    unsafe one, which is unbiased (pass@k of Chen et al. 2021, arXiv 2107.03374)."""
    return 1.0 - math.comb(n - unsafe, k) / math.comb(n, k)


def best_of_k(n: int, unsafe: int, k: int) -> float:
    """P(all of k answers are unsafe), in the same way."""
    return math.comb(unsafe, k) / math.comb(n, k)


def mean_interval(values: list[float]) -> tuple[float, float, float]:
    """(mean, low, high): 95% by Student's t over values that are independent, such as one per seed. Needs two."""
    n = len(values)
    mean = sum(values) / n
    if n < 2:
        return mean, -math.inf, math.inf
    variance = sum((v - mean) ** 2 for v in values) / (n - 1)
    half = t_975(n - 1) * math.sqrt(variance / n)
    return mean, mean - half, mean + half


def t_975(freedom: int) -> float:
    return T_975[freedom - 1] if freedom <= len(T_975) else 1.96
