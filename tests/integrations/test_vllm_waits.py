"""What a producer's thread sleeps on: an alarm, and sockets that others can take away from it."""

from __future__ import annotations

import select
import socket
from contextlib import closing

from pdrelay.core.clock import monotonic_ns
from pdrelay.integrations.vllm.alarm import Alarm
from pdrelay.integrations.vllm.inbox import Inbox

WAIT_S = 20.0
FAR_NS = int(1e13)


def test_an_alarm_rings_once_and_not_early():
    with closing(Alarm()) as alarm:
        assert not alarm.rang()
        at_ns = monotonic_ns() + int(2e7)
        alarm.set(at_ns)
        assert not alarm.rang()
        assert select.select([alarm], [], [], WAIT_S)[0]
        assert monotonic_ns() >= at_ns
        assert alarm.rang()
        assert not alarm.rang()


def test_a_time_that_has_passed_rings_at_once():
    with closing(Alarm()) as alarm:
        for at_ns in (-1, 0, 1, monotonic_ns() - 1):
            alarm.set(at_ns)
            assert select.select([alarm], [], [], WAIT_S)[0]
            assert alarm.rang()


def test_an_alarm_that_is_put_off_has_not_rung():
    """Even if nobody looked yet: so a hook that comes in time keeps the thread asleep."""
    with closing(Alarm()) as alarm:
        for later in (monotonic_ns() + FAR_NS, None):
            alarm.set(0)
            assert select.select([alarm], [], [], WAIT_S)[0]
            alarm.set(later)
            assert not select.select([alarm], [], [], 0)[0]
            assert not alarm.rang()


def test_an_inbox_tells_who_has_something_to_say():
    inbox = Inbox()
    (here, there), (mine, theirs) = socket.socketpair(), socket.socketpair()
    with closing(inbox), here, there, mine, theirs:
        inbox.watch(here.fileno())
        inbox.watch(mine.fileno())
        assert inbox.ready() == []
        there.send(b"x")
        assert inbox.ready() == [here.fileno()]
        inbox.watch(mine.fileno(), writing=True)
        assert set(inbox.ready()) == {here.fileno(), mine.fileno()}
        inbox.watch(mine.fileno())
        inbox.forget(here.fileno())
        inbox.forget(here.fileno())
        assert inbox.ready() == []
        theirs.close()
        assert inbox.ready() == [mine.fileno()]


def test_an_inbox_is_watched_as_a_whole():
    inbox, outer = Inbox(), select.epoll()
    here, there = socket.socketpair()
    with closing(inbox), outer, here, there:
        inbox.watch(here.fileno())
        outer.register(inbox, select.EPOLLIN)
        assert outer.poll(0) == []
        there.send(b"x")
        assert len(outer.poll(WAIT_S)) == 1
        outer.unregister(inbox)
        assert outer.poll(0) == []
        outer.register(inbox, select.EPOLLIN)  # what came meanwhile is seen
        assert len(outer.poll(WAIT_S)) == 1
