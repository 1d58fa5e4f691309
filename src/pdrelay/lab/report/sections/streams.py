"""Draws the ITL of many streams at once."""

from __future__ import annotations

from pdrelay.lab.html import Markup
from pdrelay.lab.report import columns
from pdrelay.lab.report.figures import FULL_SHARE, Summary
from pdrelay.lab.table import page_table


def streams_table(summary: Summary) -> Markup:
    """One row a topology and number of streams; nothing where none was measured."""
    return page_table(
        columns.streams(summary),
        caption="Streams sent together. ITL and tokens/s only where at least "
        f"{FULL_SHARE:.0%} of them decode; TTFT holds the queue of the others' prefills.",
    )
