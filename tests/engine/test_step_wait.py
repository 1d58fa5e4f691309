"""Asleep, then awake, on a clock of the test's own: it moves when it is asked."""

from __future__ import annotations

import socket

import pytest

from pdrelay.engine.step_wait import NEAR_NS, Sockets, wait_awake, wait_for_step

NEVER_S = 60.0  # beyond any test's patience


class Step:
    """Done when it is asked for the `number`th time."""

    def __init__(self, number):
        self.left = number

    def done(self):
        self.left -= 1
        return self.left <= 0

    def result(self):
        raise AssertionError


class Clock:
    def __init__(self, tick_ns=1_000):
        self.now_ns, self.tick_ns = 0, tick_ns

    def __call__(self):
        self.now_ns += self.tick_ns
        return self.now_ns


@pytest.fixture
def bell():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


@pytest.mark.parametrize("end_ns", [NEAR_NS, None], ids=["foreseen", "not foreseen"])
def test_the_end_is_seen_without_a_bell(bell, end_ns):
    step = Step(5)
    wait_for_step(step, end_ns, Sockets([bell[0]], []), NEVER_S, Clock())
    assert step.left == 0


@pytest.mark.parametrize("end_ns", [NEAR_NS, None], ids=["foreseen", "not foreseen"])
def test_news_end_the_watch(bell, end_ns):
    step = Step(1_000)
    bell[1].send(b"!")
    wait_for_step(step, end_ns, Sockets([bell[0]], []), NEVER_S, Clock(tick_ns=1))
    assert step.left >= 999


def test_news_end_the_sleep(bell):
    step = Step(1)
    bell[1].send(b"!")
    far = NEAR_NS + int(NEVER_S * 1e9 / 2)
    wait_for_step(step, far, Sockets([bell[0]], []), NEVER_S, Clock())
    assert step.left == 1, "it was not asked"


def test_awake_news_end_what_would_be_sleep(bell):
    step, clock = Step(1), Clock(tick_ns=1)
    bell[1].send(b"!")
    far = NEAR_NS + int(NEVER_S * 1e9 / 2)
    wait_for_step(step, far, Sockets([bell[0]], []), NEVER_S, clock, awake=True)
    assert step.left == 1, "it was not asked"


def test_awake_the_end_is_met(bell):
    step, clock = Step(3), Clock(tick_ns=10_000)
    wait_for_step(step, 5 * NEAR_NS, Sockets([bell[0]], []), NEVER_S, clock, awake=True)
    assert step.left == 0 and clock.now_ns >= 4 * NEAR_NS


def test_the_watch_has_an_end_and_goes_on_with_pauses(bell):
    step, clock = Step(10_000), Clock()
    sockets = Sockets([bell[0]], [])
    wait_for_step(step, NEAR_NS, sockets, NEVER_S, clock)
    assert step.left > 0 and 2 * NEAR_NS <= clock.now_ns < 3 * NEAR_NS
    step.left = 3
    wait_for_step(step, NEAR_NS, sockets, NEVER_S, clock)
    assert step.left == 0


@pytest.mark.parametrize("end_ns", [None, NEAR_NS + int(NEVER_S * 1e9)])
def test_what_is_due_earlier_ends_the_wait(bell, end_ns):
    step = Step(1_000_000)
    wait_for_step(step, end_ns, Sockets([bell[0]], []), 0.001, Clock(tick_ns=100_000))
    assert step.left > 0


def test_awake_until_news_or_the_time_is_over(bell):
    clock = Clock(tick_ns=1_000_000)
    wait_awake(Sockets([bell[0]], []), 0.01, clock)
    assert clock.now_ns > 10_000_000
    clock = Clock(tick_ns=1)
    bell[1].send(b"!")
    wait_awake(Sockets([bell[0]], []), NEVER_S, clock)
