"""Tables that the page and the terminal share say the same in both."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest

from pdrelay.lab.report.tables import summary_tables
from pdrelay.lab.table import Column, Table, page_table, terminal_table

TABLE = Table(
    (
        Column("name", lambda row: row[0], text=True),
        Column("kind", lambda row: "<a>", text=True, only="terminal"),
        Column("ms", lambda row: f"{row[1]} [1, 9]", brief=lambda row: str(row[1])),
        Column("n", lambda row: str(row[2]), only="page"),
        Column("range", lambda row: "[1, 9]"),
    ),
    [("one & only", 3, 12), ("two", 4, 13)],
)


def rows_of_page(element) -> list[list[str]]:
    """Heads first."""
    return [["".join(cell.itertext()) for cell in row] for row in element.iter("tr")]


def rows_of_terminal(table) -> list[list[str]]:
    """Heads first, without rich's escapes."""
    cells = [[cell.replace("\\[", "[") for cell in column.cells] for column in table.columns]
    return [[column.header for column in table.columns], *map(list, zip(*cells, strict=True))]


def is_within(few: list[str], many: list[str]) -> bool:
    """All of `few` are in `many`, in that order."""
    rest = iter(many)
    return all(each in rest for each in few)


def test_each_place_has_its_columns_and_cells():
    assert rows_of_page(ET.fromstring(page_table(TABLE))) == [
        ["name", "ms", "n", "range"],
        ["one & only", "3 [1, 9]", "12", "[1, 9]"],
        ["two", "4 [1, 9]", "13", "[1, 9]"],
    ]
    assert rows_of_terminal(terminal_table("", TABLE)) == [
        ["name", "kind", "ms", "range"],
        ["one & only", "<a>", "3", "[1, 9]"],
        ["two", "<a>", "4", "[1, 9]"],
    ]


def test_text_stands_left_and_figures_right_in_both():
    heads = ET.fromstring(page_table(TABLE)).iter("th")
    assert [head.get("class") for head in heads] == [None, "num", "num", "num"]
    columns = terminal_table("", TABLE).columns
    assert [column.justify for column in columns] == ["left", "left", "right", "right"]


def test_a_table_without_rows_is_not_on_the_page():
    assert page_table(Table(TABLE.columns, [])) == ""


@pytest.mark.parametrize("index", range(1, 7))  # 0: TTFT, whose topologies go across
def test_the_report_has_the_terminals_heads_and_rows(built, index):
    """Traffic is one table in the terminal and one a workload on the page."""
    heads, *rows = rows_of_terminal(summary_tables(built.summary)[index])
    if "case" in heads:
        at = heads.index("case")
        for row in (heads, *rows):
            del row[at]
    _, _, page = built.report.read_text(encoding="utf-8").partition("\n")
    tables = map(rows_of_page, ET.fromstring(page).iter("table"))
    same = [shown for first, *shown in tables if is_within(heads, first)]
    assert rows
    assert sum(map(len, same)) == len(rows)
    assert sorted(row[0] for shown in same for row in shown) == sorted(row[0] for row in rows)
