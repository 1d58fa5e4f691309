"""Experiment 4: three shapes side by side, and many equal streams."""

from __future__ import annotations

from collections.abc import Callable

from pdrelay.lab import plots
from pdrelay.lab.blocks import plot_row
from pdrelay.lab.html import Markup, join
from pdrelay.lab.report import columns
from pdrelay.lab.report.figures import Summary
from pdrelay.lab.report.sections.common import colours, unmeasured
from pdrelay.lab.report.sections.streams import streams_table
from pdrelay.lab.stats import Estimate
from pdrelay.lab.table import page_table


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
    return join([plot_row(*charts), page_table(columns.shapes(summary)), streams_table(summary)])
