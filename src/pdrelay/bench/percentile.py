"""Percentiles that refuse to be read from too few samples, and their confidence intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

_FLOOR_CONFIDENCE = 0.99

Samples = Sequence[float] | npt.NDArray[np.float64]


@lru_cache(maxsize=64)
def sample_floor(p: float) -> int:
    """The fewest samples from which the `p`-th percentile (0 < p < 100) may be printed.

    MLPerf Inference's early-stopping rule: the smallest n at which seeing at most one sample
    beyond a percentile would, if the true fraction beyond it were 1 - p, have a probability of
    1 % or less: P(Binomial(n, 1 - p) <= 1) <= 0.01. Gives 11, 64, 130, 662, 6636 for p50, p90,
    p95, p99, p99.9; below the median the tail is the other one.
    """
    if not 0 < p < 100:
        raise ValueError(f"percentile {p} is not between 0 and 100")
    tail = min(p, 100 - p) / 100

    def holds(n: int) -> bool:
        log_none = n * math.log1p(-tail)
        at_most_one = math.exp(log_none) * (1 + n * tail / (1 - tail))
        return at_most_one <= 1 - _FLOOR_CONFIDENCE + 1e-12

    high = 2
    while not holds(high):
        high *= 2
    low = high // 2
    while low + 1 < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def percentile(samples: Samples, p: float) -> float:
    """The `p`-th percentile with linear interpolation, as numpy's and so `vllm bench serve`'s."""
    return float(np.percentile(np.asarray(samples, dtype=np.float64), p))


def percentile_or_none(samples: Samples, p: float) -> float | None:
    """The `p`-th percentile, or None when there are fewer than `sample_floor(p)` samples."""
    return percentile(samples, p) if len(samples) >= sample_floor(p) else None


def percentile_ci(
    samples: Samples, p: float, confidence: float = 0.95
) -> tuple[float, float] | None:
    """A distribution-free confidence interval of the `p`-th percentile from order statistics.

    The number of samples at or below the true percentile is Binomial(n, p): the ranks are its
    exact quantiles with at most (1 - confidence) / 2 in each tail, so that the interval covers at
    least `confidence` for independent samples (David & Nagaraja, Order Statistics, 7.1). None
    when n is too small for both ranks to exist. Samples of one stream (ITLs) are not independent:
    use intervals over repeated runs for them.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence {confidence} is not between 0 and 1")
    if not 0 < p < 100:
        raise ValueError(f"percentile {p} is not between 0 and 100")
    if len(samples) == 0:
        return None
    ranks = _ci_ranks(len(samples), p / 100, confidence)
    if ranks is None:
        return None
    low, high = ranks
    ordered = np.partition(np.asarray(samples, dtype=np.float64), [low - 1, high - 1])
    return float(ordered[low - 1]), float(ordered[high - 1])


@lru_cache(maxsize=256)
def _ci_ranks(n: int, q: float, confidence: float) -> tuple[int, int] | None:
    """1-based ranks l < u with P(B < l) <= a/2 and P(B >= u) <= a/2, B ~ Binomial(n, q)."""
    tail = (1 - confidence) / 2
    first, cdf = _binomial_cdf(n, q)
    below = int(np.searchsorted(cdf, tail, side="right"))  # cdf[below - 1] <= tail < cdf[below]
    low = first + below  # P(B <= low - 1) <= tail
    high = first + int(np.searchsorted(cdf, 1 - tail, side="left")) + 1  # P(B <= high-1) >= 1-tail
    return (low, high) if 1 <= low < high <= n else None


def _binomial_cdf(n: int, q: float) -> tuple[int, npt.NDArray[np.float64]]:
    """(k0, cdf) with cdf[i] = P(Binomial(n, q) <= k0 + i), where not vanishingly small."""
    reach = 12 * math.sqrt(n * q * (1 - q)) + 40
    first = max(0, math.floor(n * q - reach))
    last = min(n, math.ceil(n * q + reach))
    k = np.arange(first, last, dtype=np.float64)
    steps = np.log((n - k) / (k + 1)) + math.log(q / (1 - q))
    log_first = (
        math.lgamma(n + 1)
        - math.lgamma(first + 1)
        - math.lgamma(n - first + 1)
        + first * math.log(q)
        + (n - first) * math.log1p(-q)
    )
    log_pmf = log_first + np.concatenate(([0.0], np.cumsum(steps)))
    pmf = np.exp(log_pmf)
    return first, np.cumsum(pmf) / pmf.sum()
