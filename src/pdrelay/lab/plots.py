"""The kinds of plot that the report draws, from plain series. No figure is computed here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from pdrelay.lab import fmt, svg
from pdrelay.lab.blocks import empty
from pdrelay.lab.html import Markup, el, join
from pdrelay.lab.stats import Estimate


@dataclass(frozen=True)
class Point:
    """One measured point; `loose` are single samples shown where there is no percentile."""

    x: float
    y: Estimate
    loose: Sequence[float] = ()


@dataclass(frozen=True)
class Series:
    label: str
    colour: int
    points: Sequence[Point]
    dashed: bool = False


@dataclass(frozen=True)
class Curve:
    """A line without intervals, such as a CDF."""

    label: str
    colour: int
    points: Sequence[tuple[float, float]]
    dashed: bool = False


@dataclass(frozen=True)
class Group:
    """Bars side by side under one name."""

    name: str
    bars: Sequence[tuple[int, str, Estimate]]  # colour, label, figure


@dataclass(frozen=True)
class Stack:
    """One horizontal bar of parts that add up."""

    name: str
    parts: Sequence[tuple[str, float]]  # part's CSS class, length
    note: str = field(default="")


def legend(entries: Sequence[tuple[str, str]]) -> Markup:
    """Swatches: (CSS class, label)."""
    items = (
        el("span", el("i", class_=f"swatch {class_}"), label, class_="key")
        for class_, label in entries
    )
    return el("div", *items, class_="legend")


def figure(caption: str, keys: Sequence[tuple[str, str]], image: Markup) -> Markup:
    return el("figure", el("figcaption", caption), legend(keys) if keys else "", image)


def series_keys(series: Sequence[Series | Curve]) -> list[tuple[str, str]]:
    return [
        (svg.colour(one.colour) + (" dashed" if one.dashed else ""), one.label) for one in series
    ]


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    log_x: bool = False,
    log_y: bool = False,
    y_max: float | None = None,
) -> Markup:
    """Lines through estimates with 95 % interval bars; loose samples as hollow dots."""
    xs = sorted({point.x for one in series for point in one.points})
    ys = [y for one in series for point in one.points for y in _extent(point)]
    if not xs or not ys:
        return empty(f"{title}: nothing was measured.")
    x: svg.Scale = svg.x_log(xs[0], xs[-1], xs) if log_x else svg.x_linear(0.0, xs[-1] * 1.05)
    positive = [y for y in ys if y > 0] or [1.0]
    y: svg.Scale = (
        svg.y_log(min(positive), max(positive)) if log_y else svg.y_linear(y_max or max(ys))
    )
    drawn = join(_draw_series(one, x, y) for one in series)
    image = svg.picture(title, svg.frame(x, y, x_label, y_label), drawn)
    return figure(title, series_keys(series), image)


def _extent(point: Point) -> list[float]:
    figures = [point.y.value, point.y.lo, point.y.hi, *point.loose]
    return [value for value in figures if value is not None]


def _draw_series(series: Series, x: svg.Scale, y: svg.Scale) -> Markup:
    css = svg.colour(series.colour) + (" dashed" if series.dashed else "")
    known = [(p.x, p.y.value) for p in series.points if p.y.value is not None]
    parts = [svg.polyline([(x(a), y(b)) for a, b in known], f"line {css}")]
    for point in series.points:
        at = x(point.x)
        if point.y.lo is not None and point.y.hi is not None:
            parts.append(svg.line(at, y(point.y.lo), at, y(point.y.hi), f"bar {css}"))
        if point.y.value is not None:
            words = f"{series.label}, {fmt.number(point.x, 4)}: {fmt.estimate(point.y)}"
            parts.append(svg.dot(at, y(point.y.value), f"dot {css}", words))
        for value in point.loose:
            words = f"{series.label}, {fmt.number(point.x, 4)}: one request, {fmt.number(value)}"
            parts.append(svg.dot(at, y(value), f"loose {css}", words, 3.0))
    return join(parts)


def cdf_chart(title: str, curves: Sequence[Curve], *, x_label: str) -> Markup:
    """Cumulative shares on a logarithmic axis."""
    values = [x for curve in curves for x, _ in curve.points if x > 0]
    if not values:
        return empty(f"{title}: nothing was measured.")
    x = svg.x_log(min(values) / 1.1, max(values) * 1.1)
    y = svg.Linear(0.0, 1.0, svg.HEIGHT - svg.BOTTOM, svg.TOP)
    drawn = join(_draw_curve(curve, _steps(curve.points), x, y) for curve in curves)
    image = svg.picture(title, svg.frame(x, y, x_label, "share of gaps at or below"), drawn)
    return figure(title, series_keys(curves), image)


def time_chart(title: str, curves: Sequence[Curve], *, y_label: str) -> Markup:
    """Shares, 0 to 1, over seconds."""
    last = max((x for curve in curves for x, _ in curve.points), default=None)
    if last is None:
        return empty(f"{title}: nothing was measured.")
    x, y = svg.x_linear(0.0, last), svg.y_linear(1.0)
    drawn = join(_draw_curve(curve, curve.points, x, y) for curve in curves)
    return figure(
        title, series_keys(curves), svg.picture(title, svg.frame(x, y, "s", y_label), drawn)
    )


def _draw_curve(
    curve: Curve, points: Sequence[tuple[float, float]], x: svg.Scale, y: svg.Scale
) -> Markup:
    css = f"line {svg.colour(curve.colour)}" + (" dashed" if curve.dashed else "")
    return svg.polyline([(x(a), y(b)) for a, b in points], css)


def _steps(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """A CDF's points as a staircase."""
    stairs: list[tuple[float, float]] = []
    for value, share in points:
        stairs.append((value, stairs[-1][1] if stairs else 0.0))
        stairs.append((value, share))
    return stairs


