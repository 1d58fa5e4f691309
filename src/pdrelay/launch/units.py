"""Byte counts as people write and read them."""

from __future__ import annotations

import re

_UNITS = {
    "": 1,
    "b": 1,
    "k": 1000,
    "kb": 1000,
    "m": 1000**2,
    "mb": 1000**2,
    "g": 1000**3,
    "gb": 1000**3,
    "t": 1000**4,
    "tb": 1000**4,
    "kib": 1 << 10,
    "mib": 1 << 20,
    "gib": 1 << 30,
    "tib": 1 << 40,
}
_PATTERN = re.compile(r"([0-9]{1,18}(?:\.[0-9]{1,6})?)\s*([a-zA-Z]*)")


def parse_bytes(text: str) -> int:
    """`1073741824`, `512MiB`, `1.5GiB`, `2GB`. Raises ValueError for anything else."""
    match = _PATTERN.fullmatch(text.strip())
    if match is None or match[2].lower() not in _UNITS:
        raise ValueError(f"{text!r} is no byte count; write 536870912, 512MiB or 2GB")
    unit = _UNITS[match[2].lower()]
    return round(float(match[1]) * unit) if "." in match[1] else int(match[1]) * unit


def format_bytes(num: int) -> str:
    """With a binary unit and at most one decimal: `512 MiB`."""
    value, unit = float(num), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(value) < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{value:.1f}".removesuffix(".0") + f" {unit}"
