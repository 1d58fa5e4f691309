"""M/D/c against simulation, closed forms, and an exact series."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest

from pdrelay.errors import ConfigError
from pdrelay.lab.queueing import MDc, utilisation, waits_of


def simulate(rate: float, service_s: float, servers: int, count: int = 400_000) -> np.ndarray:
    """Waits of a long run from a fixed seed, the start left out."""
    gaps = np.random.default_rng(11).exponential(1 / rate, count)
    return np.asarray(waits_of(np.cumsum(gaps).tolist(), service_s, servers)[count // 20 :])


@pytest.mark.parametrize("servers", [1, 2, 3])
@pytest.mark.parametrize("load", [0.2, 0.7, 0.9])
def test_the_steady_state_agrees_with_a_simulation(servers, load):
    service_s = 0.1
    queue = MDc(load * servers / service_s, service_s, servers)
    waits = simulate(queue.rate, service_s, servers)
    assert queue.utilisation == pytest.approx(load)
    assert queue.mean_wait_s == pytest.approx(waits.mean(), rel=0.08, abs=2e-5)
    for percentile in (50, 90, 99):
        measured = float(np.percentile(waits, percentile))
        assert queue.wait_s(percentile) == pytest.approx(measured, rel=0.08, abs=1e-3)
    for wait_s in (0.0, 0.03, 0.1, 0.25):
        share = float((waits <= wait_s + 1e-12).mean())
        assert queue.probability_of_at_most(wait_s) == pytest.approx(share, abs=0.01)


@pytest.mark.parametrize("load", [0.3, 0.7, 0.95])
def test_one_server_equals_the_alternating_series_in_exact_arithmetic(load):
    """Erlang's series: (1 - rho) sum over k of (rho (k - t))**k / k! exp(rho (t - k)), D = 1."""
    queue = MDc(load, 1.0)
    rho = Fraction(load).limit_denominator(1000)
    for wait in (Fraction(0), Fraction(1, 3), Fraction(1), Fraction(9, 4), Fraction(6)):
        total = Fraction(0)
        for k in range(math.floor(wait) + 1):
            exponential = Fraction(math.exp(float(rho * (wait - k))))
            total += (rho * (k - wait)) ** k / math.factorial(k) * exponential
        expected = float((1 - rho) * total)
        assert queue.probability_of_at_most(float(wait)) == pytest.approx(expected, abs=1e-9)


def test_one_server_is_idle_one_minus_rho_and_the_mean_is_known():
    queue = MDc(7.0, 0.1)
    assert queue.probability_of_at_most(0.0) == pytest.approx(0.3)
    assert queue.wait_s(29) == 0.0
    assert queue.mean_wait_s == pytest.approx(0.7 * 0.1 / (2 * 0.3))


def test_the_distribution_rises_from_0_to_1_and_percentiles_invert_it():
    queue = MDc(14.0, 0.12, 2)
    assert queue.probability_of_at_most(-1e-9) == 0.0
    grid = np.linspace(0, 5, 400)
    values = [queue.probability_of_at_most(float(each)) for each in grid]
    assert all(b >= a - 1e-9 for a, b in pairwise(values))
    assert values[-1] == pytest.approx(1.0, abs=1e-6)
    for percentile in (60, 90, 99, 99.9):
        share = queue.probability_of_at_most(queue.wait_s(percentile))
        assert share == pytest.approx(percentile / 100, abs=1e-6)


def test_two_servers_with_one_queue_beat_two_queues():
    """Least-loaded choice against a random split of the same load."""
    shared, split = MDc(14.0, 0.1, 2), MDc(7.0, 0.1, 1)
    assert shared.utilisation == split.utilisation
    assert shared.mean_wait_s < split.mean_wait_s
    assert shared.wait_s(99) < split.wait_s(99)


def test_given_arrivals_wait_for_those_before_them():
    assert waits_of([0.0, 1.0, 1.5, 9.0], 2.0) == [0.0, 1.0, 2.5, 0.0]
    assert waits_of([0.0, 0.0, 0.0], 2.0, 2) == [0.0, 0.0, 2.0]
    assert waits_of([], 1.0) == []


@pytest.mark.parametrize(("rate", "service_s"), [(0.0, 1.0), (1.0, 0.0), (-1.0, 1.0), (10.0, 0.1)])
def test_no_load_and_no_steady_state_are_refused(rate, service_s):
    with pytest.raises(ConfigError):
        MDc(rate, service_s)
    assert utilisation(10.0, 0.1) == 1.0
