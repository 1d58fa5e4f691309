"""One end of a NCCL communicator of two, with the control channel beside it, and waits that end.

producer's end                   consumer's end
greet(): Join(unique_id)   ->    hear_join()
                           <-    answer(): Joining()
both make the communicator; what else they say is the transport's matter
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
from typing import Any, Generic, TypeVar

from pdrelay.core.channel import Channel
from pdrelay.core.clock import Clock
from pdrelay.errors import ProtocolError, TransportError
from pdrelay.transport.completions import Completions
from pdrelay.transport.device import Event
from pdrelay.transport.nccl_library import NcclLibrary
from pdrelay.transport.nccl_wire import Join, Joining

M = TypeVar("M")  # what the two ends say to each other: Join, Joining and more

# NCCL says only when asked that a communicator or a group is ready. A group is on its stream some
# 50 us later: asking every millisecond alone made each layer of a prompt take 1.2 ms (H200,
# docs/LOG.md 2026-11-24).
_SPIN_NS = 300_000
_TICK_MS = 1
_ABORT_TIMEOUT_S = 5.0


class Ended(Exception):
    """The other end closed, or this one is told to end."""


class NcclEnd(Generic[M]):
    """One end's communicator, control channel, and waiting. Used by one thread, except `end` and
    `nudge`.

    A wait ends with what is waited for, with the other end's socket, with `end`, or at the
    deadline; in the last three cases the communicator is aborted, which lets go of the stream, so
    that a dead peer holds up nothing here.
    """

    def __init__(
        self, library: NcclLibrary, channel: Channel[M], timeout_s: float, clock: Clock
    ) -> None:
        self.library = library
        self.channel = channel
        self._timeout_s = timeout_s
        self._clock = clock
        self._communicator: Any = None
        self._aborted = False
        self._completions = Completions("kv-nccl-wait")
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._reached = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._lock = threading.Lock()  # of `_closed` and the use of `_wake`
        self._ending = self._closed = False
        self._inbox: list[M] = []

    # ---- any thread

    def end(self) -> None:
        """Let the thread's current and further waits raise Ended."""
        with self._lock:
            self._ending = True
            if not self._closed:
                os.eventfd_write(self._wake, 1)

    def nudge(self) -> None:
        """Let the thread's `idle`, the current one or the next, return."""
        with self._lock:
            if not self._closed:
                os.eventfd_write(self._wake, 1)

    # ---- the thread

    def greet(self) -> None:
        """The producer's way to a communicator. Raises Ended, ProtocolError, TransportError."""
        unique_id = self.library.unique_id()
        self.say(Join(unique_id))
        if not isinstance(self.hear(timeout=True), Joining):
            raise ProtocolError("the consumer does not follow the protocol")
        self._join(unique_id, 0)

    def hear_join(self) -> bytes:
        """The unique id of a producer's greeting, however long it takes. Raises as `greet`."""
        message = self.hear(timeout=False)
        if not isinstance(message, Join):
            raise ProtocolError("no greeting")
        return message.unique_id

    def answer(self, unique_id: bytes) -> None:
        """The consumer's way to a communicator. Raises as `greet`."""
        self.say(Joining())
        self._join(unique_id, 1)

    def say(self, message: M | Join | Joining) -> None:
        self.channel.send(message)
        while self.channel.has_pending and not self.channel.closed:
            self._poll(self._timeout_ms(), write=True)
            self.channel.flush()

    def hear(self, timeout: bool) -> M:
        """The next message. `timeout`: it is due. Raises Ended, TransportError."""
        while not self._inbox:
            self._poll(self._timeout_ms() if timeout else None)
            self._inbox += self.channel.receive()
            if self.channel.closed and not self._inbox:
                raise Ended
        return self._inbox.pop(0)

    def _join(self, unique_id: bytes, rank: int) -> None:
        self._communicator = self.library.join(unique_id, rank)
        self._until_ready("the other rank did not join")

    def _until_ready(self, problem: str) -> None:
        begun = self._clock()
        while not self.library.ready(self._communicator):
            waited = self._clock() - begun
            if waited > self._timeout_s * 1e9:
                raise TransportError(f"{problem} within {self._timeout_s:g} s")
            if waited > _SPIN_NS:
                self._watch(_TICK_MS)

    def send(self, pieces: list[tuple[int, int]], stream: Any) -> None:
        self.library.send(self._communicator, pieces, stream)
        self._until_ready("a send did not start")

    def receive(self, pieces: list[tuple[int, int]], stream: Any) -> None:
        self.library.receive(self._communicator, pieces, stream)
        self._until_ready("a receive did not start")

    def wait(self, event: Event) -> None:
        """Until `event`, at most the timeout. Raises Ended, TransportError."""
        if event.done():
            return
        problems: list[str] = []

        def reached(problem: str) -> None:
            os.eventfd_write(self._reached, 1)  # first: who sees the problem reads it back
            problems.append(problem)

        self._completions.add(event, reached)
        deadline = self._clock() + int(self._timeout_s * 1e9)
        while not problems:
            left_ms = (deadline - self._clock()) / 1e6
            if left_ms <= 0:
                raise TransportError(f"the other rank is silent for {self._timeout_s:g} s")
            self._watch(left_ms)
        os.eventfd_read(self._reached)
        if problems[0]:
            raise TransportError(problems[0])

    def _watch(self, timeout_ms: float) -> None:
        """Wait for any news. Messages that come meanwhile are kept; an end raises Ended."""
        self._poll(timeout_ms)
        self._inbox += self.channel.receive()
        if self.channel.closed:
            raise Ended

    def _poll(self, timeout_ms: float | None, *, write: bool = False) -> None:
        if self._ending:
            raise Ended
        poller = select.poll()
        poller.register(self._wake, select.POLLIN)
        poller.register(self._reached, select.POLLIN)
        poller.register(self.channel.fileno(), select.POLLOUT if write else select.POLLIN)
        ready = poller.poll(timeout_ms)
        if self._ending:
            raise Ended
        if any(fd == self._wake for fd, _ in ready):
            os.eventfd_read(self._wake)
        if not ready and timeout_ms is not None and timeout_ms > _TICK_MS:
            raise TransportError(f"the other rank is silent for {self._timeout_s:g} s")

    def _timeout_ms(self) -> float:
        return self._timeout_s * 1e3

    def idle(self, *, due: bool = False) -> None:
        """Wait for a message, `nudge` or `end`; messages are kept. `due`: a message has to come,
        or TransportError is raised at the deadline; else there is none."""
        if not self._inbox:
            self._poll(self._timeout_ms() if due else None)
            self._inbox += self.channel.receive()
            if self.channel.closed:
                raise Ended

    def heard(self) -> list[M]:
        """The messages that were kept."""
        messages, self._inbox = self._inbox, []
        return messages

    def close(self) -> bool:
        """Abort the communicator and close the channel. False: the device is still busy."""
        if self._communicator is not None and not self._aborted:
            self._aborted = True
            with contextlib.suppress(TransportError):  # it failed before: its operations ended
                self.library.abort(self._communicator)
        quiet = self._completions.close(_ABORT_TIMEOUT_S)
        self.channel.close()
        with self._lock:
            self._closed = True
            os.close(self._wake)
        if quiet:  # else a late callback may still ring
            os.close(self._reached)
        return quiet
