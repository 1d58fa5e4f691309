"""HTML and SVG as well-formed text: every value escaped, every element closed."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

_VOID = frozenset({"br", "hr", "img", "meta", "link", "col"})


class Markup(str):
    """Text that is markup already."""

    __slots__ = ()


def el(tag: str, *children: object, **attributes: object) -> Markup:
    """One element. Children that are not Markup are escaped; attributes named `class_` or
    `stroke_width` become `class` and `stroke-width`; None leaves an attribute out."""
    text = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{escape(str(value))}"'
        for name, value in attributes.items()
        if value is not None
    )
    if tag in _VOID:
        assert not children
        return Markup(f"<{tag}{text}/>")
    return Markup(f"<{tag}{text}>{join(children)}</{tag}>")


def join(children: Iterable[object]) -> Markup:
    """Children one after the other, escaped where they are not Markup."""
    return Markup(
        "".join(
            child if isinstance(child, Markup) else escape(str(child), quote=False)
            for child in children
        )
    )


def table(
    head: Iterable[object],
    rows: Iterable[Iterable[object]],
    *,
    caption: object = "",
    text_columns: int = 1,
) -> Markup:
    """A table that scrolls sideways by itself; all but the first `text_columns` are figures."""

    def cells(tag: str, values: Iterable[object]) -> Markup:
        return join(
            el(tag, value, class_=None if i < text_columns else "num")
            for i, value in enumerate(values)
        )

    return el(
        "div",
        el(
            "table",
            el("caption", caption) if caption else "",
            el("thead", el("tr", cells("th", head))),
            el("tbody", *(el("tr", cells("td", row)) for row in rows)),
        ),
        class_="scroll",
    )
