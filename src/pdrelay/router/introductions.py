"""Who was introduced to whom and has not met yet: what a fresh instance is not ready without."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from typing import NamedTuple

# A producer makes what it needs for one consumer in about half a second (some ten graphs).
MEET_TIMEOUT_S = 10.0
_log = logging.getLogger(__name__)


class Pair(NamedTuple):
    """`address`: of the consumer's incarnation, as in `Meet`."""

    producer: str
    consumer: str
    address: str


class Introductions:
    """Pairs, by the instance that became ready and so caused them. Runs on the event loop.

    After `timeout_s` an instance's pairs are waited for no longer, and the log says so.
    """

    def __init__(self, timeout_s: float = MEET_TIMEOUT_S) -> None:
        self._timeout_s = timeout_s
        self._pairs: dict[str, set[Pair]] = {}
        self._deadlines: dict[str, asyncio.TimerHandle] = {}
        self._none_left = asyncio.Event()
        self._none_left.set()

    def begin(self, newcomer: str, pairs: Iterable[Pair]) -> None:
        """`newcomer` is ready; each of the producers is sent a `Meet` next."""
        self._end(newcomer)
        awaited = set(pairs)
        if not awaited:
            return
        self._pairs[newcomer] = awaited
        loop = asyncio.get_running_loop()
        self._deadlines[newcomer] = loop.call_later(self._timeout_s, self._late, newcomer)
        self._none_left.clear()

    def met(self, pair: Pair) -> None:
        for pairs in self._pairs.values():
            pairs.discard(pair)
        self._settle()

    def lost(self, instance: str) -> None:
        """It is gone, and will be introduced anew when it is back."""
        self._end(instance)
        for pairs in self._pairs.values():
            pairs -= {pair for pair in pairs if instance in (pair.producer, pair.consumer)}
        self._settle()

    def is_meeting(self, instance: str) -> bool:
        """Whether it is a newcomer that still waits for a pair."""
        return instance in self._pairs

    async def all_met(self) -> None:
        """Returns when no newcomer waits; by the deadlines at the latest."""
        await self._none_left.wait()

    def _settle(self) -> None:
        for newcomer in [newcomer for newcomer, pairs in self._pairs.items() if not pairs]:
            self._end(newcomer)

    def _end(self, newcomer: str) -> None:
        self._pairs.pop(newcomer, None)
        deadline = self._deadlines.pop(newcomer, None)
        if deadline is not None:
            deadline.cancel()
        if not self._pairs:
            self._none_left.set()

    def _late(self, newcomer: str) -> None:
        missing = sorted(f"{pair.producer} -> {pair.consumer}" for pair in self._pairs[newcomer])
        _log.warning(
            "%s goes on without all that hand-overs use: after %g s not ready: %s",
            newcomer,
            self._timeout_s,
            ", ".join(missing),
        )
        self._end(newcomer)
