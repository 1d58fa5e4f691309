"""Experiment 4, second part: ITL while a given number of streams decode together."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from itertools import pairwise

from pdrelay.lab.report.figures import FULL_SHARE, StreamsRow
from pdrelay.lab.report.samples import by_repeat, group_by_case, hand_over, ttft
from pdrelay.lab.rundir import STREAMS_CASE, Case, Run
from pdrelay.lab.stats import percentile_estimate, repeats_estimate

Window = tuple[int, int]  # start, end, ns


def streams_rows(run: Run) -> list[StreamsRow]:
    """By topology, then number of streams."""
    rows = [
        _row(name, cases)
        for name in run.topologies
        for case, cases in group_by_case(run.select("shapes", name)).items()
        if case.startswith(STREAMS_CASE)
    ]
    order = {name: index for index, name in enumerate(run.topologies)}
    return sorted(rows, key=lambda row: (order[row.topology], row.num_streams))


def num_streams_of(case: Case) -> int:
    return int(case.info.parameters.get("num_streams", 1))


def full_windows(case: Case) -> list[Window]:
    """When at least FULL_SHARE of the streams were between their first and their last token."""
    needed = max(1, round(FULL_SHARE * num_streams_of(case)))
    edges: list[tuple[int, int]] = []
    for record in case.measured:
        if record.ok and len(record.chunk_ns) > 1:
            edges += [(record.chunk_ns[0], 1), (record.chunk_ns[-1], -1)]
    windows: list[Window] = []
    running, begun_ns = 0, 0
    for t_ns, change in sorted(edges):
        if running + change >= needed > running:
            begun_ns = t_ns
        elif running >= needed > running + change and t_ns > begun_ns:
            windows.append((begun_ns, t_ns))
        running += change
    return windows


def full_gaps_ms(case: Case) -> list[float]:
    """Gaps between tokens that lie within one of the full windows, ms."""
    windows = full_windows(case)
    starts = [start for start, _ in windows]

    def inside(start_ns: int, end_ns: int) -> bool:
        index = bisect.bisect_right(starts, start_ns) - 1
        return index >= 0 and end_ns <= windows[index][1]

    return [
        (end - start) / 1e6
        for record in case.measured
        if record.ok
        for start, end in pairwise(record.chunk_ns)
        if inside(start, end)
    ]


def _token_rates(cases: Sequence[Case]) -> list[float]:
    """Tokens/s within the full windows, one a repeat that has any."""
    rates = []
    for case in cases:
        seconds = sum(end - start for start, end in full_windows(case)) / 1e9
        if seconds > 0:
            rates.append(len(full_gaps_ms(case)) / seconds)
    return rates


def _row(name: str, cases: Sequence[Case]) -> StreamsRow:
    info = cases[0].info
    gaps = [full_gaps_ms(case) for case in cases]
    return StreamsRow(
        topology=name,
        num_streams=num_streams_of(cases[0]),
        input_len=info.input_len or 0,
        output_len=info.output_len or 0,
        ttft=percentile_estimate(by_repeat(cases, ttft)),
        itl=percentile_estimate(gaps),
        itl_p99=percentile_estimate(gaps, 99),
        hand_over=percentile_estimate(by_repeat(cases, hand_over)),
        output_rate=repeats_estimate(_token_rates(cases)),
    )
