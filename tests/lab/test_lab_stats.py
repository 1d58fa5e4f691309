from __future__ import annotations

import random
import statistics

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pdrelay.bench.percentile import sample_floor
from pdrelay.lab.stats import (
    mean_ci,
    percentile_estimate,
    proportion_estimate,
    ratio_estimate,
    repeats_estimate,
    student_t_quantile,
)


@pytest.mark.parametrize(
    ("df", "published"),
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (5, 2.571), (9, 2.262), (30, 2.042),
     (1000, 1.962)],
)  # fmt: skip
def test_t_quantile_matches_published_tables(df, published):
    assert student_t_quantile(df) == pytest.approx(published, abs=6e-4)


def test_t_interval_covers_the_mean_95_percent_of_the_time():
    rng = random.Random(5)
    covered = 0
    for _ in range(3000):
        low, high = mean_ci([rng.gauss(3.0, 2.0) for _ in range(5)])
        covered += low <= 3.0 <= high
    assert 0.938 < covered / 3000 < 0.962


def test_too_few_repeats_have_no_t_interval():
    assert mean_ci([1.0, 2.0, 3.0, 4.0]) is None
    assert repeats_estimate([1.0, 2.0]).lo is None
    assert repeats_estimate([]).value is None


def test_below_the_floor_there_is_no_percentile_but_a_range():
    estimate = percentile_estimate([[3.0, 1.0, 2.0]])
    assert estimate.value is None
    assert (estimate.minimum, estimate.maximum, estimate.note) == (1.0, 3.0, "n=3<11")


@given(st.lists(st.floats(0.1, 1e4), min_size=1, max_size=900), st.sampled_from([50, 90, 99]))
def test_one_run_uses_order_statistics_and_respects_the_floor(samples, p):
    estimate = percentile_estimate([samples], p)
    assert estimate.known == (len(samples) >= sample_floor(p))
    if estimate.known and estimate.lo is not None:
        assert estimate.lo in samples
        assert estimate.hi in samples
        assert min(samples) <= estimate.lo <= estimate.value <= estimate.hi <= max(samples)
        assert "order statistics" in estimate.method


def test_five_repeats_use_their_medians_not_the_pool():
    repeats = [[base + i / 100 for i in range(11)] for base in (1, 2, 3, 4, 5)]
    estimate = percentile_estimate(repeats)
    medians = [statistics.median(group) for group in repeats]
    assert estimate.value == pytest.approx(statistics.fmean(medians))
    half = 2.776 * statistics.stdev(medians) / 5**0.5
    assert estimate.hi - estimate.value == pytest.approx(half, rel=1e-3)
    assert estimate.method == "t over 5 repeats"


def test_five_short_repeats_are_pooled_and_say_so():
    estimate = percentile_estimate([[1.0, 2.0, 3.0]] * 5)
    assert estimate.value == 2.0
    assert estimate.method == "order statistics, 5 repeats pooled"


def test_paired_ratio_cancels_what_pairs_share():
    rng = random.Random(1)
    drift = [1.0, 3.0, 9.0, 2.0, 5.0]  # far larger than the difference
    ours = [[2.0 * d * rng.uniform(0.99, 1.01) for _ in range(15)] for d in drift]
    theirs = [[d * rng.uniform(0.99, 1.01) for _ in range(15)] for d in drift]
    ratio = ratio_estimate(ours, theirs)
    assert 1.98 < ratio.lo < 2.0 < ratio.hi < 2.02
    assert "paired" in ratio.method


def test_ratio_of_one_run_is_conservative():
    rng = random.Random(2)
    wrong = 0
    for _ in range(400):
        ours = [[rng.lognormvariate(0, 0.3) for _ in range(25)]]
        theirs = [[rng.lognormvariate(0, 0.3) for _ in range(25)]]
        ratio = ratio_estimate(ours, theirs)
        wrong += not ratio.lo <= 1.0 <= ratio.hi
    assert wrong / 400 <= 0.05


def test_ratio_without_samples_is_missing():
    assert ratio_estimate([[]], [[1.0] * 20]).value is None
    assert ratio_estimate([[1.0] * 3], [[1.0] * 20]).note == "n=3<11"


@given(st.integers(0, 50), st.integers(1, 50))
@example(good=0, bad=3)  # the lower end came out as 6e-17
def test_wilson_interval_holds_the_share(good, bad):
    estimate = proportion_estimate(good, good + bad)
    assert 0 <= estimate.lo <= estimate.value <= estimate.hi <= 1


def test_wilson_matches_a_published_example():
    """Newcombe 1998, table I: 81 of 263."""
    estimate = proportion_estimate(81, 263)
    assert estimate.lo == pytest.approx(0.2553, abs=1e-4)
    assert estimate.hi == pytest.approx(0.3662, abs=1e-4)
