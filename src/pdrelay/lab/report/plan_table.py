"""A plan as a terminal table."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from pdrelay.lab.plan import PlannedServer
from pdrelay.lab.scale import Scale
from pdrelay.lab.table import add_row, make_table


def print_plan(planned: Sequence[PlannedServer], scale: Scale, console: Console) -> None:
    """Every server start with its cases and estimated seconds, and the whole."""
    table = make_table(f"plan, scale {scale.name}", "server", "case", "what", "about, s")
    for server in planned:
        label = f"{server.topology.label}, repeat {server.rep}"
        add_row(table, label, "", "start, warm up, stop", f"{server.start_s:.0f}")
        for step in server.steps:
            add_row(table, "", step.case, step.name, f"{step.estimate_s:.0f}")
    console.print(table)
    total_s = sum(server.total_s for server in planned)
    words = f"{len(planned)} server starts, about {total_s:.0f} s by the scale's own estimates"
    if scale.budget_s is not None:
        words += f"; what would pass {scale.budget_s:g} s is left out"
    console.print(words, markup=False, highlight=False)
