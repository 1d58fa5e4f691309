"""Where TTFT goes."""

from __future__ import annotations

from pdrelay.lab import fmt, plots
from pdrelay.lab.blocks import note, plot_row
from pdrelay.lab.html import Markup, join, table
from pdrelay.lab.report.figures import Summary
from pdrelay.lab.report.sections.common import unmeasured

_PHASES = (
    ("k-route", "send, tokenize, route"),
    ("k-wait", "wait for prefill"),
    ("k-prefill", "prefill"),
    ("k-transfer", "transfer, exposed"),
    ("k-return", "first token's return"),
)


def phases_section(summary: Summary) -> Markup:
    if not summary.phases:
        return unmeasured("TTFT by phase")
    charts = []
    keys = sorted(
        {(row.condition != "idle", row.condition, row.input_len) for row in summary.phases}
    )
    for _, condition, length in keys:
        stacks = [
            plots.Stack(
                summary.label(row.topology),
                list(
                    zip(
                        (css for css, _ in _PHASES),
                        (row.route, row.wait, row.prefill, row.transfer, row.return_),
                        strict=True,
                    )
                ),
                f"{fmt.number(row.total)} ms",
            )
            for row in summary.phases
            if row.condition == condition and row.input_len == length
        ]
        title = f"{length:,} tokens, {condition} server: mean TTFT by phase"
        charts.append(plots.stack_chart(title, _PHASES, stacks))
    rows = [
        [
            summary.label(row.topology),
            row.condition,
            fmt.tokens(row.input_len),
            row.n,
            *map(fmt.number, (row.route, row.wait, row.prefill, row.transfer, row.return_)),
            fmt.number(row.total),
            fmt.number(row.hidden_transfer),
        ]
        for row in summary.phases
    ]
    head = ["topology", "server", "input tokens", "n", "send to routed", "wait", "prefill"]
    head += ["transfer, exposed", "return", "TTFT, mean", "transfer after prefill, hidden"]
    return join(
        [
            note(
                "Means, so that the phases add up to the mean TTFT. A hand-over delays TTFT only "
                "where the decode side makes the first token; here the prefill side sends it, so "
                "what is still to move then shows in the last column and in the second token."
            ),
            plot_row(*charts),
            table(head, rows, caption="All in ms.", text_columns=2),
        ]
    )
