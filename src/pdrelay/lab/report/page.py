"""The report as one offline HTML file."""

from __future__ import annotations

from collections.abc import Callable

from pdrelay.lab.html import Markup
from pdrelay.lab.report.document import document
from pdrelay.lab.report.figures import Summary
from pdrelay.lab.report.sections.environment import commands_section, environment_section
from pdrelay.lab.report.sections.gpus import gpu_section
from pdrelay.lab.report.sections.interference import interference_section
from pdrelay.lab.report.sections.methodology import methodology_section
from pdrelay.lab.report.sections.phases import phases_section
from pdrelay.lab.report.sections.shapes import shapes_section
from pdrelay.lab.report.sections.timelines import timelines_section
from pdrelay.lab.report.sections.traffic import traffic_section
from pdrelay.lab.report.sections.transfers import transfers_section
from pdrelay.lab.report.sections.ttft import ttft_section
from pdrelay.lab.report.sections.validity import validity_section
from pdrelay.lab.report.sections.verdict import verdict_section

_SECTIONS: tuple[tuple[str, str, Callable[[Summary], Markup]], ...] = (
    ("ttft", "Experiment 1: TTFT against input length", ttft_section),
    ("traffic", "Experiment 2: traffic up to saturation", traffic_section),
    (
        "interference",
        "Experiment 3: long prompts over running streams",
        interference_section,
    ),
    ("shapes", "Experiment 4: three shapes side by side", shapes_section),
    ("phases", "Where TTFT goes", phases_section),
    ("transfers", "KV transfers", transfers_section),
    ("gpus", "GPUs", gpu_section),
    ("timelines", "One request in each topology", timelines_section),
    ("validity", "Validity", validity_section),
    ("methodology", "Method", methodology_section),
    ("environment", "Environment", environment_section),
    ("commands", "Commands", commands_section),
)


def render(summary: Summary) -> str:
    """A complete HTML document; also well-formed XML."""
    run = summary.run
    labels = ", ".join(topology.label for topology in summary.topologies)
    kind = "quick run" if run.quick else "full run"
    return document(
        f"pdrelay lab: {run.model}",
        f"{labels} · {kind} · {run.started}",
        verdict_section(summary),
        [(anchor, name, draw(summary)) for anchor, name, draw in _SECTIONS],
    )
