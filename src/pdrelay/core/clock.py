"""Time as a dependency: real, or driven by a test or simulator."""

from __future__ import annotations

import time
from collections.abc import Callable

Clock = Callable[[], int]  # returns CLOCK_MONOTONIC nanoseconds

monotonic_ns: Clock = time.monotonic_ns


class FakeClock:
    """A clock that moves only when told to."""

    def __init__(self, now_ns: int = 0) -> None:
        self.now_ns = now_ns

    def __call__(self) -> int:
        return self.now_ns

    def advance(self, seconds: float) -> None:
        self.now_ns += int(seconds * 1e9)
