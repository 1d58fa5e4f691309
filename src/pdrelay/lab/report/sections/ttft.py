"""Experiment 1: TTFT against input length."""

from __future__ import annotations

from pdrelay.lab import fmt, plots
from pdrelay.lab.blocks import note, plot_row
from pdrelay.lab.html import Markup, join, table
from pdrelay.lab.report.figures import (
    Summary,
    TtftRow,
)
from pdrelay.lab.report.sections.common import colours, unmeasured


def ttft_section(summary: Summary) -> Markup:
    if not summary.ttft:
        return unmeasured("TTFT against input length")
    body: list[Markup] = []
    titles = {"idle": "on an idle server", "busy": "while other streams decode"}
    for condition, words in titles.items():
        rows = [row for row in summary.ttft if row.condition == condition]
        if rows:
            series = _ttft_series(summary, rows)
            body.append(
                plots.line_chart(
                    f"TTFT p50 {words}, ms",
                    series,
                    x_label="input tokens (log)",
                    y_label="TTFT, ms (log)",
                    log_x=True,
                    log_y=True,
                )
            )
    return join(
        [
            plot_row(*body),
            note(
                "Bars are 95 % intervals. Hollow dots are single requests, where too few were "
                "sent for a median."
            ),
            *(_ttft_table(summary, c, w) for c, w in titles.items()),
            _ratio_table(summary),
        ]
    )


def _ttft_series(summary: Summary, rows: list[TtftRow]) -> list[plots.Series]:
    return [
        plots.Series(
            summary.label(name),
            colour,
            [plots.Point(r.input_len, r.ttft, r.samples) for r in rows if r.topology == name],
        )
        for name, colour in colours(summary).items()
    ]


def _ttft_table(summary: Summary, condition: str, words: str) -> Markup:
    rows = [row for row in summary.ttft if row.condition == condition]
    if not rows:
        return Markup("")
    return table(
        ["topology", "input tokens", "n", "TTFT p50, ms", "p90", "TTST p50", "hand-over, ms"],
        [
            [
                summary.label(row.topology),
                fmt.tokens(row.input_len),
                row.ttft.n,
                fmt.estimate(row.ttft),
                fmt.known(row.ttft_p90),
                fmt.estimate(row.ttst),
                fmt.estimate(row.hand_over),
            ]
            for row in rows
        ],
        caption=f"TTFT {words}. Hand-over: first gap less the request's median later gap, the "
        "second token's delay as the client sees it.",
    )


def _ratio_table(summary: Summary) -> Markup:
    if not summary.ratios:
        return Markup("")
    rows = [
        [
            f"{summary.label(row.topology)} / {summary.label(row.versus)}",
            row.case,
            fmt.tokens(row.input_len or 0),
            fmt.times(row.ratio),
        ]
        for row in summary.ratios
    ]
    methods = sorted({row.ratio.method for row in summary.ratios if row.ratio.method})
    return table(
        ["ratio of", "server", "input tokens", "TTFT p50 ratio"],
        rows,
        caption=f"P/D against the others ({'; '.join(methods) or 'too few samples'}).",
        text_columns=2,
    )
