"""Arrival times, all drawn before the load starts. Seconds, not decreasing."""

from __future__ import annotations

import math

import numpy as np

from pdrelay.errors import ConfigError


def _check(rate: float, num: int) -> None:
    if math.isnan(rate) or rate <= 0:
        raise ConfigError(f"the arrival rate is {rate}: give requests/s above 0, or inf")
    if num < 1:
        raise ConfigError(f"{num} arrivals asked for: give at least 1")


def gamma(rate: float, num: int, seed: int, burstiness: float = 1.0) -> list[float]:
    """Gamma-distributed gaps with shape `burstiness`, as in `vllm bench serve --burstiness`.

    1 is a Poisson process, below 1 is burstier, above 1 more even, inf is `uniform`. As vLLM does,
    the times are rescaled so that the last one is at num / rate: every seed offers the same rate.
    `rate` = inf sends everything at once.

    Raises:
        ConfigError: rate or burstiness not above 0, or no arrivals.
    """
    _check(rate, num)
    if math.isnan(burstiness) or burstiness <= 0:
        raise ConfigError(f"burstiness is {burstiness}: give a number above 0 (1 is Poisson)")
    if math.isinf(rate):
        return [0.0] * num
    if math.isinf(burstiness):
        return uniform(rate, num)
    gaps = np.random.default_rng(seed).gamma(burstiness, 1.0 / (rate * burstiness), size=num)
    times = np.cumsum(gaps)
    if times[-1] > 0:
        times *= (num / rate) / times[-1]
    result: list[float] = times.tolist()
    return result


def poisson(rate: float, num: int, seed: int) -> list[float]:
    """A Poisson process of `rate` requests/s, rescaled as in `gamma`. Raises ConfigError."""
    return gamma(rate, num, seed, 1.0)


def uniform(rate: float, num: int) -> list[float]:
    """One request every 1 / rate seconds, the first after one gap. Raises ConfigError."""
    _check(rate, num)
    return [(i + 1) / rate for i in range(num)] if math.isfinite(rate) else [0.0] * num


def burst(num: int, *, size: int | None = None, rate: float = math.inf) -> list[float]:
    """Groups of `size` requests at once (default: one group), `rate` requests/s on average.

    The first group is at 0, the next ones every size / rate seconds. Raises ConfigError.
    """
    _check(rate, num)
    group = num if size is None else size
    if group < 1:
        raise ConfigError(f"the burst size is {group}: give at least 1")
    gap = group / rate if math.isfinite(rate) else 0.0
    return [(i // group) * gap for i in range(num)]
