"""The summary as terminal tables: the same figures as in the HTML."""

from __future__ import annotations

import io

from rich.console import Console
from rich.table import Table

from pdrelay.lab import fmt
from pdrelay.lab.report import columns
from pdrelay.lab.report.figures import Summary
from pdrelay.lab.table import add_row, make_table, terminal_table

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
    for table in summary_tables(summary):
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


def summary_tables(summary: Summary) -> tuple[Table, ...]:
    return (
        _ttft(summary),
        terminal_table("2 traffic", columns.traffic(summary, summary.traffic)),
        terminal_table("2 traffic, one size: TTFT beside a queue's, ms", columns.queues(summary)),
        terminal_table("3 interference: ITL of running streams, ms", columns.interference(summary)),
        terminal_table("4 shapes", columns.shapes(summary)),
        terminal_table("4 shapes, many streams at once", columns.streams(summary)),
        terminal_table(
            "GPUs: means over an experiment (while the instance works)", columns.gpus(summary)
        ),
    )


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
