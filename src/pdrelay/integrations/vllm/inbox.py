"""Which of many sockets have something to say, found by one call."""

from __future__ import annotations

import select

_MAX_EVENTS = 16  # of one look: the rest is still ready at the next


class Inbox:
    """`fileno` is readable while there is something `ready`, so that an epoll may have it in."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._masks: dict[int, int] = {}

    def fileno(self) -> int:
        return self._epoll.fileno()

    def watch(self, fd: int, *, writing: bool = False) -> None:
        """From now on; `writing`: it is ready, too, when it takes bytes."""
        mask = select.EPOLLIN | select.EPOLLOUT if writing else select.EPOLLIN
        before = self._masks.get(fd)
        if before is None:
            self._epoll.register(fd, mask)
        elif before != mask:
            self._epoll.modify(fd, mask)
        self._masks[fd] = mask

    def forget(self, fd: int) -> None:
        """Before it is closed: its number may be another's then. Idempotent."""
        if self._masks.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def ready(self) -> list[int]:
        """Never blocks."""
        return [fd for fd, _ in self._epoll.poll(0, _MAX_EVENTS)]

    def close(self) -> None:
        self._epoll.close()
