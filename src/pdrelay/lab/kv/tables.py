"""The summary of `pdrelay kv` as terminal tables: the same figures as on its page."""

from __future__ import annotations

from rich.console import Console

from pdrelay.lab import fmt
from pdrelay.lab.kv.columns import SERVE, SIDE_BY_SIDE, TRANSFERS
from pdrelay.lab.kv.figures import KvSummary, TransferRow
from pdrelay.lab.kv.sections import model_name, sources, span, transports, warnings
from pdrelay.lab.table import Table, add_row, make_table, terminal_table


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
    rows = [row for row in summary.transfers if row.tokens == longest]
    title = f"{longest:,} tokens by page size and placement"
    console.print(terminal_table(title, Table(TRANSFERS, rows)))


def _side_by_side(summary: KvSummary, console: Console) -> None:
    title = "Prefill slowed by the hand-over: P/D 1:1 and 1 replica side by side, medians"
    console.print(terminal_table(title, Table(SIDE_BY_SIDE, summary.side_by_side)))


def _serve(summary: KvSummary, console: Console) -> None:
    title = "Real servers: P/D 1:1 beside 1 replica, medians"
    console.print(terminal_table(title, Table(SERVE, summary.serve)))


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
            model_name(row),
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
    for text in sources(summary):
        console.print(f"- {text}", markup=False, highlight=False)
