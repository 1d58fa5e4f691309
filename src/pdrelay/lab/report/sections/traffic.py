"""Experiment 2: traffic up to saturation, traces, requests of one size."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pdrelay.lab import fmt, plots
from pdrelay.lab.blocks import note, plot_row
from pdrelay.lab.html import Markup, join
from pdrelay.lab.report import columns
from pdrelay.lab.report.figures import (
    Summary,
    TrafficKind,
    TrafficRow,
)
from pdrelay.lab.report.sections.common import colours, slo_text, unmeasured
from pdrelay.lab.report.sections.queue import queue_table
from pdrelay.lab.stats import Estimate
from pdrelay.lab.table import page_table


def traffic_section(summary: Summary) -> Markup:
    if not summary.traffic:
        return unmeasured("Traffic")
    rated = [row for row in summary.traffic if row.kind == "poisson"]
    charts = [
        _rate_chart(summary, rated, "TTFT p50, ms (log)", lambda row: row.ttft, log_y=True),
        _rate_chart(summary, rated, "ITL p50 (solid) and p99 (dashed), ms (log)", None, log_y=True),
        _rate_chart(
            summary, rated, f"Goodput, good req/s a {summary.unit}", lambda row: row.goodput
        ),
        _rate_chart(
            summary, rated, "Requests within the service level", lambda row: row.attainment, top=1.0
        ),
    ]
    capacity = summary.run.capacity_rps
    basis = (
        f"Rates are shares of {fmt.number(capacity)} req/s, which "
        f"{summary.label(summary.run.baseline)} completed in a closed loop with the same lengths. "
        if capacity
        else ""
    )
    return join(
        [
            note(f"{basis}Service level: {slo_text(summary)}."),
            plot_row(*charts) if rated else "",
            _traffic_table(summary, rated, "Poisson arrivals, chat-like lengths"),
            *(
                _traffic_table(summary, rows, f"Trace: {workload}")
                for workload, rows in _by_workload(summary, "trace").items()
            ),
            *(
                _traffic_table(summary, rows, f"Requests of one size: {workload}")
                for workload, rows in _by_workload(summary, "fixed").items()
            ),
            queue_table(summary),
        ]
    )


def _by_workload(summary: Summary, kind: TrafficKind) -> dict[str, list[TrafficRow]]:
    groups: dict[str, list[TrafficRow]] = {}
    for row in summary.traffic:
        if row.kind == kind:
            groups.setdefault(row.workload, []).append(row)
    return groups


def _rate_chart(
    summary: Summary,
    rows: list[TrafficRow],
    title: str,
    pick: Callable[[TrafficRow], Estimate] | None,
    *,
    log_y: bool = False,
    top: float | None = None,
) -> Markup:
    series = []
    for name, colour in colours(summary).items():
        own = sorted((r for r in rows if r.topology == name), key=lambda row: row.rate or 0.0)
        label = summary.label(name)
        if pick is not None:
            points = [plots.Point(row.rate or 0.0, pick(row)) for row in own]
            series.append(plots.Series(label, colour, points))
            continue
        p50 = [plots.Point(row.rate or 0.0, row.itl) for row in own]
        p99 = [plots.Point(row.rate or 0.0, row.itl_p99) for row in own if row.itl_p99.known]
        series.append(plots.Series(label, colour, p50))
        if p99:
            series.append(plots.Series(f"{label} p99", colour, p99, dashed=True))
    return plots.line_chart(
        title, series, x_label="offered, req/s", y_label=title, log_y=log_y, y_max=top
    )


def _traffic_table(summary: Summary, rows: Sequence[TrafficRow], caption: str) -> Markup:
    return page_table(columns.traffic(summary, rows), caption)
