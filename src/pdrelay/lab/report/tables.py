"""The summary as terminal tables: the same figures as in the HTML."""

from __future__ import annotations

import io

from rich.console import Console
from rich.table import Table

from pdrelay.lab import fmt
from pdrelay.lab.report.figures import Summary
from pdrelay.lab.report.sections.queue import HEAD, queue_cells
from pdrelay.lab.table import add_row, make_table

FILE_WIDTH = 160  # columns, where the output is no terminal
_WIDEST = 1000  # of a file with the tables: no cell of it is folded


def console() -> Console:
    """Standard output; wide where it is no terminal."""
    plain = Console()
    return plain if plain.is_terminal else Console(width=FILE_WIDTH)


def summary_text(summary: Summary) -> str:
    """What `print_summary` prints, in plain text and as wide as it comes."""
    out = io.StringIO()
    print_summary(summary, Console(file=out, width=_WIDEST, color_system=None))
    lines = (line.rstrip() for line in out.getvalue().splitlines())
    return "\n".join(lines) + "\n"


def print_summary(summary: Summary, console: Console) -> None:
    """Verdict and one table an experiment."""
    makers = (_ttft, _traffic, _queues, _interference, _shapes, _streams, _gpus)
    for table in (make(summary) for make in makers):
        if table.row_count:
            console.print(table)
    errors = [flag for flag in summary.flags if flag.severity == "error"]
    warnings = len(summary.flags) - len(errors)
    console.print(f"{summary.num_cases} cases, {len(errors)} errors, {warnings} warnings")
    for flag in errors:
        where = f"{summary.label(flag.topology)}, {flag.experiment} {flag.case}"
        console.print(f"  {where}: {flag.message}", markup=False, highlight=False)
    console.print(f"\n{summary.verdict.headline}", markup=False, highlight=False)
    for sentence in summary.verdict.sentences:
        console.print(f"- {sentence.text}", markup=False, highlight=False)


def _ttft(summary: Summary) -> Table:
    """Input lengths down, topologies across."""
    names = [topology.name for topology in summary.topologies]
    table = make_table("1 TTFT p50, ms [95 % interval]", "input", *map(summary.label, names))
    cells = {(r.condition, r.input_len, r.topology): r.ttft for r in summary.ttft}
    for condition, length in dict.fromkeys(
        sorted(
            ((r.condition, r.input_len) for r in summary.ttft), key=lambda k: (k[0] != "idle", k)
        )
    ):
        figures = (cells.get((condition, length, name)) for name in names)
        texts = (fmt.NONE if figure is None else fmt.estimate(figure) for figure in figures)
        add_row(table, f"{length:,} {condition}", *texts)
    return table


def _traffic(summary: Summary) -> Table:
    table = make_table(
        "2 traffic",
        "topology",
        "case",
        "req/s",
        "TTFT p50, ms",
        "TTFT p99",
        "ITL p50",
        "ITL p99",
        "within SLO",
        "goodput/GPU",
        "sustained",
    )
    for row in summary.traffic:
        cells = (
            summary.label(row.topology),
            row.case,
            fmt.number(row.rate),
            fmt.estimate(row.ttft),
            fmt.number(row.ttft_p99.value) if row.ttft_p99.known else row.ttft_p99.note,
            fmt.number(row.itl.value) if row.itl.known else row.itl.note,
            fmt.number(row.itl_p99.value) if row.itl_p99.known else row.itl_p99.note,
            fmt.share(row.attainment),
            fmt.estimate(row.goodput),
            "yes" if row.sustained else "no",
        )
        add_row(table, *cells)
    return table


def _queues(summary: Summary) -> Table:
    table = make_table("2 traffic, one size: TTFT beside a queue's, ms", *HEAD)
    for row in summary.queues:
        add_row(table, *queue_cells(summary, row))
    return table


def _interference(summary: Summary) -> Table:
    table = make_table(
        "3 interference: ITL of running streams, ms",
        "topology",
        "quiet p50",
        "busy p50",
        "busy p99",
        "worst gap",
        "busy p99 / quiet p50",
        "stalled time",
        "long TTFT p50",
    )
    for row in summary.interference:
        least = "" if row.factor_percentile in (99.0, None) else "≥ "
        cells = (
            summary.label(row.topology),
            fmt.estimate(row.quiet.p50),
            fmt.estimate(row.busy.p50),
            fmt.estimate(row.busy.p99) if row.busy.p99.known else row.busy.p99.note,
            fmt.number(row.busy.worst),
            f"{least}{fmt.number(row.factor)}×" if row.factor else fmt.NONE,
            fmt.share(row.stalled),
            fmt.estimate(row.long_ttft),
        )
        add_row(table, *cells)
    return table


def _shapes(summary: Summary) -> Table:
    table = make_table(
        "4 shapes", "shape", "topology", "TTFT p50, ms", "ITL p50", "E2E p50", "tok/s"
    )
    for case in dict.fromkeys(row.case for row in summary.shapes):
        for row in (row for row in summary.shapes if row.case == case):
            cells = (
                f"{case} {row.input_len}/{row.output_len}",
                summary.label(row.topology),
                fmt.estimate(row.ttft),
                fmt.estimate(row.itl),
                fmt.estimate(row.e2e),
                fmt.estimate(row.output_rate),
            )
            add_row(table, *cells)
    return table


def _streams(summary: Summary) -> Table:
    table = make_table(
        "4 shapes, many streams at once",
        *("topology", "streams", "in/out", "ITL p50, ms", "ITL p99", "hand-over", "tok/s"),
    )
    for row in summary.streams:
        cells = (
            summary.label(row.topology),
            str(row.num_streams),
            f"{row.input_len}/{row.output_len}",
            fmt.estimate(row.itl),
            fmt.number(row.itl_p99.value) if row.itl_p99.known else row.itl_p99.note,
            fmt.estimate(row.hand_over),
            fmt.estimate(row.output_rate),
        )
        add_row(table, *cells)
    return table


def _gpus(summary: Summary) -> Table:
    table = make_table(
        "GPUs: means over an experiment (while the instance works)",
        *("topology", "experiment", "instance", "SMs busy", "tensor cores", "DRAM, TB/s"),
        *("of peak", "NVLink out / in, GB/s", "memory, GB"),
    )
    for row in summary.gpu.rows:
        add_row(
            table,
            summary.label(row.topology),
            row.experiment,
            row.instance,
            f"{fmt.percent(row.sm)} ({fmt.percent(row.working_sm)})",
            fmt.percent(row.tensor),
            f"{fmt.number(row.dram_tb_per_s)} ({fmt.number(row.working_dram_tb_per_s)})",
            fmt.percent(row.dram),
            f"{fmt.number(row.nvlink_tx_gb_per_s)} / {fmt.number(row.nvlink_rx_gb_per_s)}",
            fmt.number(row.memory_gb),
        )
    return table
