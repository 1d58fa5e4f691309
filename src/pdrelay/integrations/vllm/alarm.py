"""An alarm for a thread that sleeps in an epoll, which others set anew without waking it."""

from __future__ import annotations

import ctypes
import os
import time

_ABSOLUTE = 1  # TFD_TIMER_ABSTIME
_SECOND_NS = 1_000_000_000


class Alarm:
    """A timerfd (Python has none before 3.13): `fileno` is readable once it has rung."""

    def __init__(self) -> None:
        """Raises OSError."""
        # Keeps the interpreter's lock: to let go of it would cost more than the call takes.
        libc = ctypes.PyDLL(None, use_errno=True)
        self._settime = libc.timerfd_settime
        self._when = (ctypes.c_long * 4)()  # interval and time, each in s and ns
        flags = os.O_NONBLOCK | os.O_CLOEXEC
        self._fd: int = libc.timerfd_create(time.CLOCK_MONOTONIC, flags)
        if self._fd < 0:
            raise _last_error()

    def fileno(self) -> int:
        return self._fd

    def set(self, at_ns: int | None) -> None:
        """Ring at that time of CLOCK_MONOTONIC, at once if it has passed, and not before, even if
        it was about to. None: not at all."""
        at_ns = 0 if at_ns is None else max(1, at_ns)
        self._when[2], self._when[3] = divmod(at_ns, _SECOND_NS)
        if self._settime(self._fd, _ABSOLUTE, self._when, None) < 0:
            raise _last_error()

    def rang(self) -> bool:
        """Whether it has since it was set; tells so once."""
        try:
            os.read(self._fd, 8)
        except BlockingIOError:
            return False
        return True

    def close(self) -> None:
        os.close(self._fd)


def _last_error() -> OSError:
    code = ctypes.get_errno()
    return OSError(code, os.strerror(code))
