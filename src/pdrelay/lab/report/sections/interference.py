"""Experiment 3: long prompts over running streams."""

from __future__ import annotations

from pdrelay.lab import plots
from pdrelay.lab.blocks import note, plot_row
from pdrelay.lab.html import Markup, join
from pdrelay.lab.report import columns
from pdrelay.lab.report.figures import (
    STALL,
    Distribution,
    InterferenceRow,
    Summary,
)
from pdrelay.lab.report.sections.common import colours, unmeasured
from pdrelay.lab.stats import Estimate
from pdrelay.lab.table import page_table


def interference_section(summary: Summary) -> Markup:
    if not summary.interference:
        return unmeasured("Interference")
    colour_of = colours(summary)
    curves = []
    for row in summary.interference:
        label, colour = summary.label(row.topology), colour_of[row.topology]
        curves.append(plots.Curve(f"{label} quiet", colour, row.quiet.cdf, dashed=True))
        curves.append(plots.Curve(f"{label} busy", colour, row.busy.cdf))
    worst = [
        plots.Group(
            words,
            [
                (colour_of[row.topology], summary.label(row.topology), _plain(pick(row).worst))
                for row in summary.interference
            ],
        )
        for words, pick in (("quiet", _quiet), ("busy", _busy))
    ]
    first = summary.interference[0]
    return join(
        [
            note(
                f"{first.num_streams} streams decode; after a quiet time {first.num_long} prompts "
                f"of {first.long_input_len:,} tokens arrive at fixed times. Busy gaps overlap the "
                "time from a long prompt's sending to its last token; quiet ones lie before and "
                "between, so that both meet the same context lengths; the period is everything "
                "from the first long prompt to the last one's last token."
            ),
            plot_row(
                plots.cdf_chart("ITL while quiet and busy", curves, x_label="ITL, ms (log)"),
                plots.bar_chart("Worst gap, ms (log)", worst, y_label="ms (log)", log_y=True),
            ),
            _interference_table(summary),
        ]
    )


def _quiet(row: InterferenceRow) -> Distribution:
    return row.quiet


def _busy(row: InterferenceRow) -> Distribution:
    return row.busy


def _plain(value: float | None) -> Estimate:
    return Estimate(value=value)


def _interference_table(summary: Summary) -> Markup:
    return page_table(
        columns.interference(summary),
        caption="ITL of the running streams, ms. “≥”: too few busy gaps for a p99, so the highest "
        "percentile that the sample allows stands in for it from below. Stalled: share of the "
        f"streams' busy time in gaps over {STALL:g}× the quiet median, which a percentile of gaps "
        "misses where some streams stall and others go on.",
    )
