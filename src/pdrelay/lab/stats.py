"""Estimates with 95 % confidence intervals: across repeats, or by order statistics within a run.

Requests of one run are never resampled: they share its queue, so they are not independent draws.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import msgspec

from pdrelay.bench.percentile import percentile_ci, percentile_or_none, sample_floor

CONFIDENCE = 0.95
MIN_REPEATS = 5  # below this a t interval across repeats is too wide to say anything


class Estimate(msgspec.Struct, kw_only=True):
    """A figure, its 95 % interval, and how both were made.

    `value` is None below the sample floor; `minimum` and `maximum` of the samples stay.
    """

    value: float | None
    lo: float | None = None
    hi: float | None = None
    n: int = 0  # samples
    repeats: int = 1
    method: str = ""  # how the interval was made
    note: str = ""  # why there is no value
    minimum: float | None = None
    maximum: float | None = None

    @property
    def known(self) -> bool:
        return self.value is not None


def missing(note: str, n: int = 0) -> Estimate:
    """No figure, and why."""
    return Estimate(value=None, n=n, note=note)


def student_t_quantile(df: int) -> float:
    """Two-sided 95 % quantile of Student's t with `df` degrees of freedom.

    By bisection on the finite series of Abramowitz and Stegun, 26.7.3 and 26.7.4.
    """
    assert df >= 1
    low, high = 0.0, 20.0
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_two_sided(middle, df) < CONFIDENCE else (low, middle)
    return (low + high) / 2


def _t_two_sided(t: float, df: int) -> float:
    """P(|T| < t)."""
    theta = math.atan(t / math.sqrt(df))
    cosine = math.cos(theta)
    odd = df % 2
    term = cosine if odd else 1.0
    total = 0.0 if df == 1 else term
    for k in range(2 + odd, df - 1, 2):
        term *= cosine * cosine * (k - 1) / k
        total += term
    series = math.sin(theta) * total
    return 2 / math.pi * (theta + series) if odd else series


def mean_ci(values: Sequence[float]) -> tuple[float, float] | None:
    """Student-t 95 % interval of the mean, or None below MIN_REPEATS values."""
    if len(values) < MIN_REPEATS:
        return None
    half = student_t_quantile(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    mean = statistics.fmean(values)
    return mean - half, mean + half


def percentile_estimate(repeats: Sequence[Sequence[float]], p: float = 50.0) -> Estimate:
    """Percentile `p` of samples in one or more repeats.

    Five or more repeats that each meet the floor: the mean of their percentiles, t interval.
    Otherwise: the pooled percentile with its order-statistic interval. Below the floor: no value.
    """
    groups = [list(group) for group in repeats if group]
    pooled = [value for group in groups for value in group]
    if not pooled:
        return missing("no sample")
    base = Estimate(
        value=None,
        n=len(pooled),
        repeats=len(groups),
        minimum=min(pooled),
        maximum=max(pooled),
    )
    per_repeat = [percentile_or_none(group, p) for group in groups]
    known = [value for value in per_repeat if value is not None]
    if len(groups) >= MIN_REPEATS and len(known) == len(groups):
        base.value = statistics.fmean(known)
        interval = mean_ci(known)
        base.method = f"t over {len(groups)} repeats"
    else:
        base.value = percentile_or_none(pooled, p)
        interval = percentile_ci(pooled, p) if base.value is not None else None
        base.method = "order statistics" + (
            f", {len(groups)} repeats pooled" if len(groups) > 1 else " within the run"
        )
    if base.value is None:
        base.method, base.note = "", below_floor(len(pooled), p)
    elif interval is not None:
        base.lo, base.hi = interval
    return base


def below_floor(n: int, p: float) -> str:
    return f"n={n}<{sample_floor(p)}"


def repeats_estimate(values: Sequence[float]) -> Estimate:
    """A figure that each repeat yields once (throughput, goodput): mean and t interval."""
    if not values:
        return missing("no repeat")
    interval = mean_ci(values)
    return Estimate(
        value=statistics.fmean(values),
        lo=interval[0] if interval else None,
        hi=interval[1] if interval else None,
        n=len(values),
        repeats=len(values),
        method=f"t over {len(values)} repeats" if interval else "",
        minimum=min(values),
        maximum=max(values),
    )


def proportion_estimate(successes: int, n: int) -> Estimate:
    """A share with Wilson's 95 % score interval (Wilson 1927)."""
    if n == 0:
        return missing("no sample")
    z, share = 1.959964, successes / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # At shares of 0 and 1 one end is the share itself: rounding must not push it past.
    lo, hi = min(share, max(0.0, centre - half)), max(share, min(1.0, centre + half))
    return Estimate(value=share, lo=lo, hi=hi, n=n, method="Wilson")


def ratio_estimate(
    numerator: Sequence[Sequence[float]], denominator: Sequence[Sequence[float]], p: float = 50.0
) -> Estimate:
    """Ratio of two percentiles, repeat i of one paired with repeat i of the other.

    Five or more pairs: geometric mean of the paired ratios, t interval on their logarithms.
    Otherwise the ratio of pooled percentiles, with the conservative interval made of each side's
    97.5 % order-statistic interval (Bonferroni: jointly at least 95 %).
    """
    pairs = _paired_percentiles(numerator, denominator, p)
    if len(pairs) >= MIN_REPEATS:
        logs = [math.log(a / b) for a, b in pairs]
        interval = mean_ci(logs)
        assert interval is not None
        return Estimate(
            value=math.exp(statistics.fmean(logs)),
            lo=math.exp(interval[0]),
            hi=math.exp(interval[1]),
            n=len(pairs),
            repeats=len(pairs),
            method=f"paired log-ratio, t over {len(pairs)} repeats",
        )
    top = [value for group in numerator for value in group]
    bottom = [value for group in denominator for value in group]
    return _pooled_ratio(top, bottom, p)


def _paired_percentiles(
    numerator: Sequence[Sequence[float]], denominator: Sequence[Sequence[float]], p: float
) -> list[tuple[float, float]]:
    pairs = []
    for top, bottom in zip(numerator, denominator, strict=False):
        a, b = percentile_or_none(list(top), p), percentile_or_none(list(bottom), p)
        if a and b:
            pairs.append((a, b))
    return pairs


def _pooled_ratio(top: list[float], bottom: list[float], p: float) -> Estimate:
    n = min(len(top), len(bottom))
    a = percentile_or_none(top, p) if top else None
    b = percentile_or_none(bottom, p) if bottom else None
    if a is None or not b:
        return missing(below_floor(n, p), n)
    joint = (1 + CONFIDENCE) / 2
    ci_a, ci_b = percentile_ci(top, p, joint), percentile_ci(bottom, p, joint)
    estimate = Estimate(value=a / b, n=n, method="")
    if ci_a is not None and ci_b is not None and ci_b[0] > 0:
        estimate.lo, estimate.hi = ci_a[0] / ci_b[1], ci_a[1] / ci_b[0]
        estimate.method = "order statistics, Bonferroni"
    return estimate
