"""For every test: the examples that CI draws, and which files come first.

CI draws the same examples every time, so that it judges the change; at the desk they vary.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

# Long files first, so that two processes (`make test`) end at about the same time.
LONG = ("e2e", "launch", "engine", "transport")

settings.register_profile("ci", derandomize=True, deadline=None)
settings.register_profile("desk", deadline=None)
settings.load_profile("ci" if os.environ.get("CI") else "desk")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Stable: within a directory and a file the order stays."""
    items.sort(key=_turn)


def _turn(item: pytest.Item) -> int:
    directory = item.path.relative_to(Path(__file__).parent).parts[0]
    return LONG.index(directory) if directory in LONG else len(LONG)
