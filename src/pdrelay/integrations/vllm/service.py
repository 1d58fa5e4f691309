"""A producer with its thread: consumers are answered and late blocks pushed between steps too."""

from __future__ import annotations

import logging
import select
import socket
import threading

from pdrelay.core.clock import Clock
from pdrelay.integrations.vllm.producer import Producer
from pdrelay.integrations.vllm.step import StepPlan

_log = logging.getLogger(__name__)

_JOIN_S = 5.0


class ProducerService:
    """The engine's view of a Producer. Every method but `close` is short.

    The producer's thread is woken only where it has something to do: it competes with the engine's
    for the interpreter."""

    def __init__(self, producer: Producer, clock: Clock) -> None:
        self._producer = producer
        self._clock = clock
        self._lock = threading.Lock()
        self._busy = False  # whether the step has chunks; engine's thread only
        self._closed = False
        self._wake_in, self._wake_out = socket.socketpair()
        self._wake_in.setblocking(False)
        self._wake_out.setblocking(False)
        self._thread = threading.Thread(target=self._run, name="pdrelay-producer", daemon=True)
        self._thread.start()

    def begin_step(self, plan: StepPlan) -> None:
        self._busy = bool(plan.chunks)
        news = bool(plan.rewound or plan.dropped or plan.refused or plan.held)
        if self._busy or news:
            with self._lock:
                self._producer.begin_step(plan)
                news = news or self._producer.needs_poll
            if news:
                self._wake()

    def layer_written(self, layer: int) -> None:
        """Never waits: if the other thread has the lock, a later layer pushes what is due."""
        if not self._busy or not self._producer.layer_due(layer):
            return
        if self._lock.acquire(blocking=False):
            try:
                self._producer.push()
            finally:
                self._lock.release()

    def end_step(self) -> None:
        if self._busy:
            self._busy = False
            with self._lock:
                self._producer.end_step()
                news = self._producer.needs_poll
            if news:
                self._wake()

    def take_finished(self) -> set[str]:
        if not self._producer.has_finished:
            return set()
        with self._lock:
            return self._producer.take_finished()

    def take_stats(self) -> dict[str, int]:
        if not self._producer.stats:
            return {}
        with self._lock:
            return self._producer.stats.take()

    def close(self) -> None:
        """Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._wake()
        self._thread.join(_JOIN_S)
        with self._lock:
            self._producer.close()
        self._wake_in.close()
        self._wake_out.close()

    def _wake(self) -> None:
        try:
            self._wake_in.send(b"\0")
        except BlockingIOError:
            return  # it is about to wake

    def _run(self) -> None:
        while not self._closed:
            try:
                self._turn()
            except Exception:
                _log.exception("pdrelay hands over no KV any more: restart this instance")
                with self._lock:
                    self._producer.close()
                return

    def _turn(self) -> None:
        with self._lock:
            fences = self._producer.open_fences()
            lost = self._producer.has_lost_links
            if not fences and not lost:
                reading = [*self._producer.filenos(), self._wake_out.fileno()]
                writing = self._producer.writable_filenos()
                deadline_ns = self._producer.next_deadline_ns()
        if fences:
            fences[0].wait()
        elif not lost and not self._wait(reading, writing, deadline_ns):
            return
        with self._lock:
            if not self._closed:
                self._producer.poll()

    def _wait(self, reading: list[int], writing: list[int], deadline_ns: int | None) -> bool:
        """Whether there is something to poll for, not only something else to wait for."""
        timeout_ms = None
        if deadline_ns is not None:
            timeout_ms = max(0.0, (deadline_ns - self._clock()) / 1e6) + 1
        poller = select.poll()
        for fd in reading:
            poller.register(fd, select.POLLIN)
        for fd in writing:
            poller.register(fd, select.POLLIN | select.POLLOUT)
        ready = [fd for fd, _ in poller.poll(timeout_ms)]
        if self._wake_out.fileno() not in ready:
            return True
        try:
            while self._wake_out.recv(4096):
                pass
        except BlockingIOError:
            pass
        return False  # what else is ready still is when it waits again
