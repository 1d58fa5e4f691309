"""What every page's sections are made of beside tables; the classes are `report/style.py`'s."""

from __future__ import annotations

from pdrelay.lab.html import Markup, el


def note(text: str) -> Markup:
    """A remark under a heading."""
    return el("p", text, class_="note")


def empty(text: str) -> Markup:
    """A sentence in place of a figure that there is none of."""
    return el("p", text, class_="empty")


def plot_row(*figures: Markup) -> Markup:
    """Plots side by side where the page is wide enough."""
    return el("div", *figures, class_="plots")
