"""When a step will end, and so when to plan the next: as late as the device never waits for it.

A step that is planned early cannot take in what arrives later: a handed-over request or a prompt
would wait for two steps instead of the rest of one. A step that is planned late is being launched
when the one before it ends, whose tokens wait for that. Decode steps of one batch size take nearly
the same time one after another, so their end is foreseen, and the next step is planned `LEAD_NS`
plus the host's own launch time before it. Steps with prompts are not foreseen: the next is planned
at once.
"""

from __future__ import annotations

from collections import deque

from pdrelay.core.scheduler import StepPlan

# For jitter of the launch and of the host's timer. Half of it costs every ITL 0.1 ms, for the
# device waits; twice as much lets handed-over requests wait longer (H200, docs/LOG.md 2026-12-01).
LEAD_NS = 500_000
_WEIGHT = 0.25  # of the newest measurement
_ROWS_A_KEY = 8  # batches this near take about the same time


class StepPacer:
    """Told of every launch and read, in order; times are of one monotonic clock."""

    def __init__(self) -> None:
        self._duration_ns: dict[int, float] = {}  # of decode steps, by batch size
        self._launch_ns = 0.0  # host time of a launch
        self._in_flight: deque[tuple[int | None, int]] = deque()  # (key, launched at)
        self._last_end_ns = 0

    def launched(self, plan: StepPlan, begun_ns: int, launched_ns: int) -> None:
        """The step was planned from `begun_ns` on and is the device's since `launched_ns`."""
        decodes_only = all(chunk.is_decode for chunk in plan.chunks)
        key = -(-len(plan.chunks) // _ROWS_A_KEY) if decodes_only else None
        self._in_flight.append((key, launched_ns))
        if key is not None:
            self._launch_ns = _smoothed(self._launch_ns, launched_ns - begun_ns)

    def read(self, now_ns: int) -> None:
        """The oldest step has ended."""
        key, launched_ns = self._in_flight.popleft()
        begun_ns = max(launched_ns, self._last_end_ns)
        self._last_end_ns = now_ns
        if key is not None:
            known = self._duration_ns.get(key, float(now_ns - begun_ns))
            self._duration_ns[key] = _smoothed(known, now_ns - begun_ns)

    def foreseen_end_ns(self) -> int | None:
        """Of the oldest step in flight; None without one, or where nothing tells."""
        if not self._in_flight:
            return None
        key, launched_ns = self._in_flight[0]
        duration = None if key is None else self._duration_ns.get(key)
        return None if duration is None else int(max(launched_ns, self._last_end_ns) + duration)

    def not_before_ns(self) -> int:
        """When to plan the next step; a time that has passed means at once."""
        end_ns = self.foreseen_end_ns()
        return 0 if end_ns is None else int(end_ns - self._launch_ns - LEAD_NS)


def _smoothed(old: float, new: float) -> float:
    return old + _WEIGHT * (new - old)
