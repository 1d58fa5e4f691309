"""The verdict, in words."""

from __future__ import annotations

from pdrelay.lab.blocks import note
from pdrelay.lab.html import Markup, el
from pdrelay.lab.report.figures import Summary
from pdrelay.lab.report.sections.common import slo_text


def verdict_section(summary: Summary) -> Markup:
    verdict = summary.verdict
    items = (el("li", sentence.text, class_=sentence.tone) for sentence in verdict.sentences)
    return el(
        "section",
        el("p", verdict.headline, class_="headline"),
        el("ul", *items),
        note(
            "Each sentence follows from the tables below by the rules in pdrelay/lab/verdict.py. "
            "Brackets are 95 % intervals. Service level: " + slo_text(summary) + "."
        ),
        class_=f"verdict {verdict.decision}",
        id="verdict",
    )
