"""The report as one offline HTML file."""

from __future__ import annotations

from collections.abc import Callable

from pdrelay.lab.html import Markup, el
from pdrelay.lab.report import sections
from pdrelay.lab.report.figures import Summary
from pdrelay.lab.report.style import CSS

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
    ("timelines", "One request in each topology", sections.timelines_section),
    ("validity", "Validity", sections.validity_section),
    ("methodology", "Method", sections.methodology_section),
    ("environment", "Environment", sections.environment_section),
    ("commands", "Commands", sections.commands_section),
)


def render(summary: Summary) -> str:
    """A complete HTML document; also well-formed XML."""
    run = summary.run
    title = f"pdrelay lab: {run.model}"
    labels = ", ".join(topology.label for topology in summary.topologies)
    kind = "quick run" if run.quick else "full run"
    links = (el("a", name.split(": ")[-1], href=f"#{anchor}") for anchor, name, _ in _SECTIONS)
    body = (
        el("section", el("h2", name), draw(summary), id=anchor) for anchor, name, draw in _SECTIONS
    )
    document = el(
        "html",
        el(
            "head",
            el("meta", charset="utf-8"),
            el("meta", name="viewport", content="width=device-width, initial-scale=1"),
            el("title", title),
            el("style", Markup(CSS)),
        ),
        el(
            "body",
            el(
                "main",
                el("h1", title),
                el("p", f"{labels} · {kind} · {run.started}", class_="sub"),
                el("nav", *links),
                sections.verdict_section(summary),
                *body,
            ),
        ),
        lang="en",
    )
    return f"<!DOCTYPE html>\n{document}\n"
