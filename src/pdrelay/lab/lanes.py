"""Draws a Timeline: one lane a participant, time from left to right."""

from __future__ import annotations

from pdrelay.lab import fmt, svg
from pdrelay.lab.html import Markup, join
from pdrelay.lab.plots import figure
from pdrelay.lab.report.figures import Counter, Lane, Timeline

ROW, LEFT, RIGHT, FOOT = 34, 100, 18, 36
KINDS = (
    ("wait", "waits"),
    ("route", "tokenize and route"),
    ("prefill", "prefill"),
    ("transfer", "KV transfer"),
    ("decode", "decode"),
    ("stream", "client reads"),
)


def draw(timeline: Timeline, label: str, until: float) -> Markup:
    """An SVG figure on the scale 0 .. `until` ms, so that several can be compared by eye."""
    height = ROW * (len(timeline.lanes) + len(timeline.counters)) + FOOT
    x = svg.Linear(0.0, until or 1.0, LEFT, svg.WIDTH - RIGHT)
    parts: list[Markup] = []
    for tick in x.ticks():
        parts.append(svg.line(x(tick), 4, x(tick), height - FOOT, "grid"))
        parts.append(svg.text(x(tick), height - 20, fmt.number(tick, 2), "tick mid"))
    parts.append(
        svg.text((LEFT + svg.WIDTH) / 2, height - 5, "ms after the intended send", "label mid")
    )
    for index, lane in enumerate(timeline.lanes):
        parts.append(_lane(lane, index * ROW + 6, x))
    for index, counter in enumerate(timeline.counters, len(timeline.lanes)):
        parts.append(_counter(counter, index * ROW + 6, x))
    parts.append(svg.line(x(timeline.ttft), 2, x(timeline.ttft), height - FOOT, "first-token"))
    title = (
        f"{label}: one request of {timeline.num_prompt_tokens:,} tokens, first token at the client "
        f"after {fmt.number(timeline.ttft)} ms (dashed)"
    )
    image = svg.picture(title, join(parts), height=height)
    return figure(title, [], image)


def _counter(counter: Counter, top: float, x: svg.Linear) -> Markup:
    """Bars as high as the share, each as wide as the sample's interval."""
    parts = [svg.text(LEFT - 8, top + 16, counter.name, "tick end")]
    for start, end, share in counter.steps:
        high = 20 * min(1.0, max(0.0, share))
        words = f"{counter.name}: {share:.0%}"
        width = max(1.0, x(end) - x(start))
        parts.append(svg.rect(x(start), top + 23 - high, width, high, "fill k-gpu", words))
    return join(parts)


def _lane(lane: Lane, top: float, x: svg.Linear) -> Markup:
    parts = [svg.text(LEFT - 8, top + 16, lane.name, "tick end")]
    for segment in lane.segments:
        words = f"{segment.label}: {fmt.number(segment.end - segment.start)} ms"
        width = max(1.0, x(segment.end) - x(segment.start))
        parts.append(
            svg.rect(x(segment.start), top + 3, width, 20, f"fill k-{segment.kind}", words)
        )
        if width > 8 * len(segment.label) * 0.85:
            parts.append(svg.text(x(segment.start) + 5, top + 17, segment.label, "on-bar"))
    for at, words in lane.marks:
        parts.append(svg.dot(x(at), top + 13, "mark", f"{words} at {fmt.number(at)} ms", 2.4))
    return join(parts)
