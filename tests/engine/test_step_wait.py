"""Asleep, then awake, on a clock of the test's own: it moves when it is asked."""

from __future__ import annotations

import socket

import pytest

from pdrelay.engine.step_wait import AWAKE_NS, Sockets, wait_for_step

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


def test_the_end_is_seen_without_a_bell(bell):
    step = Step(5)
    wait_for_step(step, AWAKE_NS, Sockets([bell[0]], []), NEVER_S, Clock())
    assert step.left == 0


def test_news_end_the_watch(bell):
    step = Step(1_000)
    bell[1].send(b"!")
    wait_for_step(step, AWAKE_NS, Sockets([bell[0]], []), NEVER_S, Clock(tick_ns=1))
    assert step.left >= 999


def test_news_end_the_sleep(bell):
    step = Step(1)
    bell[1].send(b"!")
    far = AWAKE_NS + int(NEVER_S * 1e9 / 2)
    wait_for_step(step, far, Sockets([bell[0]], []), NEVER_S, Clock())
    assert step.left == 1, "it was not asked"


def test_a_step_that_takes_longer_is_waited_for_asleep(bell):
    step, clock = Step(10_000), Clock()
    sockets = Sockets([bell[0]], [])
    wait_for_step(step, AWAKE_NS, sockets, NEVER_S, clock)
    assert step.left > 0
    assert clock.now_ns >= 2 * AWAKE_NS, "the watch has an end"
    asked = step.left
    bell[1].send(b"!")
    wait_for_step(step, AWAKE_NS, sockets, NEVER_S, clock)
    assert step.left == asked


def test_what_is_due_earlier_ends_the_sleep(bell):
    step = Step(1)
    far = AWAKE_NS + int(NEVER_S * 1e9)
    wait_for_step(step, far, Sockets([bell[0]], []), 0.001, Clock())
    assert step.left == 1
