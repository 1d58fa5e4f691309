"""Samples of a metric, one list a repeat."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence

from pdrelay.bench.record import ClientRecord
from pdrelay.lab.rundir import Case

Metric = Callable[[ClientRecord], float | None]


def ttft(record: ClientRecord) -> float | None:
    return record.ttft_ms if record.ok else None


def ttst(record: ClientRecord) -> float | None:
    return record.ttst_ms if record.ok else None


def tpot(record: ClientRecord) -> float | None:
    return record.tpot_ms


def e2e(record: ClientRecord) -> float | None:
    return record.e2e_ms


def hand_over(record: ClientRecord) -> float | None:
    """The first gap minus the median later gap, ms; None below four tokens."""
    gaps = record.itls_ms
    if not record.ok or len(gaps) < 3:
        return None
    return gaps[0] - statistics.median(gaps[1:])


def collect(records: Iterable[ClientRecord], metric: Metric) -> list[float]:
    values = (metric(record) for record in records)
    return [value for value in values if value is not None]


def by_repeat(
    cases: Sequence[Case], metric: Metric, keep: Callable[[ClientRecord], bool] = lambda _: True
) -> list[list[float]]:
    """Values of `metric` over measured records that `keep` accepts, one list a repeat."""
    return [collect(filter(keep, case.measured), metric) for case in cases]


def itls_by_repeat(cases: Sequence[Case]) -> list[list[float]]:
    """All gaps between consecutive tokens of measured, complete answers, ms."""
    return [[gap for r in case.measured if r.ok for gap in r.itls_ms] for case in cases]


def group_by_case(cases: Sequence[Case]) -> dict[str, list[Case]]:
    """Cases by name, repeats in order."""
    groups: dict[str, list[Case]] = {}
    for case in cases:
        groups.setdefault(case.info.case, []).append(case)
    return groups
