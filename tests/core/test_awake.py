"""Selectors and loops that do not sleep while there is traffic."""

from __future__ import annotations

import asyncio
import selectors
import sys

import pytest

from pdrelay.core.awake import AWAKE_NS, AwakeSelector, runner

MS = 1_000_000


class Clock:
    """Moves a millisecond whenever it is asked."""

    def __init__(self):
        self.now_ns = 0

    def __call__(self):
        self.now_ns += MS
        return self.now_ns


@pytest.fixture
def asked(monkeypatch):
    """Timeouts that the kernel was asked with; `answers` are its next events, else none."""

    class Asked(list):
        answers = ()

    asked = Asked()

    def select(self, timeout=None):
        asked.append(timeout)
        if not asked.answers:
            return []
        answer, *asked.answers = asked.answers
        return answer

    monkeypatch.setattr(selectors.DefaultSelector, "select", select)
    return asked


@pytest.fixture
def selector():
    selector = AwakeSelector(Clock())
    yield selector
    selector.close()


def test_without_traffic_it_sleeps(selector, asked):
    assert selector.select(None) == []
    assert asked == [0, None]


def test_after_an_event_it_asks_until_the_next(selector, asked):
    asked.answers = [["first"], [], [], ["second"]]
    assert selector.select(None) == ["first"]
    assert selector.select(None) == ["second"]
    assert set(asked) == {0}


def test_it_sleeps_again_some_time_after_the_last_event(selector, asked):
    asked.answers = [["first"]]
    selector.select(None)
    selector.select(None)
    assert asked[-1] is None and set(asked[:-1]) == {0}
    assert selector._clock.now_ns >= AWAKE_NS


def test_a_timeout_ends_it(selector, asked):
    asked.answers = [["first"]]
    selector.select(None)
    assert selector.select(0.02) == []
    assert set(asked) == {0} and selector._clock.now_ns < 40 * MS


def test_a_timeout_behind_the_awake_time_is_slept_off(selector, asked):
    asked.answers = [["first"]]
    selector.select(None)
    selector.select(2 * AWAKE_NS / 1e9)
    assert 0 < asked[-1] <= AWAKE_NS / 1e9


def test_what_comes_without_traffic_keeps_nobody_awake(selector, asked):
    selector.busy = lambda: False
    asked.answers = [["a ping"]]
    assert selector.select(None) == ["a ping"]
    selector.select(None)
    assert asked[-1] is None


def test_it_is_awake_as_long_as_requests_are_in_flight_and_a_while_longer(selector, asked):
    over_ns = 3 * AWAKE_NS
    selector.busy = lambda: selector._clock.now_ns < over_ns
    selector.select(None)
    assert asked[-1] is None and set(asked[:-1]) == {0}
    assert abs(selector._clock.now_ns - over_ns - AWAKE_NS) < 4 * MS


def test_an_answer_that_is_due_is_not_waited_for(selector, asked):
    assert selector.select(0) == [] and asked == [0]


@pytest.fixture
def switch_interval():
    before = sys.getswitchinterval()
    yield before
    sys.setswitchinterval(before)


@pytest.mark.parametrize("awake", [True, False])
def test_a_loop_serves_sockets_timers_and_threads(awake, switch_interval):
    async def echo(reader, writer):
        writer.write(await reader.readline())
        await writer.drain()
        writer.close()

    async def main():
        server = await asyncio.start_server(echo, "127.0.0.1", 0)
        async with server, asyncio.timeout(30):
            port = server.sockets[0].getsockname()[1]
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            await asyncio.sleep(0.01)
            writer.write(b"hello\n")
            line = await reader.readline()
            writer.close()
            return line, await asyncio.to_thread(sum, range(1000))

    with runner(AwakeSelector() if awake else None) as started:
        assert started.run(main()) == (b"hello\n", 499500)
    assert (sys.getswitchinterval() < switch_interval) is awake
