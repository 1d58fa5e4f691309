"""The frame of an offline HTML page: one file, no scripts, nothing fetched."""

from __future__ import annotations

from collections.abc import Sequence

from pdrelay.lab.html import Markup, el
from pdrelay.lab.report.style import CSS


def document(
    title: str, subtitle: str, lead: Markup, sections: Sequence[tuple[str, str, Markup]]
) -> str:
    """A complete HTML document, also well-formed XML. Sections are (anchor, heading, body)."""
    links = (el("a", name.split(": ")[-1], href=f"#{anchor}") for anchor, name, _ in sections)
    body = (el("section", el("h2", name), content, id=anchor) for anchor, name, content in sections)
    page = el(
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
                el("p", subtitle, class_="sub"),
                el("nav", *links),
                lead,
                *body,
            ),
        ),
        lang="en",
    )
    return f"<!DOCTYPE html>\n{page}\n"
