"""News from transport threads to the engine's thread, with a descriptor to wait on."""

from __future__ import annotations

import os
import threading
from collections import deque
from typing import Generic, TypeVar

T = TypeVar("T")


class Bell:
    """An eventfd that is readable exactly while some queue of its transport holds news.

    One transport has many queues (its own and one a link), and the engine polls them one after
    the other: a bell that each poll would silence could swallow news posted to a queue already
    polled, so it counts.
    """

    def __init__(self) -> None:
        self._fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._lock = threading.Lock()
        self._pending = 0

    def fileno(self) -> int:
        return self._fd

    def add(self, count: int) -> None:
        with self._lock:
            if self._fd < 0 or count == 0:
                return
            if self._pending == 0:
                os.eventfd_write(self._fd, 1)
            self._pending += count

    def remove(self, count: int) -> None:
        with self._lock:
            if self._fd < 0 or count == 0:
                return
            self._pending -= count
            assert self._pending >= 0
            if self._pending == 0:
                os.eventfd_read(self._fd)

    def close(self) -> None:
        with self._lock:
            if self._fd >= 0:
                os.close(self._fd)
            self._fd = -1


class NewsQueue(Generic[T]):
    """What one `poll` will return. Any thread puts, the engine's thread takes."""

    def __init__(self, bell: Bell) -> None:
        self._bell = bell
        self._items: deque[T] = deque()

    def put(self, item: T) -> None:
        self._bell.add(1)  # before the item is there, so that `take` never counts below zero
        self._items.append(item)

    def take(self) -> list[T]:
        items: list[T] = []
        while self._items:
            items.append(self._items.popleft())
        self._bell.remove(len(items))
        return items
