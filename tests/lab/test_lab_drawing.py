from __future__ import annotations

import math
import xml.etree.ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdrelay.lab import fmt, plots, svg
from pdrelay.lab.html import Markup, el, table
from pdrelay.lab.stats import Estimate

numbers = st.floats(1e-3, 1e7)


@given(st.text(max_size=30), st.text(max_size=30))
def test_markup_round_trips_any_text(content, attribute):
    legal = "".join(c for c in content if c.isprintable())
    other = "".join(c for c in attribute if c.isprintable())
    parsed = ET.fromstring(el("p", legal, class_=other))
    assert "".join(parsed.itertext()) == legal
    assert parsed.get("class") == other


def test_markup_is_not_escaped_twice():
    assert el("b", el("i", "a & b")) == "<b><i>a &amp; b</i></b>"
    assert isinstance(table(["x"], [["<"]]), Markup)


@given(numbers)
def test_numbers_keep_three_digits_and_no_exponent(value):
    text = fmt.number(value)
    assert "e" not in text
    assert math.isclose(float(text.replace(",", "")), value, rel_tol=0.006, abs_tol=1e-6)


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (0.0, "0"), (1234.5, "1,234"), (4.567, "4.57"), (0.01234, "0.0123"),
     (99.96, "100.0"), (-2.5, "-2.50")],
)  # fmt: skip
def test_number_examples(value, text):
    assert fmt.number(value) == text


def test_bytes_and_estimates():
    assert fmt.num_bytes(4_194_304) == "4.19 MB"
    assert fmt.estimate(Estimate(value=1.0, lo=0.5, hi=2.0)) == "1.00 [0.500, 2.00]"
    low = Estimate(value=None, note="n=3<11", minimum=1.0, maximum=2.0, n=3)
    assert fmt.estimate(low) == "n=3<11: 1.00 to 2.00"


@given(numbers, numbers)
def test_scales_are_monotone_and_stay_on_the_canvas(a, b):
    low, high = min(a, b), max(a, b) * 1.01
    for scale in (svg.x_log(low, high), svg.y_log(low, high), svg.y_linear(high)):
        positions = [scale(low + (high - low) * i / 10) for i in range(11)]
        assert positions in (sorted(positions), sorted(positions, reverse=True))
        assert all(0 <= position <= svg.WIDTH for position in positions)
        assert len(scale.ticks()) <= 24


def test_an_empty_plot_says_so():
    line = plots.line_chart("A", [], x_label="", y_label="")
    bars = plots.bar_chart("B", [], y_label="")
    cdf = plots.cdf_chart("C", [], x_label="")
    stack = plots.stack_chart("D", [], [])
    for markup in (line, bars, cdf, stack):
        assert "nothing was measured" in markup


def test_a_missing_figure_leaves_a_gap_and_not_a_zero():
    points = [
        plots.Point(1.0, Estimate(value=2.0)),
        plots.Point(2.0, Estimate(value=None), loose=[5.0, 6.0]),
    ]
    chart = ET.fromstring(
        plots.line_chart("A", [plots.Series("s", 0, points)], x_label="", y_label="")
    )
    circles = list(chart.iter("{http://www.w3.org/2000/svg}circle"))
    kinds = [circle.get("class").split()[0] for circle in circles]
    assert sorted(kinds) == ["dot", "loose", "loose"]
