"""Draws the fixed load beside its prediction."""

from __future__ import annotations

from pdrelay.lab import fmt
from pdrelay.lab.html import Markup, table
from pdrelay.lab.report.figures import Percentiles, QueueRow, Summary

HEAD = (
    *("topology", "queue", "service, ms", "utilisation", "idle TTFT p50", "mean wait"),
    *("predicted p50 / p90 / p99", "this run's arrivals", "measured p50", "p90", "p99"),
)


def queue_cells(summary: Summary, row: QueueRow) -> list[str]:
    """One row under HEAD, all in ms."""
    return [
        summary.label(row.topology),
        row.model,
        f"{fmt.number(row.service_ms)} ({row.service_source})",
        f"{row.utilisation:.0%}",
        fmt.estimate(row.idle_ttft),
        "grows" if row.mean_wait_ms is None else fmt.number(row.mean_wait_ms),
        _percentiles(row.steady),
        _percentiles(row.replayed),
        fmt.estimate(row.ttft),
        *(fmt.estimate(each) if each.known else each.note for each in (row.ttft_p90, row.ttft_p99)),
    ]


def _percentiles(found: Percentiles) -> str:
    values = (found.p50, found.p90, found.p99)
    if None in values:
        return fmt.NONE
    return " / ".join(map(fmt.number, values))


def queue_table(summary: Summary) -> Markup:
    """Nothing where no fixed load was measured."""
    if not summary.queues:
        return Markup("")
    first = summary.queues[0]
    return table(
        list(HEAD),
        [queue_cells(summary, row) for row in summary.queues],
        caption=f"TTFT of {first.input_len:,} in / {first.output_len} out at "
        f"{fmt.number(first.rate)} req/s beside a queue in front of the prefill, ms. Service: the "
        "median prefill (or TTFT) of the same length on the idle server. Predicted: idle TTFT plus "
        "the wait in the steady state; “this run's arrivals”: the same queue fed with the "
        "arrivals that were sent. The queue knows prefills only: decode steps between them, "
        "prompts that share a step, and a full KV pool show as the difference.",
        text_columns=2,
    )
