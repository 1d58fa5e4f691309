"""Waits for slots end with news, with the peer, or at their time; the clock is the test's."""

from __future__ import annotations

import socket

import pytest

from pdrelay.core.channel import Channel
from pdrelay.core.clock import FakeClock
from pdrelay.core.messages import Closed, PeerMessage
from pdrelay.engine.slot_wait import SLOT_WAIT_NS, SlotWait, wait_readable

LONG_S = 300.0  # the test's own deadline would come first


@pytest.fixture
def pair():
    ours, theirs = (Channel(sock, PeerMessage) for sock in socket.socketpair())
    yield ours, theirs
    ours.close()
    theirs.close()


def test_news_and_an_end_wake(pair):
    ours, theirs = pair
    theirs.send(Closed("a"))
    wait_readable(ours, LONG_S)
    assert ours.receive() == [Closed("a")]
    theirs.close()
    wait_readable(ours, LONG_S)
    assert ours.receive() == [] and ours.closed


def test_a_wait_without_news_returns(pair):
    wait_readable(pair[0], 0.0)
    assert pair[0].receive() == []


@pytest.mark.parametrize("turn", [1, 3, 9])
def test_other_news_do_not_end_or_prolong_the_wait(pair, turn):
    """Each piece of news takes a quarter of the time: what comes true by then is in time."""
    clock, timeouts, turns = FakeClock(5), [], iter(range(20))

    def wait(channel, timeout_s):
        assert channel is pair[0]
        timeouts.append(round(timeout_s * 1e9))
        clock.now_ns += SLOT_WAIT_NS // 4

    slot_wait = SlotWait(clock, wait)
    in_time = slot_wait.until(lambda: next(turns) == turn, pair[0], slot_wait.due_ns())
    assert in_time == (turn <= 4)
    quarters = [SLOT_WAIT_NS * left // 4 for left in (4, 3, 2, 1)]
    assert timeouts == quarters[:turn]
