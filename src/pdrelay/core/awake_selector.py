"""How a latency-bound event loop waits where there are processors to spare: awake, for a while.

A thread that sleeps is woken by an interrupt to a processor that rests, which in a virtual machine
goes by way of the hypervisor. Every hop of a token or a prompt through a sleeping process costs
that; a process that asks over and over has news at once.
"""

from __future__ import annotations

import asyncio
import os
import select
import selectors

from pdrelay.core.clock import monotonic_ns

# After the last event. Requests in flight bring one every few milliseconds, a long prompt takes
# some hundred; an idle process sleeps.
AWAKE_NS = 300_000_000
PAUSE_S = float(os.environ.get("AWAKE_PAUSE", "0"))
MIN_CPUS = 8  # fewer are needed by those who compute


class AwakeSelector(selectors.EpollSelector):
    """Asks for events without sleeping until `AWAKE_NS` after the last."""

    def __init__(self) -> None:
        super().__init__()
        self._awake_until_ns = 0

    def select(
        self, timeout: float | None = None
    ) -> list[tuple[selectors.SelectorKey, selectors._EventMask]]:
        ready = super().select(0)
        if not ready and (timeout is None or timeout > 0):
            ready = self._wait(timeout)
        if ready:
            self._awake_until_ns = monotonic_ns() + AWAKE_NS
        return ready

    def _wait(
        self, timeout: float | None
    ) -> list[tuple[selectors.SelectorKey, selectors._EventMask]]:
        begun_ns = monotonic_ns()
        end_ns = None if timeout is None else begun_ns + int(timeout * 1e9)
        until_ns = self._awake_until_ns if end_ns is None else min(end_ns, self._awake_until_ns)
        while monotonic_ns() < until_ns:
            if PAUSE_S:
                select.select([self.fileno()], [], [], PAUSE_S)
            if ready := super().select(0):
                return ready
        left = None if end_ns is None else (end_ns - monotonic_ns()) / 1e9
        return super().select(left) if left is None or left > 0 else []


def loop_factory() -> asyncio.AbstractEventLoop:
    return asyncio.SelectorEventLoop(AwakeSelector())
