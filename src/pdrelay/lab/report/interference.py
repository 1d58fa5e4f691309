"""Experiment 3: what running streams feel while long prompts come, are prefilled and decoded."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from itertools import pairwise

from pdrelay.bench.percentile import sample_floor
from pdrelay.lab.report.figures import STALL, Distribution, InterferenceRow
from pdrelay.lab.report.samples import by_repeat, group_by_case, ttft
from pdrelay.lab.rundir import Case, Run
from pdrelay.lab.stats import Estimate, missing, percentile_estimate, repeats_estimate

LONG_TAG = "long"
CDF_POINTS = 160
Gap = tuple[int, int]  # start, end, ns


def interference_rows(run: Run) -> list[InterferenceRow]:
    return [
        _row(name, cases)
        for name in run.topologies
        for cases in group_by_case(run.select("interference", name)).values()
    ]


def split_gaps(case: Case) -> tuple[list[Gap], list[Gap], list[Gap]]:
    """(quiet, busy, period) gaps of the streams; see InterferenceRow.

    Quiet starts when the last stream of the first wave has its second token, so that the streams'
    own prefills are in none of the three. It goes on between the long prompts: quiet and busy
    windows take turns, so that both see the same context lengths (an ITL grows with its context).
    """
    longs = [r for r in case.records if r.tag == LONG_TAG and r.chunk_ns]
    if not longs:
        return [], [], []
    spans = merge([(r.intended_ns, r.chunk_ns[-1]) for r in longs])
    first, last = spans[0][0], spans[-1][1]
    start = max(case.info.window_start_ns, _settled_ns(case, first))
    gaps = [gap for stream in case.streams for gap in pairwise(stream.chunk_ns)]
    quiet = [g for g in gaps if g[0] >= start and g[1] <= last and not overlaps(g, spans)]
    busy = [gap for gap in gaps if overlaps(gap, spans)]
    period = [gap for gap in gaps if gap[1] > first and gap[0] < last]
    return quiet, busy, period


def _settled_ns(case: Case, before_ns: int) -> int:
    """When every stream of the first wave had its second token."""
    count = int(case.info.parameters.get("num_streams", 1))
    first_wave = sorted(case.streams, key=lambda stream: stream.intended_ns)[:count]
    begun = [stream.chunk_ns[1] for stream in first_wave if len(stream.chunk_ns) > 1]
    return max(begun, default=before_ns)


def merge(spans: Sequence[Gap]) -> list[Gap]:
    """Union of intervals, sorted and disjoint."""
    merged: list[Gap] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged


def overlaps(gap: Gap, spans: Sequence[Gap]) -> bool:
    """Whether the gap shares time with one of the sorted, disjoint spans."""
    index = bisect.bisect_left(spans, (gap[1], 0)) - 1
    return index >= 0 and spans[index][1] > gap[0]


def thin_cdf(values: Sequence[float]) -> list[tuple[float, float]]:
    """At most CDF_POINTS (value, share at or below), evenly in rank below 90 % and denser above."""
    ordered = sorted(values)
    n = len(ordered)
    if n == 0:
        return []
    shares = [i / (CDF_POINTS / 2) * 0.9 for i in range(CDF_POINTS // 2)]
    shares += [1 - 0.1 * (1 - i / (CDF_POINTS / 2 - 1)) ** 3 for i in range(CDF_POINTS // 2)]
    ranks = sorted({min(n - 1, int(share * n)) for share in shares} | {0, n - 1})
    return [(ordered[rank], (rank + 1) / n) for rank in ranks]


def _distribution(repeats: list[list[Gap]]) -> Distribution:
    samples = [[(end - start) / 1e6 for start, end in group] for group in repeats]
    pooled = [value for group in samples for value in group]
    return Distribution(
        p50=percentile_estimate(samples, 50),
        p90=percentile_estimate(samples, 90),
        p99=percentile_estimate(samples, 99),
        worst=max(pooled, default=None),
        n=len(pooled),
        cdf=thin_cdf(pooled),
    )


def _row(name: str, cases: Sequence[Case]) -> InterferenceRow:
    split = [split_gaps(case) for case in cases]
    quiet, busy, period = (_distribution([parts[i] for parts in split]) for i in range(3))
    factor, percentile = _factor(quiet, busy)
    info = cases[0].info
    return InterferenceRow(
        topology=name,
        num_streams=int(info.parameters.get("num_streams", 0)),
        long_input_len=int(info.parameters.get("long_input_len", 0)),
        num_long=sum(r.tag == LONG_TAG and r.ok for case in cases for r in case.records),
        quiet=quiet,
        busy=busy,
        period=period,
        long_ttft=percentile_estimate(by_repeat(cases, ttft, lambda r: r.tag == LONG_TAG)),
        stalled=_stalled([parts[1] for parts in split], quiet),
        factor=factor,
        factor_percentile=percentile,
    )


def _stalled(busy: list[list[Gap]], quiet: Distribution) -> Estimate:
    """Share of the streams' busy time spent in gaps over STALL times the quiet median."""
    limit_ms = quiet.p50.value
    if limit_ms is None:
        return missing("no quiet median")
    limit_ns = STALL * limit_ms * 1e6
    shares = []
    for gaps in busy:
        lengths = [end - start for start, end in gaps]
        if lengths:
            shares.append(sum(x for x in lengths if x > limit_ns) / max(1, sum(lengths)))
    return repeats_estimate(shares)


def _factor(quiet: Distribution, busy: Distribution) -> tuple[float | None, float | None]:
    """Busy over quiet p50 at the highest percentile that the busy sample allows.

    Percentiles grow, so what holds from below at a lower one holds at p99.
    """
    for percentile, estimate in ((99.0, busy.p99), (90.0, busy.p90), (50.0, busy.p50)):
        if estimate.value is not None and quiet.p50.value:
            assert busy.n >= sample_floor(percentile)
            return estimate.value / quiet.p50.value, percentile
    return None, None
