"""Calls back when device events are done, and wakes whoever waits for it.

A thread waits for the oldest event; `reap`, on the engine's thread, takes everything that is done
already, so that a busy engine never waits for the thread's turn. Each callback runs once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

from pdrelay.errors import TransportError
from pdrelay.transport.device import Event

Callback = Callable[[str], None]  # with "" or what went wrong on the device


@dataclass(eq=False)
class _Pending:
    event: Event
    callback: Callback


class Completions:
    def __init__(self, name: str) -> None:
        self._name = name
        self._changed = threading.Condition()
        self._pending: list[_Pending] = []
        self._closing = False
        self._thread: threading.Thread | None = None

    def add(self, event: Event, callback: Callback) -> None:
        """`callback` runs on this thread, now or in `reap`, or on the waiting one."""
        with self._changed:
            self._pending.append(_Pending(event, callback))
            if self._thread is None and not self._closing:
                self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._thread.start()
            self._changed.notify()

    def reap(self) -> None:
        """Run the callbacks of everything that is done."""
        with self._changed:
            candidates = list(self._pending)
        for pending in candidates:
            self._finish(pending, wait=False)

    def close(self, timeout_s: float) -> bool:
        """Wait for what is under way and end the thread. False: the device did not finish in
        time, and what was left is never called back."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self._thread is None:
            return True
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _finish(self, pending: _Pending, *, wait: bool) -> None:
        problem = ""
        try:
            if wait:
                pending.event.wait()
            if not pending.event.done():
                if not wait:
                    return
                problem = "the device was closed"
        except TransportError as error:
            problem = str(error)
        with self._changed:
            if pending not in self._pending:
                return  # the other thread has it
            self._pending.remove(pending)
        pending.callback(problem)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._pending or self._closing)
                if not self._pending:
                    return
                oldest = self._pending[0]
            self._finish(oldest, wait=True)
