"""How the loop waits: asleep until some socket has news, awake when a step's end is near, or that
of a device's hand-over."""

from __future__ import annotations

import select
from typing import Any, NamedTuple

from pdrelay.core.clock import Clock
from pdrelay.engine.step import StepHandle

# Before and after the foreseen end: more than steps of one batch size differ.
NEAR_NS = 300_000
# An end that is not foreseen is met this late at most, for a fifth of a core.
ASK_EVERY_S = 50e-6


class Sockets(NamedTuple):
    """What `select` takes: file descriptors and what has them."""

    readable: list[Any]
    writable: list[Any]


def wait_for_news(sockets: Sockets, timeout_s: float) -> bool:
    """Whether there are any. select(2): its timeout has microseconds, epoll's milliseconds."""
    return any(select.select(sockets.readable, sockets.writable, [], timeout_s))


def wait_for_step(
    step: StepHandle,
    end_ns: int | None,
    sockets: Sockets,
    timeout_s: float,
    clock: Clock,
    *,
    awake: bool = False,
) -> None:
    """Returns with news, when `step` is done, or after `timeout_s`.

    The step itself is asked, because the driver wakes a thread that sleeps on it 0.5 ms late, give
    or take as much (H200, docs/LOG.md 2026-11-30): over and over around its foreseen end, `end_ns`,
    and every now and then where nothing foretells it or it has passed. `awake`: so are news
    until the end is near.
    """
    now_ns = clock()
    until_ns = now_ns + int(timeout_s * 1e9)
    pause_s = ASK_EVERY_S
    if end_ns is not None and now_ns < end_ns + NEAR_NS:
        first_s = max(0.0, min((end_ns - NEAR_NS - now_ns) / 1e9, timeout_s))
        if awake and wait_awake(sockets, first_s, clock):
            return
        if not awake and wait_for_news(sockets, first_s):
            return
        until_ns, pause_s = min(until_ns, end_ns + NEAR_NS), 0.0
    while not step.done() and clock() < until_ns:
        if wait_for_news(sockets, pause_s):
            return


def wait_awake(
    sockets: Sockets, timeout_s: float, clock: Clock, *, pause_s: float = ASK_EVERY_S
) -> bool:
    """Until news, or for `timeout_s`: a thread whose processor never rests is woken sooner. Whether
    there are any."""
    until_ns = clock() + int(timeout_s * 1e9)
    while clock() < until_ns:
        if wait_for_news(sockets, pause_s):
            return True
    return False