def bar_chart(title: str, groups: Sequence[Group], *, y_label: str, log_y: bool = False) -> Markup:
    """Grouped bars with interval whiskers; a bar without a figure is left out."""
    extents = [
        value
        for group in groups
        for _, _, figure_ in group.bars
        for value in (figure_.value, figure_.lo, figure_.hi)
        if value is not None
    ]
    if not extents:
        return empty(f"{title}: nothing was measured.")
    positive = [value for value in extents if value > 0] or [1.0]
    y: svg.Scale = (
        svg.y_log(min(positive) / 1.5, max(positive)) if log_y else svg.y_linear(max(extents))
    )
    slot = (svg.WIDTH - svg.LEFT - svg.RIGHT) / len(groups)
    parts = [svg.frame(svg.Linear(1.0, 0.0, 0, 0), y, "", y_label)]
    for index, group in enumerate(groups):
        left = svg.LEFT + index * slot
        parts.append(_draw_bars(group, left + slot * 0.1, slot * 0.8, y))
        parts.append(
            svg.text(left + slot / 2, svg.HEIGHT - svg.BOTTOM + 17, group.name, "tick mid")
        )
    keys: dict[str, str] = {}
    for group in groups:
        for colour, label, _ in group.bars:
            keys.setdefault(svg.colour(colour), label)
    return figure(title, list(keys.items()), svg.picture(title, join(parts)))


def _draw_bars(group: Group, left: float, width: float, y: svg.Scale) -> Markup:
    step = width / max(1, len(group.bars))
    floor = svg.HEIGHT - svg.BOTTOM
    parts = []
    for index, (colour, label, figure_) in enumerate(group.bars):
        if figure_.value is None:
            continue
        x, css = left + index * step, svg.colour(colour)
        top = y(figure_.value)
        words = f"{label}, {group.name}: {fmt.estimate(figure_)}"
        bar = min(step - 2, 46)
        offset = (step - bar) / 2
        parts.append(svg.rect(x + offset, top, bar, floor - top, f"fill {css}", words))
        if figure_.lo is not None and figure_.hi is not None:
            middle = x + step / 2
            parts.append(svg.line(middle, y(figure_.lo), middle, y(figure_.hi), "whisker"))
        parts.append(
            svg.text(x + step / 2, max(top - 4, 10), fmt.number(figure_.value, 3), "value mid")
        )
    return join(parts)


def stack_chart(title: str, keys: Sequence[tuple[str, str]], stacks: Sequence[Stack]) -> Markup:
    """Horizontal stacked bars, one a row, on a common scale."""
    if not stacks:
        return empty(f"{title}: nothing was measured.")
    row, left, right = 30, 96, 76
    height = len(stacks) * row + 40
    longest = max(sum(part for _, part in stack.parts) for stack in stacks)
    x = svg.Linear(0.0, longest or 1.0, left, svg.WIDTH - right)
    parts: list[Markup] = []
    labels = dict(keys)
    for tick in x.ticks():
        parts.append(svg.line(x(tick), 4, x(tick), height - 34, "grid"))
        parts.append(svg.text(x(tick), height - 20, fmt.number(tick, 2), "tick mid"))
    parts.append(svg.text((left + svg.WIDTH - right) / 2, height - 4, "ms", "label mid"))
    for index, stack in enumerate(stacks):
        top, at = index * row + 8, 0.0
        parts.append(svg.text(left - 8, top + 14, stack.name, "tick end"))
        for css, length in stack.parts:
            words = f"{stack.name}, {labels.get(css, css)}: {fmt.number(length)} ms"
            parts.append(svg.rect(x(at), top, x(at + length) - x(at), 20, f"fill {css}", words))
            at += max(0.0, length)
        parts.append(svg.text(x(at) + 6, top + 14, stack.note, "tick"))
    return figure(title, keys, svg.picture(title, join(parts), height=height))
