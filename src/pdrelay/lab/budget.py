"""Time left, from estimates corrected by what steps took; and what no longer fits."""

from __future__ import annotations

from pdrelay.core.clock import Clock, monotonic_ns

_MIN_FACTOR, _MAX_FACTOR = 0.3, 20.0


class Budget:
    """Compares estimated with real seconds, and keeps a limit for the whole run.

    Each server gets a share of the time left when it starts, by what is planned on it; what it does
    not use goes to the next ones.
    """

    def __init__(self, limit_s: float | None, clock: Clock = monotonic_ns) -> None:
        self._limit_s = limit_s
        self._clock = clock
        self._start_ns = clock()
        self._deadline_s = 0.0  # of the server that runs now, after the start
        self._estimated_s = 0.0  # of the steps that are over
        self._real_s = 0.0

    @property
    def elapsed_s(self) -> float:
        return (self._clock() - self._start_ns) / 1e9

    @property
    def factor(self) -> float:
        """Real over estimated seconds so far."""
        if self._estimated_s <= 0:
            return 1.0
        return min(_MAX_FACTOR, max(_MIN_FACTOR, self._real_s / self._estimated_s))

    def begin_server(self, share: float) -> None:
        """A server is about to start, or has. `share`: its planned part of all that is left."""
        if self._limit_s is not None:
            left_s = max(0.0, self._limit_s - self.elapsed_s)
            self._deadline_s = self.elapsed_s + left_s * share

    def has(self, seconds: float) -> bool:
        """Whether so much is left of the whole run's limit."""
        return self._limit_s is None or self.elapsed_s + seconds <= self._limit_s

    def allows(self, estimate_s: float) -> bool:
        """Whether a step fits into the running server's share."""
        if self._limit_s is None:
            return True
        return self.elapsed_s + estimate_s * self.factor <= self._deadline_s

    def over(self, estimate_s: float, real_s: float) -> None:
        """A step ended."""
        self._estimated_s += estimate_s
        self._real_s += real_s
