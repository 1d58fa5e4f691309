"""Work on what has arrived, put off until nothing arrives.

The tokens of a step come within a fraction of a millisecond, those of the next some milliseconds
later. Were the first ones parsed at once, the last would be read, and stamped, that much later.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

_PUT_OFF_S = 0.001
_ITEMS_A_TURN = 4  # some 50 us of parsing before the loop looks for arrivals again


class Backlog:
    """Calls made a little later, in order, a few a turn of the running event loop."""

    def __init__(self) -> None:
        self._calls: deque[Callable[[], None]] = deque()
        self._scheduled = False

    def add(self, call: Callable[[], None]) -> None:
        """`call` must not raise."""
        self._calls.append(call)
        if not self._scheduled:
            self._scheduled = True
            asyncio.get_running_loop().call_later(_PUT_OFF_S, self._work)

    def _work(self) -> None:
        for _ in range(min(_ITEMS_A_TURN, len(self._calls))):
            self._calls.popleft()()
        self._scheduled = bool(self._calls)
        if self._scheduled:
            asyncio.get_running_loop().call_soon(self._work)
