"""How long requests of one size wait for a prefill: M/D/c queues, and a given arrival sequence.

Poisson arrivals of `rate` a second, each taking `service_s` on one of `servers` that work in order
of arrival. Waiting times are without service.

Sources: the waiting time distribution of M/D/c as finite sums of positive terms, and the state
probabilities that it needs: G. J. Franx, "A simple solution for the M/D/c waiting time
distribution", Operations Research Letters 29 (2001) 221-229. For one server it equals Erlang's and
Crommelin's series, whose terms alternate and lose all digits at long waits. The mean for one server
is Pollaczek and Khinchine's. Given arrivals: Lindley's recursion, for several servers Kiefer and
Wolfowitz's.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from functools import cached_property

import numpy as np
import numpy.typing as npt

from pdrelay.errors import ConfigError

_MAX_STATES = 2000
_TAIL = 1e-12  # probability of longer queues that is left out
_MAX_UTILISATION = 0.995  # above, more states than _MAX_STATES would matter


class MDc:
    """The M/D/c queue in its steady state. Times are in seconds.

    Raises ConfigError for no rate, service time or server, and for a load that has no steady state
    or is within 0.5 % of having none: ask `utilisation` first.
    """

    def __init__(self, rate: float, service_s: float, servers: int = 1) -> None:
        if not (rate > 0 and service_s > 0 and servers >= 1):
            raise ConfigError("a queue needs a rate and a service time above 0 and a server")
        self.rate = rate
        self.service_s = service_s
        self.servers = servers
        self.utilisation = utilisation(rate, service_s, servers)
        if self.utilisation > _MAX_UTILISATION:
            raise ConfigError(
                f"a queue at {self.utilisation:.0%} utilisation has no steady state: lower the rate"
            )

    @cached_property
    def _states(self) -> npt.NDArray[np.float64]:
        """p[i]: probability of i requests in the system.

        In one service time every request in service leaves, and the rest stay: p is stationary
        under p[i] = sum over j <= c of p[j] a[i] + sum over c < j <= c + i of p[j] a[c + i - j],
        a[k] = P(k arrivals in a service time).
        """
        size = self._num_states()
        offered = self.rate * self.service_s
        arrivals = _poisson(offered, size)
        transition = np.zeros((size, size))
        for state in range(size):
            left = max(0, state - self.servers)
            transition[state, left:] = arrivals[: size - left]
            transition[state, -1] += max(0.0, 1.0 - transition[state].sum())
        equations = transition.T - np.eye(size)
        equations[-1] = 1.0  # in place of one that follows from the others
        wanted = np.zeros(size)
        wanted[-1] = 1.0
        found = np.clip(np.linalg.solve(equations, wanted), 0.0, None)
        probabilities: npt.NDArray[np.float64] = found / found.sum()
        return probabilities

    def _num_states(self) -> int:
        """Queues decay as x**-i, x > 1 solving x**c = exp(offered (x - 1)): where that is _TAIL."""
        offered = self.rate * self.service_s
        low, high = 1.0 + 1e-9, 2.0

        def exceeds(x: float) -> bool:
            return offered * (x - 1) > self.servers * math.log(x)

        while not exceeds(high):
            high *= 2
        for _ in range(100):
            middle = (low + high) / 2
            low, high = (low, middle) if exceeds(middle) else (middle, high)
        decay = max(math.log(high), 1e-9)
        return min(_MAX_STATES, self.servers + 20 + math.ceil(-math.log(_TAIL) / decay))

    @property
    def mean_wait_s(self) -> float:
        if self.servers == 1:
            return self.utilisation * self.service_s / (2 * (1 - self.utilisation))
        waiting = np.clip(np.arange(len(self._states)) - self.servers, 0, None)
        return float(waiting @ self._states) / self.rate  # Little

    def probability_of_at_most(self, wait_s: float) -> float:
        """P(wait <= wait_s). With service time D and k such that (k - 1) D <= wait < k D:
        the sum over j < k c of P(at most k c - 1 - j wait) P(j arrivals in k D - wait)."""
        if wait_s < 0:
            return 0.0
        slots = math.floor(wait_s / self.service_s) + 1
        terms = slots * self.servers
        arrivals = _poisson(self.rate * (slots * self.service_s - wait_s), terms)
        at_most = np.ones(terms)
        queued = np.cumsum(self._states)[self.servers :]
        known = min(terms, len(queued))
        at_most[:known] = queued[:known]
        return min(1.0, float(at_most[::-1] @ arrivals))

    def wait_s(self, percentile: float) -> float:
        """The `percentile`-th percentile (0 < p < 100) of the wait."""
        assert 0 < percentile < 100
        share = percentile / 100
        low, high = 0.0, self.service_s
        if self.probability_of_at_most(0.0) >= share:
            return 0.0
        while self.probability_of_at_most(high) < share:
            low, high = high, 2 * high
        for _ in range(60):
            middle = (low + high) / 2
            if self.probability_of_at_most(middle) < share:
                low = middle
            else:
                high = middle
        return high


def utilisation(rate: float, service_s: float, servers: int = 1) -> float:
    """Offered work a server; at 1 and above a queue grows without end."""
    return rate * service_s / servers


def waits_of(arrivals_s: Sequence[float], service_s: float, servers: int = 1) -> list[float]:
    """What each of these arrivals (sorted) waits on an idle start, seconds."""
    free_at = [-math.inf] * servers
    waits = []
    for arrival_s in arrivals_s:
        start_s = max(arrival_s, free_at[0])
        heapq.heapreplace(free_at, start_s + service_s)
        waits.append(start_s - arrival_s)
    return waits


def _poisson(mean: float, count: int) -> npt.NDArray[np.float64]:
    """P(k events), k = 0 .. count - 1."""
    k = np.arange(count, dtype=np.float64)
    if mean <= 0:
        return np.where(k == 0, 1.0, 0.0)
    log_factorials = np.concatenate(([0.0], np.cumsum(np.log(k[1:]))))
    found: npt.NDArray[np.float64] = np.exp(k * math.log(mean) - mean - log_factorials)
    return found
