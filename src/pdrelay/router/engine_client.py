"""One engine instance as the front door sees it."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from typing import Protocol

from pdrelay.core.channel import Channel
from pdrelay.core.messages import (
    Fatal,
    FromWorker,
    Met,
    Ping,
    Pong,
    Ready,
    Role,
    StepResult,
    ToWorker,
    WorkerStats,
)
from pdrelay.errors import ProtocolError, WorkerLostError


class Listener(Protocol):
    """Who hears of the instances. Called on the event loop; must not block or raise."""

    def on_step(self, instance: str, result: StepResult) -> None: ...

    def on_lost(self, instance: str, reason: str) -> None: ...

    def on_ready(self, instance: str) -> None: ...

    def on_met(self, instance: str, met: Met) -> None: ...


class EngineClient(Protocol):
    """An instance keeps its client when its processes are restarted."""

    instance: str
    role: Role
    ready: Ready | None
    stats: WorkerStats

    @property
    def alive(self) -> bool:
        """Ready, connected, and answering."""

    @property
    def reason(self) -> str:
        """Why it is not alive; "" when it is."""

    def send(self, message: ToWorker) -> None:
        """Queue a message; never blocks. Raises WorkerLostError when the instance is gone."""

    def attach(self, listener: Listener) -> None: ...


class Observer(Protocol):
    """Who supervises the process at the other end; `launch.Instance` has this shape."""

    def report_ready(self, ready: Ready) -> None: ...

    def report_alive(self) -> None: ...

    def report_fatal(self, message: str) -> None: ...

    def report_closed(self) -> None: ...


class StreamEngineClient:
    """Over a Unix stream socket, which `connect` takes anew for each incarnation.

    It pings every `ping_interval_s`, and is not alive after `answer_timeout_s` without a message;
    only the end of the socket loses the requests.
    """

    def __init__(
        self,
        instance: str,
        role: Role,
        *,
        ping_interval_s: float = 1.0,
        answer_timeout_s: float = 15.0,
    ) -> None:
        self.instance = instance
        self.role = role
        self.ready: Ready | None = None
        self.stats = WorkerStats()
        self._ping_interval_s = ping_interval_s
        self._answer_timeout_s = answer_timeout_s
        self._listener: Listener | None = None
        self._observer: Observer | None = None
        self._channel: Channel[FromWorker] | None = None
        self._fileno = -1
        self._writing = False
        self._ping_timer: asyncio.TimerHandle | None = None
        self._num_pings = 0
        self._last_heard_s = 0.0
        self._fatal = ""
        self._reason = "is starting"

    @property
    def alive(self) -> bool:
        return not self.reason

    @property
    def reason(self) -> str:
        if self.ready is None:
            return self._reason
        silent_s = time.monotonic() - self._last_heard_s
        return f"has not answered for {silent_s:.0f} s" if silent_s > self._answer_timeout_s else ""

    def attach(self, listener: Listener) -> None:
        self._listener = listener

    def connect(self, sock: socket.socket, observer: Observer | None = None) -> None:
        """Take over the socket of a new incarnation. Needs a running event loop."""
        self.close("was replaced")
        self._loop = asyncio.get_running_loop()
        self._observer = observer
        self._fatal = ""
        self._reason = "is starting"
        self._channel = Channel(sock, FromWorker)
        self._fileno = sock.fileno()
        self._loop.add_reader(self._fileno, self._readable)

    def send(self, message: ToWorker) -> None:
        channel = self._channel
        if channel is None or self.ready is None:
            raise WorkerLostError(f"{self.instance} {self._reason}; try again")
        channel.send(message)
        if channel.closed:
            self.close("closed its connection")
            raise WorkerLostError(f"{self.instance} closed its connection; try again")
        self._watch_writable(channel)

    def close(self, reason: str = "was stopped") -> None:
        """Drop the connection. What ran on it is lost. Idempotent."""
        channel = self._channel
        if channel is None:
            return
        self._channel = None
        self.ready = None
        self._reason = self._fatal or reason
        self._loop.remove_reader(self._fileno)
        self._loop.remove_writer(self._fileno)
        self._writing = False
        if self._ping_timer is not None:
            self._ping_timer.cancel()
            self._ping_timer = None
        channel.close()
        if self._listener is not None:
            self._listener.on_lost(self.instance, self._reason)
        if self._observer is not None:
            observer, self._observer = self._observer, None
            observer.report_closed()

    def _watch_writable(self, channel: Channel[FromWorker]) -> None:
        if channel.has_pending == self._writing:
            return
        self._writing = channel.has_pending
        if self._writing:
            self._loop.add_writer(self._fileno, self._writable)
        else:
            self._loop.remove_writer(self._fileno)

    def _writable(self) -> None:
        channel = self._channel
        assert channel is not None
        channel.flush()
        if channel.closed:
            self.close("closed its connection")
        else:
            self._watch_writable(channel)

    def _readable(self) -> None:
        channel = self._channel
        assert channel is not None
        try:
            messages = channel.receive()
        except ProtocolError as error:
            self.close(f"broke the protocol: {error}")
            return
        self._last_heard_s = time.monotonic()
        for message in messages:
            self._handle(message)
            if self._channel is not channel:  # closed by what a listener did
                return
        if channel.closed:
            self.close("died")

    def _handle(self, message: FromWorker) -> None:
        match message:
            case StepResult():
                if message.stats is not None:
                    self.stats = message.stats
                if self._listener is not None:
                    self._listener.on_step(self.instance, message)
            case Pong():
                self.stats = message.stats
                if self._observer is not None:
                    self._observer.report_alive()
            case Ready():
                self._on_ready(message)
            case Met():
                if self._listener is not None:
                    self._listener.on_met(self.instance, message)
            case Fatal(message=text):
                self._fatal = text
                if self._observer is not None:
                    self._observer.report_fatal(text)

    def _on_ready(self, ready: Ready) -> None:
        self.ready = ready
        self._ping()
        if self._observer is not None:
            self._observer.report_ready(ready)
        if self._listener is not None:
            self._listener.on_ready(self.instance)

    def _ping(self) -> None:
        self._num_pings += 1
        self._ping_timer = self._loop.call_later(self._ping_interval_s, self._ping)
        with contextlib.suppress(WorkerLostError):
            self.send(Ping(self._num_pings))
