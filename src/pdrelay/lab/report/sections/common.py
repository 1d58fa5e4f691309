"""What sections share."""

from __future__ import annotations

from pdrelay.lab import fmt
from pdrelay.lab.blocks import empty
from pdrelay.lab.html import Markup
from pdrelay.lab.report.figures import Summary

EXPERIMENT_TITLES = {
    "ttft": "1 TTFT",
    "traffic": "2 traffic",
    "interference": "3 interference",
    "shapes": "4 shapes",
}


def colours(summary: Summary) -> dict[str, int]:
    """Colour index of each topology."""
    return {topology.name: index for index, topology in enumerate(summary.topologies)}


def unmeasured(what: str) -> Markup:
    return empty(f"{what} was not measured in this run.")


def slo_text(summary: Summary) -> str:
    slo = summary.run.service_level
    limits = (("TTFT", slo.ttft_ms), ("TPOT", slo.tpot_ms), ("end to end", slo.e2el_ms))
    return " and ".join(f"{name} ≤ {fmt.number(ms)} ms" for name, ms in limits if ms is not None)
