"""How it was measured."""

from __future__ import annotations

from pdrelay.lab.html import Markup, el, join, table
from pdrelay.lab.report.figures import Summary
from pdrelay.lab.report.methodology import HANDOUT, METHODS


def methodology_section(summary: Summary) -> Markup:
    items = (el("li", text) for text in METHODS)
    rows = (list(pair) for pair in HANDOUT)
    return join(
        [
            el("ul", *items),
            el("h3", "What the exercise this lab grew from gets wrong"),
            table(["the exercise", "in fact, and here"], rows, text_columns=2),
        ]
    )
