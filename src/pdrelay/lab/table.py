"""A table said once, and drawn on the page and in the terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

from rich.table import Table as RichTable

from pdrelay.lab import html

Row = TypeVar("Row")
Place = Literal["page", "terminal"]


@dataclass(frozen=True)
class Column(Generic[Row]):
    """Columns of text come first in a table and stand to the left, figures to the right.

    `only`: the one place that has it. `brief`: the terminal's cell, where the page's is too wide.
    """

    head: str
    cell: Callable[[Row], str]
    text: bool = False
    only: Place | None = None
    brief: Callable[[Row], str] | None = None


@dataclass(frozen=True)
class Table(Generic[Row]):
    columns: Sequence[Column[Row]]
    rows: Sequence[Row]

    def columns_in(self, place: Place) -> list[Column[Row]]:
        return [column for column in self.columns if column.only in (None, place)]


def page_table(table: Table[Row], caption: str = "") -> html.Markup:
    """Nothing where there are no rows."""
    if not table.rows:
        return html.Markup("")
    columns = table.columns_in("page")
    return html.table(
        [column.head for column in columns],
        [[column.cell(row) for column in columns] for row in table.rows],
        caption=caption,
        text_columns=sum(column.text for column in columns),
    )


def terminal_table(title: str, table: Table[Row]) -> RichTable:
    columns = table.columns_in("terminal")
    num_text = sum(column.text for column in columns)
    drawn = make_table(title, *(column.head for column in columns), text_columns=num_text)
    for row in table.rows:
        add_row(drawn, *((column.brief or column.cell)(row) for column in columns))
    return drawn


def make_table(title: str, *heads: str, text_columns: int = 1) -> RichTable:
    """A terminal's; all but the first `text_columns` are figures."""
    table = RichTable(title=title, title_justify="left", header_style="bold")
    for index, head in enumerate(heads):
        table.add_column(head, justify="left" if index < text_columns else "right")
    return table


def add_row(table: RichTable, *cells: str) -> None:
    """Cells as they are, brackets included."""
    table.add_row(*map(_escape, cells))


def _escape(text: str) -> str:
    """Square brackets are markup to rich."""
    return text.replace("[", "\\[")
