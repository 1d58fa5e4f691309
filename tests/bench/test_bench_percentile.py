from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdrelay.bench.percentile import (
    percentile,
    percentile_ci,
    percentile_or_none,
    sample_floor,
)


@pytest.mark.parametrize(
    ("p", "floor"), [(50, 11), (90, 64), (95, 130), (99, 662), (99.9, 6636), (10, 64), (1, 662)]
)
def test_floors_are_mlperfs(p: float, floor: int) -> None:
    assert sample_floor(p) == floor


@given(st.sampled_from([50, 75, 90, 99]))
def test_the_floor_is_the_smallest_n_that_the_rule_allows(p: int) -> None:
    tail = Fraction(100 - p, 100)

    def at_most_one(n: int) -> Fraction:
        return (1 - tail) ** n + n * tail * (1 - tail) ** (n - 1)

    n = sample_floor(p)
    assert at_most_one(n) <= Fraction(1, 100) < at_most_one(n - 1)


@pytest.mark.parametrize("p", [0, 100, -1, math.nan])
def test_percentiles_outside_0_to_100_are_refused(p: float) -> None:
    with pytest.raises(ValueError, match="not between"):
        sample_floor(p)


def test_nothing_below_the_floor() -> None:
    assert percentile_or_none([1.0] * 661, 99) is None
    assert percentile_or_none([1.0] * 662, 99) == 1.0
    assert percentile_or_none([], 50) is None


def test_percentile_interpolates_as_vllm_does() -> None:
    assert percentile([1, 2, 3, 4], 50) == 2.5
    assert percentile([10, 20], 99) == pytest.approx(19.9)


def exact_cdf(n: int, q: Fraction, k: int) -> Fraction:
    return sum(
        (math.comb(n, i) * q**i * (1 - q) ** (n - i) for i in range(k + 1)), start=Fraction(0)
    )


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 90), st.integers(1, 99), st.sampled_from([0.8, 0.95, 0.99]))
def test_ci_ranks_are_the_tightest_exact_binomial_ones(n: int, p: int, confidence: float) -> None:
    q = Fraction(p, 100)
    tail = (1 - confidence) / 2
    below = [float(exact_cdf(n, q, k)) for k in range(n + 1)]
    lows = [rank for rank in range(1, n + 1) if below[rank - 1] <= tail]
    highs = [rank for rank in range(1, n + 1) if below[rank - 1] >= 1 - tail]
    got = percentile_ci(list(range(1, n + 1)), p, confidence)
    if not lows or not highs:
        assert got is None
        return
    low, high = max(lows), min(highs)
    assert got == (low, high)
    assert below[high - 1] - below[low - 1] >= confidence - 1e-12


def test_ci_covers_the_true_percentile_as_often_as_it_says() -> None:
    rng = np.random.default_rng(7)
    truth = -math.log(0.1)  # p90 of Exp(1)
    intervals = [percentile_ci(rng.exponential(size=200), 90) for _ in range(2000)]
    hits = sum(ci is not None and ci[0] <= truth <= ci[1] for ci in intervals)
    # At least 95 %; four standard deviations of 2,000 draws are 1.9 %.
    assert 0.93 <= hits / 2000 <= 0.995


def test_ci_does_not_depend_on_order_and_needs_samples() -> None:
    samples = np.random.default_rng(1).permutation(1000).astype(float)
    assert percentile_ci(samples, 50) == percentile_ci(np.sort(samples), 50)
    assert percentile_ci([], 50) is None
    assert percentile_ci([1.0, 2.0], 99) is None


def test_ci_of_millions_of_samples_is_narrow_and_right() -> None:
    low, high = percentile_ci(np.arange(1_000_001, dtype=float), 99) or (0, 0)
    sd = math.sqrt(1e6 * 0.99 * 0.01)
    assert low == pytest.approx(990_000 - 1.96 * sd, abs=3)
    assert high == pytest.approx(990_000 + 1.96 * sd, abs=3)
