"""How the loop waits: asleep until some socket has news, awake when a step's end is near."""

from __future__ import annotations

import select
from typing import Any, NamedTuple

from pdrelay.core.clock import Clock
from pdrelay.engine.step import StepHandle

# Before and after the foreseen end: more than steps of one batch size differ.
AWAKE_NS = 300_000


class Sockets(NamedTuple):
    """What `select` takes: file descriptors and what has them."""

    readable: list[Any]
    writable: list[Any]


def wait_for_news(sockets: Sockets, timeout_s: float) -> bool:
    """Whether there are any. select(2): its timeout has microseconds, epoll's milliseconds."""
    return any(select.select(sockets.readable, sockets.writable, [], timeout_s))


def wait_for_step(
    step: StepHandle, end_ns: int, sockets: Sockets, timeout_s: float, clock: Clock
) -> None:
    """Returns with news, when `step` is done, or after `timeout_s`.

    Around its foreseen end the step itself is asked, over and over: the driver wakes a thread that
    sleeps on it later than that sees it.
    """
    asleep_s = (end_ns - AWAKE_NS - clock()) / 1e9
    if asleep_s > timeout_s or clock() >= end_ns + AWAKE_NS:
        wait_for_news(sockets, timeout_s)
        return
    if wait_for_news(sockets, max(0.0, asleep_s)):
        return
    while not step.done() and clock() < end_ns + AWAKE_NS:
        if wait_for_news(sockets, 0):
            return
