from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdrelay.bench.arrivals import burst, gamma, poisson, uniform
from pdrelay.errors import ConfigError

RATES = st.floats(0.01, 1000)


@given(RATES, st.integers(1, 300), st.integers(0, 2**32), st.floats(0.05, 50))
def test_gamma_offers_the_rate_and_never_goes_back(
    rate: float, num: int, seed: int, burstiness: float
) -> None:
    times = gamma(rate, num, seed, burstiness)
    assert len(times) == num
    assert all(a <= b for a, b in zip([0.0, *times], times, strict=False))
    assert times[-1] == pytest.approx(num / rate)
    assert times == gamma(rate, num, seed, burstiness)


def test_gap_spread_follows_burstiness() -> None:
    for burstiness in (0.25, 1.0, 4.0):
        gaps = np.diff(gamma(10, 20_000, 3, burstiness))
        assert gaps.std() / gaps.mean() == pytest.approx(1 / math.sqrt(burstiness), rel=0.05)
    assert poisson(10, 50, 3) == gamma(10, 50, 3, 1.0)
    assert poisson(10, 50, 3) != poisson(10, 50, 4)


def test_limits_of_burstiness_and_rate() -> None:
    assert gamma(4, 4, 0, math.inf) == uniform(4, 4) == [0.25, 0.5, 0.75, 1.0]
    assert gamma(math.inf, 3, 0) == uniform(math.inf, 3) == burst(3) == [0.0] * 3


@given(st.integers(1, 100), st.integers(1, 20), RATES)
def test_bursts_keep_the_mean_rate(num: int, size: int, rate: float) -> None:
    times = burst(num, size=size, rate=rate)
    assert len(times) == num
    for i, t in enumerate(times):
        assert t == pytest.approx((i // size) * size / rate)


@pytest.mark.parametrize("rate", [0, -1, math.nan])
def test_bad_rates_are_refused(rate: float) -> None:
    for call in (
        lambda: poisson(rate, 1, 0),
        lambda: uniform(rate, 1),
        lambda: burst(1, rate=rate),
    ):
        with pytest.raises(ConfigError, match="above 0"):
            call()


def test_other_bad_numbers_are_refused() -> None:
    with pytest.raises(ConfigError):
        poisson(1, 0, 0)
    with pytest.raises(ConfigError):
        gamma(1, 1, 0, math.nan)
    with pytest.raises(ConfigError):
        burst(3, size=0)
