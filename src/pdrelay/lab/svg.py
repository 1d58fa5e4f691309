"""Axes and scales of inline SVG plots."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from pdrelay.lab import fmt
from pdrelay.lab.html import Markup, el, join

WIDTH, HEIGHT = 640, 330
LEFT, RIGHT, TOP, BOTTOM = 62, 16, 14, 46
NUM_COLOURS = 8  # classes c0 .. c7 of the style sheet; more topologies repeat them


def colour(index: int) -> str:
    """CSS class of the series `index`."""
    return f"c{index % NUM_COLOURS}"


class Scale(Protocol):
    """Maps values to pixels along one axis."""

    def __call__(self, value: float) -> float: ...

    def ticks(self) -> list[float]: ...


@dataclass(frozen=True)
class Linear:
    """From 0 (or `low`) to `high`, on pixels `start .. end`."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        span = (self.high - self.low) or 1.0
        share = (value - self.low) / span
        return self.start + min(1.02, max(-0.02, share)) * (self.end - self.start)

    def ticks(self) -> list[float]:
        step = nice_step((self.high - self.low) / 5)
        first = math.ceil(self.low / step - 1e-9)
        count = math.floor(self.high / step + 1e-9) - first + 1
        return [(first + i) * step for i in range(max(0, count))]


@dataclass(frozen=True)
class Log:
    """Logarithmic between positive values."""

    low: float
    high: float
    start: float
    end: float
    marks: Sequence[float] = ()  # ticks to use instead of 1, 2, 5 a decade

    def __call__(self, value: float) -> float:
        low, high = math.log(self.low), math.log(self.high)
        share = (math.log(max(value, self.low * 1e-3)) - low) / ((high - low) or 1.0)
        return self.start + min(1.02, max(-0.02, share)) * (self.end - self.start)

    def ticks(self) -> list[float]:
        if self.marks:
            return list(self.marks)
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        steps = (1, 2, 5) if self.high / self.low < 2000 else (1,)
        values = [step * 10.0**decade for decade in decades for step in steps]
        return [v for v in values if self.low * 0.999 <= v <= self.high * 1.001]


def nice_step(rough: float) -> float:
    """The 1, 2 or 5 times a power of ten next above `rough`."""
    if rough <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(rough))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))


def x_linear(low: float, high: float) -> Linear:
    return Linear(low, high, LEFT, WIDTH - RIGHT)


def y_linear(high: float, height: int = HEIGHT) -> Linear:
    """From 0 to a little above `high`."""
    return Linear(0.0, (high or 1.0) * 1.06, height - BOTTOM, TOP)


def x_log(low: float, high: float, marks: Sequence[float] = ()) -> Log:
    return Log(low, high, LEFT + 14, WIDTH - RIGHT - 14, marks)


def y_log(low: float, high: float) -> Log:
    return Log(low / 1.25, high * 1.25, HEIGHT - BOTTOM, TOP)


def frame(x: Scale, y: Scale, x_label: str, y_label: str) -> Markup:
    """Grid, ticks and labels of a plot."""
    bottom = HEIGHT - BOTTOM
    parts: list[Markup] = []
    for tick in y.ticks():
        at = y(tick)
        parts.append(line(LEFT, at, WIDTH - RIGHT, at, "grid"))
        parts.append(text(LEFT - 7, at + 4, fmt.number(tick, 2), "tick end"))
    for tick in x.ticks():
        at = x(tick)
        parts.append(line(at, bottom, at, bottom + 4, "axis"))
        parts.append(text(at, bottom + 17, fmt.number(tick, 2), "tick mid"))
    parts.append(line(LEFT, bottom, WIDTH - RIGHT, bottom, "axis"))
    parts.append(text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 7, x_label, "label mid"))
    middle = (TOP + bottom) / 2
    rotate = f"rotate(-90 14 {middle:.1f})"
    parts.append(el("text", y_label, x=14, y=_px(middle), class_="label mid", transform=rotate))
    return join(parts)


def picture(title: str, *children: Markup, width: int = WIDTH, height: int = HEIGHT) -> Markup:
    """An SVG image with an accessible title."""
    return el(
        "svg",
        el("title", title),
        *children,
        viewBox=f"0 0 {width} {height}",
        role="img",
        xmlns="http://www.w3.org/2000/svg",
    )


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Markup:
    return el("line", x1=_px(x1), y1=_px(y1), x2=_px(x2), y2=_px(y2), class_=class_)


def text(x: float, y: float, content: object, class_: str) -> Markup:
    return el("text", content, x=_px(x), y=_px(y), class_=class_)


def rect(x: float, y: float, width: float, height: float, class_: str, title: str = "") -> Markup:
    children = [el("title", title)] if title else []
    return el(
        "rect",
        *children,
        x=_px(x),
        y=_px(y),
        width=_px(max(0.0, width)),
        height=_px(max(0.0, height)),
        class_=class_,
    )


def dot(x: float, y: float, class_: str, title: str = "", radius: float = 3.5) -> Markup:
    children = [el("title", title)] if title else []
    return el("circle", *children, cx=_px(x), cy=_px(y), r=radius, class_=class_)


def polyline(points: Sequence[tuple[float, float]], class_: str) -> Markup:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return el("polyline", points=path, class_=class_)


def _px(value: float) -> str:
    return f"{value:.1f}"
