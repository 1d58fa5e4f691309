"""Draws the fixed load beside its prediction."""

from __future__ import annotations

from pdrelay.lab import fmt
from pdrelay.lab.html import Markup
from pdrelay.lab.report import columns
from pdrelay.lab.report.figures import Summary
from pdrelay.lab.table import page_table


def queue_table(summary: Summary) -> Markup:
    """Nothing where no fixed load was measured."""
    if not summary.queues:
        return Markup("")
    first = summary.queues[0]
    return page_table(
        columns.queues(summary),
        caption=f"TTFT of {first.input_len:,} in / {first.output_len} out at "
        f"{fmt.number(first.rate)} req/s beside a queue in front of the prefill, ms. Service: the "
        "median prefill (or TTFT) of the same length on the idle server. Predicted: idle TTFT plus "
        "the wait in the steady state; “this run's arrivals”: the same queue fed with the "
        "arrivals that were sent. The queue knows prefills only: decode steps between them, "
        "prompts that share a step, and a full KV pool show as the difference.",
    )
