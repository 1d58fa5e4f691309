"""Numbers as people read them, the same in the HTML, the terminal and the verdict."""

from __future__ import annotations

from pdrelay.lab.stats import Estimate

NONE = "–"


def number(value: float | None, digits: int = 3) -> str:
    """`digits` significant digits, no exponent, thousands separated: 0.0123, 4.57, 1,234."""
    if value is None:
        return NONE
    if value == 0:
        return "0"
    magnitude = abs(value)
    decimals = 0
    while magnitude < 10 ** (digits - 1) and decimals < 6:
        magnitude *= 10
        decimals += 1
    text = f"{value:,.{decimals}f}"
    return "0" if text.strip("-0.,") == "" else text


def estimate(figure: Estimate) -> str:
    """`4.57 [4.50, 4.71]`; without interval `4.57`; below the floor the reason and the range."""
    if figure.value is None:
        if figure.minimum is not None and figure.maximum is not None:
            low, high = number(figure.minimum), number(figure.maximum)
            return f"{figure.note}: {low if low == high else f'{low} to {high}'}"
        return figure.note or NONE
    return number(figure.value) + interval(figure)


def known(figure: Estimate) -> str:
    """`4.57 [4.50, 4.71]`; below the floor only the reason: of a percentile far out."""
    return estimate(figure) if figure.known else figure.note


def value(figure: Estimate) -> str:
    """`4.57`; below the floor the reason."""
    return number(figure.value) if figure.known else figure.note


def interval(figure: Estimate) -> str:
    """` [lo, hi]`, or nothing."""
    if figure.lo is None or figure.hi is None:
        return ""
    return f" [{number(figure.lo)}, {number(figure.hi)}]"


def share(figure: Estimate) -> str:
    """A proportion in per cent, with its interval."""
    if figure.value is None:
        return figure.note or NONE
    text = f"{figure.value:.0%}"
    if figure.lo is not None and figure.hi is not None:
        text += f" [{figure.lo:.0%}, {figure.hi:.0%}]"
    return text


def percent(value: float | None) -> str:
    """A share without an interval."""
    return NONE if value is None else f"{value:.0%}"


def times(figure: Estimate) -> str:
    """A ratio: `1.03× [0.98, 1.07]`."""
    return f"{number(figure.value)}×{interval(figure)}" if figure.known else figure.note or NONE


def num_bytes(value: float | None) -> str:
    """Decimal units: `4.19 MB`."""
    if value is None:
        return NONE
    for unit in ("B", "kB", "MB", "GB"):
        if abs(value) < 1000:
            return f"{number(value)} {unit}"
        value /= 1000
    return f"{number(value)} TB"


def tokens(value: int) -> str:
    return f"{value:,}"
