"""Release versions as tuples: enough to compare `0.9.2`, `0.26.0rc1` and `0.11.0+cpu`."""

from __future__ import annotations

import re

Version = tuple[int, int, int]


def parse_version(text: str | None) -> Version | None:
    """Major, minor, patch; None where `text` does not begin with a version."""
    match = re.match(r"v?(\d+)\.(\d+)(?:\.(\d+))?", text or "")
    if match is None:
        return None
    return int(match[1]), int(match[2]), int(match[3] or 0)


def in_range(version: Version | None, since: Version | None, before: Version | None) -> bool:
    """`since <= version < before`; an unknown version is in every range."""
    if version is None:
        return True
    return (since is None or version >= since) and (before is None or version < before)


def show_version(version: Version) -> str:
    """`0.23` or `0.9.2`."""
    return f"{version[0]}.{version[1]}" + (f".{version[2]}" if version[2] else "")
