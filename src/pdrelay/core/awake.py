"""How latency-bound processes wait where there are processors to spare: awake, for a while.

A thread that sleeps is woken by an interrupt to a processor that rests, in a virtual machine by way
of the hypervisor: 45 to 80 us that a prompt or a token waits at each process (an H200's host,
docs/LOG.md 2026-12-01), where one that asks over and over has its news at once. That is for event
loops through which everything goes: front door and client. Ranks ask every 50 us
(`engine/step_wait.py`), which is nearly as good and takes a fifth of a core.
"""

from __future__ import annotations

import asyncio
import selectors
import sys
from collections.abc import Callable

from pdrelay.core.clock import Clock, monotonic_ns

# After the last news. Requests in flight bring some every few milliseconds, a long prompt after a
# few hundred; a process without requests sleeps. Pings of ranks and samples of GPUs are no traffic.
AWAKE_NS = 300_000_000
# A thread that wants the interpreter's lock gets it from one that asks over and over only when this
# interval is over (Python's default is 5 ms).
_SWITCH_S = 1e-4
_CLIENT_CORES = 8  # fewer are needed by those who compute


class AwakeSelector(selectors.DefaultSelector):
    """Does not sleep while `busy()`, nor before `AWAKE_NS` after that; without `busy`, not before
    so long after the last event."""

    def __init__(self, clock: Clock = monotonic_ns) -> None:
        super().__init__()
        self.busy: Callable[[], bool] | None = None
        self._clock = clock
        self._awake_until_ns = 0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if not ready and (timeout is None or timeout > 0):
            ready = self._wait(timeout)
        if ready and self.busy is None:
            self._awake_until_ns = self._clock() + AWAKE_NS
        return ready

    def _wait(self, timeout: float | None) -> list[tuple[selectors.SelectorKey, int]]:
        end_ns = None if timeout is None else self._clock() + int(timeout * 1e9)
        while self._is_awake() and (end_ns is None or self._clock() < end_ns):
            if ready := super().select(0):
                return ready
        left_s = None if end_ns is None else (end_ns - self._clock()) / 1e9
        return super().select(left_s) if left_s is None or left_s > 0 else []

    def _is_awake(self) -> bool:
        now_ns = self._clock()
        if self.busy is not None and self.busy():
            self._awake_until_ns = now_ns + AWAKE_NS
        return now_ns < self._awake_until_ns


def runner(selector: AwakeSelector | None) -> asyncio.Runner:
    """Like `asyncio.run`'s, over this selector."""
    if selector is None:
        return asyncio.Runner()
    sys.setswitchinterval(_SWITCH_S)
    return asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(selector))


def client_selector(*, gpus: bool, num_cores: int) -> AwakeSelector | None:
    """For a client that measures servers on this host; None where their ranks need the core."""
    return AwakeSelector() if gpus and num_cores >= _CLIENT_CORES else None
