"""Draws the ITL of many streams at once."""

from __future__ import annotations

from pdrelay.lab import fmt
from pdrelay.lab.html import Markup, table
from pdrelay.lab.report.figures import FULL_SHARE, Summary


def streams_table(summary: Summary) -> Markup:
    """One row a topology and number of streams; nothing where none was measured."""
    if not summary.streams:
        return Markup("")
    rows = [
        [
            summary.label(row.topology),
            row.num_streams,
            f"{row.input_len:,}/{row.output_len:,}",
            row.itl.n,
            fmt.estimate(row.itl),
            fmt.estimate(row.itl_p99) if row.itl_p99.known else row.itl_p99.note,
            fmt.estimate(row.hand_over),
            fmt.estimate(row.output_rate),
            fmt.estimate(row.ttft),
        ]
        for row in summary.streams
    ]
    head = ["topology", "streams", "in/out", "gaps", "ITL p50, ms", "p99", "hand-over, ms", "tok/s"]
    head.append("TTFT p50, ms")
    return table(
        head,
        rows,
        caption="Streams sent together. ITL and tokens/s only where at least "
        f"{FULL_SHARE:.0%} of them decode; TTFT holds the queue of the others' prefills.",
    )
