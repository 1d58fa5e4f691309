"""A step that waits a moment for its consumer's slots, so that its kernels can store there.

The front door tells both sides of a prompt at the same time, so on an idle producer the step is
ready when the consumer has only begun to promise blocks. What a step does not store itself is
copied beside it, which slows the prefill down and comes after its end.
"""

from __future__ import annotations

from collections.abc import Callable

from pdrelay.core.channel import Channel
from pdrelay.core.clock import Clock, monotonic_ns
from pdrelay.core.messages import PeerMessage
from pdrelay.engine.step_wait import Sockets, wait_awake

# Less than what copies instead of stores add to a prompt's first token on two GPUs of one host
# (docs/LOG.md), so a wait in vain costs no more than not to wait; and longer than an idle
# consumer takes to promise the longest prompts.
SLOT_WAIT_NS = 700_000

WaitReadable = Callable[[Channel[PeerMessage], float], None]


def wait_readable(channel: Channel[PeerMessage], timeout_s: float) -> None:
    """Until the channel has news, or for `timeout_s`; awake, as it is so short."""
    wait_awake(Sockets([channel], []), timeout_s, monotonic_ns, pause_s=0.0)


class SlotWait:
    """`wait`: tests decide here what happens meanwhile."""

    def __init__(self, clock: Clock, wait: WaitReadable = wait_readable) -> None:
        self._clock = clock
        self._wait = wait

    def due_ns(self) -> int:
        """When a wait that begins now ends at the latest."""
        return self._clock() + SLOT_WAIT_NS

    def until(self, over: Callable[[], bool], channel: Channel[PeerMessage], due_ns: int) -> bool:
        """Call `over`, which reads the channel, whenever there is news. Returns whether it came
        true in time."""
        while not over():
            left_ns = due_ns - self._clock()
            if left_ns <= 0:
                return False
            self._wait(channel, left_ns / 1e9)
        return True
