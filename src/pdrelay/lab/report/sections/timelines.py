"""One request in each topology."""

from __future__ import annotations

from pdrelay.lab import lanes, plots
from pdrelay.lab.blocks import note, plot_row
from pdrelay.lab.html import Markup, join
from pdrelay.lab.report.figures import Summary
from pdrelay.lab.report.sections.common import unmeasured


def timelines_section(summary: Summary) -> Markup:
    if not summary.timelines:
        return unmeasured("A request's timeline")
    until = max(timeline.until for timeline in summary.timelines)
    keys = [(f"k-{kind}", words) for kind, words in lanes.KINDS]
    charts = [
        lanes.draw(timeline, summary.label(timeline.topology), until)
        for timeline in summary.timelines
    ]
    return join(
        [
            note(
                "The request of median TTFT among the idle probes nearest to 2,048 tokens, all on "
                "one scale; dots are tokens. trace.json holds every request: open it in Perfetto."
            ),
            plots.legend(keys),
            plot_row(*charts),
        ]
    )
