"""When a dead instance is started again: bounded exponential backoff, then giving up."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class RestartOptions:
    """Seconds and counts. After `max_deaths` deaths within `window_s` the instance stays down."""

    initial_s: float = 0.5
    factor: float = 2.0
    max_s: float = 10.0
    max_deaths: int = 5
    window_s: float = 60.0


@dataclass
class RestartPolicy:
    """Deaths of one instance. Times are seconds of one monotonic clock."""

    options: RestartOptions
    _deaths: list[float] = field(default_factory=list)

    def died(self, now_s: float) -> float | None:
        """Record a death. Returns the seconds to wait before the next start, or None to give up."""
        options = self.options
        self._deaths = [t for t in self._deaths if now_s - t <= options.window_s]
        self._deaths.append(now_s)
        count = len(self._deaths)
        if count >= options.max_deaths:
            return None
        return float(min(options.initial_s * options.factor ** (count - 1), options.max_s))
