"""The page of `pdrelay kv` as one offline HTML file."""

from __future__ import annotations

from collections.abc import Callable

from pdrelay.lab.html import Markup
from pdrelay.lab.kv import sections
from pdrelay.lab.kv.figures import KvSummary
from pdrelay.lab.report.document import document

_SECTIONS: tuple[tuple[str, str, Callable[[KvSummary], Markup]], ...] = (
    ("transfers", "Measured transfers", sections.transfers_section),
    ("side-by-side", "Prefill slowed by the hand-over", sections.side_by_side_section),
    ("servers", "Inside real servers", sections.serve_section),
    ("prediction", "Predicted crossover", sections.prediction_section),
    ("exercise", "What the exercise gets wrong", sections.exercise_section),
    ("environment", "Environment", sections.environment_section),
)


def render(summary: KvSummary) -> str:
    """A complete HTML document; also well-formed XML."""
    run = summary.run
    ranks = f"TP={run.tp}, " if run.tp > 1 else ""
    return document(
        f"pdrelay kv: {run.model}",
        f"{ranks}{run.dtype} · {run.device} · {run.started}",
        sections.lead(summary),
        [(anchor, name, draw(summary)) for anchor, name, draw in _SECTIONS],
    )
