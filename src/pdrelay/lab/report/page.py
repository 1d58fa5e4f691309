"""The report as one offline HTML file."""

from __future__ import annotations

from collections.abc import Callable

from pdrelay.lab.html import Markup
from pdrelay.lab.report import sections
from pdrelay.lab.report.document import document
from pdrelay.lab.report.figures import Summary
from pdrelay.lab.report.gpu_section import gpu_section

_SECTIONS: tuple[tuple[str, str, Callable[[Summary], Markup]], ...] = (
    ("ttft", "Experiment 1: TTFT against input length", sections.ttft_section),
    ("traffic", "Experiment 2: traffic up to saturation", sections.traffic_section),
    (
        "interference",
        "Experiment 3: long prompts over running streams",
        sections.interference_section,
    ),
    ("shapes", "Experiment 4: three shapes side by side", sections.shapes_section),
    ("phases", "Where TTFT goes", sections.phases_section),
    ("transfers", "KV transfers", sections.transfers_section),
    ("gpus", "GPUs", gpu_section),
    ("timelines", "One request in each topology", sections.timelines_section),
    ("validity", "Validity", sections.validity_section),
    ("methodology", "Method", sections.methodology_section),
    ("environment", "Environment", sections.environment_section),
    ("commands", "Commands", sections.commands_section),
)


def render(summary: Summary) -> str:
    """A complete HTML document; also well-formed XML."""
    run = summary.run
    labels = ", ".join(topology.label for topology in summary.topologies)
    kind = "quick run" if run.quick else "full run"
    return document(
        f"pdrelay lab: {run.model}",
        f"{labels} · {kind} · {run.started}",
        sections.verdict_section(summary),
        [(anchor, name, draw(summary)) for anchor, name, draw in _SECTIONS],
    )
