"""Experiment 2: offered load from light to saturation, and a trace."""

from __future__ import annotations

from collections.abc import Sequence

from pdrelay.bench.slo import Slo
from pdrelay.lab.report.figures import TrafficKind, TrafficRow
from pdrelay.lab.report.samples import by_repeat, group_by_case, itls_by_repeat, tpot, ttft
from pdrelay.lab.rundir import FIXED_CASE, FIXED_IDLE_CASE, POISSON_CASE, Case, Run
from pdrelay.lab.stats import (
    Estimate,
    missing,
    percentile_estimate,
    proportion_estimate,
    repeats_estimate,
)

# An offered load counts as sustained when what is completed keeps up with it: the run may be longer
# than the arrivals by this share, by this long, and by the longest answer at an unloaded pace.
SUSTAINED_SHARE = 0.9
DRAIN_S = 0.25
UNLOADED_SHARE = 0.1  # the fastest tenth of the requests sets the unloaded pace


def traffic_rows(run: Run) -> list[TrafficRow]:
    slo = run.info.service_level
    return [
        _row(run, name, cases, slo)
        for name in run.topologies
        for cases in group_by_case(run.select("traffic", name)).values()
        if cases[0].info.case != FIXED_IDLE_CASE
    ]


def kind_of(case: str) -> TrafficKind:
    """What kind of load a traffic case is."""
    if case.startswith(POISSON_CASE):
        return "poisson"
    return "fixed" if case == FIXED_CASE else "trace"


def offered_s(case: Case) -> float:
    """Seconds over which the case's requests were offered."""
    return max((case.info.window_end_ns - case.info.window_start_ns) / 1e9, 1e-9)


def completion_s(case: Case) -> float:
    """Seconds from the window's start to the last answer's end, at least the offered time."""
    ends = [record.end_ns for record in case.measured if record.ok]
    end = max([case.info.window_end_ns, *ends])
    return max((end - case.info.window_start_ns) / 1e9, 1e-9)


def completed_rate(case: Case) -> float:
    return sum(record.ok for record in case.measured) / completion_s(case)


def output_rate(case: Case) -> float:
    """Output tokens/s of complete answers."""
    return sum(r.num_output_tokens for r in case.measured if r.ok) / completion_s(case)


def is_sustained(case: Case) -> bool:
    """Whether the server kept up: nothing was lost and no queue was left to drain at the end."""
    measured = case.measured
    if not measured or not all(record.ok for record in measured):
        return False
    paces = sorted(record.tpot_ms or 0.0 for record in measured)
    pace_ms = paces[int(UNLOADED_SHARE * (len(paces) - 1))]
    longest_s = pace_ms * max(record.num_output_tokens for record in measured) / 1e3
    allowed_s = offered_s(case) / SUSTAINED_SHARE + longest_s + DRAIN_S
    return completion_s(case) <= allowed_s


def _row(run: Run, name: str, cases: Sequence[Case], slo: Slo) -> TrafficRow:
    info = cases[0].info
    records = [record for case in cases for record in case.measured]
    ttfts, itls = by_repeat(cases, ttft), itls_by_repeat(cases)
    good = [sum(slo.met_by(record) for record in case.measured) for case in cases]
    gpus = run.topologies[name].launch.num_gpus
    rates = [count / offered_s(case) / gpus for count, case in zip(good, cases, strict=True)]
    return TrafficRow(
        topology=name,
        case=info.case,
        kind=kind_of(info.case),
        workload=str(info.parameters.get("workload", info.case)),
        rate=info.rate,
        rate_fraction=info.parameters.get("rate_fraction"),
        num_requests=len(records),
        num_failed=sum(record.status == "failed" for record in records),
        ttft=percentile_estimate(ttfts),
        ttft_p90=percentile_estimate(ttfts, 90),
        ttft_p99=percentile_estimate(ttfts, 99),
        itl=percentile_estimate(itls),
        itl_p99=percentile_estimate(itls, 99),
        tpot=percentile_estimate(by_repeat(cases, tpot)),
        attainment=proportion_estimate(sum(good), len(records)) if records else missing("none"),
        goodput=_goodput(rates, sum(good), len(records)),
        completed_rate=repeats_estimate([completed_rate(case) for case in cases]),
        output_rate=repeats_estimate([output_rate(case) for case in cases]),
        sustained=all(is_sustained(case) for case in cases),
    )


def _goodput(rates: list[float], good: int, offered: int) -> Estimate:
    """Requests/s a GPU; its interval across repeats, else that of the attainment, scaled."""
    estimate = repeats_estimate(rates)
    if estimate.lo is None and good and estimate.value is not None:
        share = proportion_estimate(good, offered)
        assert share.value and share.lo is not None and share.hi is not None
        estimate.lo = estimate.value * share.lo / share.value
        estimate.hi = estimate.value * share.hi / share.value
        estimate.method = "Wilson, of the attainment"
    return estimate
