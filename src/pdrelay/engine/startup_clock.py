"""Where start-up time goes, phase by phase."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from pdrelay.core.clock import Clock


class StartupClock:
    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = self._clock()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + (self._clock() - start) / 1e9

    def __str__(self) -> str:
        """`weights 1.2 s, graphs 3.4 s`."""
        return ", ".join(f"{name} {seconds:.1f} s" for name, seconds in self.seconds.items())
