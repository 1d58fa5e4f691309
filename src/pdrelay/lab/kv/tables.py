"""The summary of `pdrelay kv` as terminal tables: the same figures as on its page."""

from __future__ import annotations

from rich.console import Console

from pdrelay.lab import fmt
from pdrelay.lab.kv.figures import KvSummary, TransferRow
from pdrelay.lab.kv.sections import span, transports, warnings
from pdrelay.lab.report.tables import add_row, make_table


def print_kv_summary(summary: KvSummary, console: Console) -> None:
    """Bytes, then one table a question."""
    console.print(summary.kv.arithmetic, markup=False, highlight=False)
    if summary.kv.remark:
        console.print(summary.kv.remark, markup=False, highlight=False)
    if summary.transfers:
        _transfers(summary, console)
        _pages(summary, console)
    if summary.side_by_side:
        _side_by_side(summary, console)
    if summary.serve:
        _serve(summary, console)
    _crossovers(summary, console)
    for note in (*warnings(summary), *summary.serve_notes):
        console.print(note, markup=False, highlight=False)


def _transfers(summary: KvSummary, console: Console) -> None:
    """Lengths down, transports across, at the smallest page size."""
    first = summary.transfers[0]
    size = min(row.block_size for row in summary.transfers)
    names = transports(summary)
    table = make_table(
        f"Whole prompt at once: ms [95 % interval], GB/s; pages of {size}, {first.placement}",
        *("tokens", "bytes", "plain copy", *names),
        *(f"{name}, layer-wise: left" for name in names),
    )
    cells = {(row.transport, row.tokens): row for row in _select(summary, size, first.placement)}
    for copy in summary.copies:
        rows = [cells[name, copy.tokens] for name in names if (name, copy.tokens) in cells]
        add_row(
            table,
            fmt.tokens(copy.tokens),
            fmt.num_bytes(copy.num_bytes),
            f"{fmt.estimate(copy.time)}, {fmt.number(copy.gb_per_s.value)}",
            *(f"{fmt.estimate(row.bulk)}, {fmt.number(row.gb_per_s.value)}" for row in rows),
            *(fmt.estimate(row.exposed) for row in rows),
        )
    console.print(table)


def _select(summary: KvSummary, block_size: int, placement: str) -> list[TransferRow]:
    return [
        row
        for row in summary.transfers
        if (row.block_size, row.placement) == (block_size, placement)
    ]


def _pages(summary: KvSummary, console: Console) -> None:
    longest = max(row.tokens for row in summary.transfers)
    table = make_table(
        f"{longest:,} tokens by page size and placement",
        *("transport", "pages", "placement", "pieces", "a piece", "ms", "GB/s"),
        *("of a plain copy", "layer-wise: computation"),
    )
    for row in summary.transfers:
        if row.tokens == longest:
            add_row(
                table,
                row.transport,
                str(row.block_size),
                row.placement,
                fmt.number(row.num_pieces),
                fmt.num_bytes(row.num_bytes / max(row.num_pieces, 1)),
                fmt.estimate(row.bulk),
                fmt.number(row.gb_per_s.value),
                fmt.share(row.copy_share),
                fmt.times(row.slowed),
            )
    console.print(table)


def _side_by_side(summary: KvSummary, console: Console) -> None:
    table = make_table(
        "Prefill slowed by the hand-over: P/D 1:1 and 1 replica side by side, medians, ms",
        *("tokens", "pairs", "prefill P/D", "1 replica", "ratio", "TTFT P/D", "1 replica", "ratio"),
    )
    for row in summary.side_by_side:
        add_row(
            table,
            fmt.tokens(row.tokens),
            str(row.prefill_ratio.n),
            fmt.estimate(row.prefill),
            fmt.estimate(row.prefill_alone),
            fmt.times(row.prefill_ratio),
            fmt.estimate(row.ttft),
            fmt.estimate(row.ttft_alone),
            fmt.times(row.ttft_ratio),
        )
    console.print(table)


def _serve(summary: KvSummary, console: Console) -> None:
    table = make_table(
        "Real servers: P/D 1:1 beside 1 replica, medians, ms",
        *("tokens", "TTFT P/D", "1 replica", "ratio", "prefill P/D", "1 replica", "ratio"),
        *("TTST − TTFT − ITL", "1 replica", "transfer busy", "after prefill"),
    )
    for row in summary.serve:
        add_row(
            table,
            fmt.tokens(row.tokens),
            fmt.estimate(row.ttft),
            fmt.estimate(row.ttft_alone),
            fmt.times(row.ttft_ratio),
            fmt.estimate(row.prefill),
            fmt.estimate(row.prefill_alone),
            fmt.times(row.prefill_ratio),
            fmt.estimate(row.hand_over),
            fmt.estimate(row.hand_over_alone),
            fmt.estimate(row.transfer_busy),
            fmt.estimate(row.transfer_tail),
        )
    console.print(table)


def _crossovers(summary: KvSummary, console: Console) -> None:
    table = make_table(
        "Predicted: where the exposed transfer exceeds prefill",
        *("model", "on", "link", "GB/s", "tokens", "prefill, ms", "at once", "layer-wise: left"),
        *("exceeds at once", "exceeds layer-wise"),
    )
    for row in summary.predictions:
        point = next((p for p in row.points if p.tokens == 8192), row.points[-1])
        add_row(
            table,
            row.model + (f", TP={row.tp}" if row.tp > 1 else ""),
            row.compute,
            row.link,
            fmt.number(row.link_gb_per_s),
            fmt.tokens(point.tokens),
            fmt.number(point.prefill),
            fmt.number(point.bulk),
            fmt.number(point.exposed),
            span(row.bulk_above, row.bulk_below),
            span(row.layerwise_above, row.layerwise_below),
        )
    console.print(table)
    for text in dict.fromkeys(
        text
        for row in summary.predictions
        for text in (f"{row.compute}: {row.compute_source}", f"{row.link}: {row.link_source}")
    ):
        console.print(f"- {text}", markup=False, highlight=False)
