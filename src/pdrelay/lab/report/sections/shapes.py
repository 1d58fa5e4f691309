"""Experiment 4: three shapes side by side, and many equal streams."""

from __future__ import annotations

from collections.abc import Callable

from pdrelay.lab import fmt, plots
from pdrelay.lab.blocks import plot_row
from pdrelay.lab.html import Markup, join, table
from pdrelay.lab.report.figures import Summary
from pdrelay.lab.report.sections.common import colours, unmeasured
from pdrelay.lab.report.sections.streams import streams_table
from pdrelay.lab.stats import Estimate


def shapes_section(summary: Summary) -> Markup:
    if not summary.shapes and not summary.streams:
        return unmeasured("The three shapes")
    picks: tuple[tuple[str, Callable[..., Estimate]], ...] = (
        ("TTFT p50, ms (log)", lambda row: row.ttft),
        ("ITL p50, ms", lambda row: row.itl),
        ("End to end p50, ms (log)", lambda row: row.e2e),
    )
    cases = list(dict.fromkeys(row.case for row in summary.shapes))
    colour_of = colours(summary)
    charts = [
        plots.bar_chart(
            title,
            [
                plots.Group(
                    case,
                    [
                        (colour_of[r.topology], summary.label(r.topology), pick(r))
                        for r in summary.shapes
                        if r.case == case
                    ],
                )
                for case in cases
            ],
            y_label="ms",
            log_y="log" in title,
        )
        for title, pick in picks
    ]
    rows = [
        [
            f"{row.case} ({row.input_len:,}/{row.output_len:,})",
            summary.label(row.topology),
            row.ttft.n,
            fmt.number(row.rate),
            fmt.estimate(row.ttft),
            fmt.estimate(row.itl),
            fmt.estimate(row.e2e),
            fmt.estimate(row.output_rate),
        ]
        for case in cases
        for row in summary.shapes
        if row.case == case
    ]
    head = [
        "shape (in/out)",
        "topology",
        "n",
        "req/s",
        "TTFT p50, ms",
        "ITL p50",
        "E2E p50",
        "tok/s",
    ]
    return join([plot_row(*charts), table(head, rows, text_columns=2), streams_table(summary)])
