"""Experiment 1: TTFT against input length, idle and with running decodes."""

from __future__ import annotations

from collections.abc import Sequence

from pdrelay.bench.record import ClientRecord
from pdrelay.lab.report.figures import RatioRow, TtftRow
from pdrelay.lab.report.samples import by_repeat, group_by_case, hand_over, ttft, ttst
from pdrelay.lab.rundir import Case, Run
from pdrelay.lab.stats import percentile_estimate, ratio_estimate
from pdrelay.lab.topology import is_pd

PROBE_TAG = "probe-"  # followed by the nominal input length


def nominal_length(record: ClientRecord) -> int | None:
    """Input length of a probe, from its tag."""
    text = record.tag.removeprefix(PROBE_TAG)
    return int(text) if record.tag.startswith(PROBE_TAG) and text.isdecimal() else None


def ttft_rows(run: Run) -> list[TtftRow]:
    return [
        _row(name, condition, length, cases)
        for name in run.topologies
        for condition, cases in _conditions(run, name).items()
        for length in _lengths(cases)
    ]


def ttft_ratios(run: Run) -> list[RatioRow]:
    """TTFT p50 of every P/D topology over every other, by condition and length."""
    rows = []
    for pd in filter(is_pd, run.topologies):
        ours = _conditions(run, pd)
        for other in run.topologies:
            if is_pd(other):
                continue
            theirs = _conditions(run, other)
            for condition in (name for name in ours if name in theirs):
                rows += _ratios(pd, other, condition, ours[condition], theirs[condition])
    return rows


def _ratios(
    pd: str, other: str, condition: str, ours: list[Case], theirs: list[Case]
) -> list[RatioRow]:
    """Over the repeats that both have, so that pairs are of one repeat."""
    repeats = [case.info.rep for case in theirs]
    ours = [case for case in ours if case.info.rep in repeats]
    repeats = [case.info.rep for case in ours]
    theirs = [case for case in theirs if case.info.rep in repeats]
    lengths = [length for length in _lengths(ours) if length in _lengths(theirs)]
    return [
        RatioRow(
            topology=pd,
            versus=other,
            case=condition,
            input_len=length,
            metric="ttft p50",
            ratio=ratio_estimate(_ttfts(ours, length), _ttfts(theirs, length)),
        )
        for length in lengths
    ]


def _conditions(run: Run, topology: str) -> dict[str, list[Case]]:
    groups = group_by_case(run.select("ttft", topology))
    return {name: groups[name] for name in ("idle", "busy") if name in groups}


def _lengths(cases: Sequence[Case]) -> list[int]:
    lengths = {nominal_length(record) for case in cases for record in case.measured}
    return sorted(length for length in lengths if length is not None)


def _ttfts(cases: Sequence[Case], length: int) -> list[list[float]]:
    return by_repeat(cases, ttft, lambda record: nominal_length(record) == length)


def _row(topology: str, condition: str, length: int, cases: Sequence[Case]) -> TtftRow:
    def of_length(record: ClientRecord) -> bool:
        return nominal_length(record) == length

    ttfts = _ttfts(cases, length)
    median = percentile_estimate(ttfts)
    return TtftRow(
        topology=topology,
        condition=condition,
        input_len=length,
        ttft=median,
        ttft_p90=percentile_estimate(ttfts, 90),
        ttst=percentile_estimate(by_repeat(cases, ttst, of_length)),
        hand_over=percentile_estimate(by_repeat(cases, hand_over, of_length)),
        samples=[] if median.known else [value for group in ttfts for value in group],
    )
