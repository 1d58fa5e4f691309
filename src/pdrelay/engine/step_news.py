"""Wakes a loop that sleeps in a selector when work elsewhere is done."""

from __future__ import annotations

import contextlib
import os


class StepNews:
    """An eventfd. `ring` from any thread makes it readable; `drain` makes it quiet again."""

    def __init__(self) -> None:
        self._fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def fileno(self) -> int:
        return self._fd

    def ring(self) -> None:
        os.eventfd_write(self._fd, 1)

    def drain(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._fd)

    def close(self) -> None:
        os.close(self._fd)
