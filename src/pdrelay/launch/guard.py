"""Ties an engine and all that it starts to the life of its front door.

Run by path as `python -I -S guard.py PARENT_PID PROGRAM ARGS...` in a process group of its own. A
parent-death signal reaches one process only, and engines start more that outlive it, with GPU
memory in hand: the guard leads the group, waits for the program, and kills the group when the front
door dies. It ends as the program ended; signals to the group are the program's business.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_FRONT_DOOR_DIED = signal.SIGUSR1
_NOT_OURS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def _die_with_parent(number: int, parent: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0) != 0:
        sys.exit(f"prctl: {os.strerror(ctypes.get_errno())}")
    if os.getppid() != parent:  # died before the line above
        os.killpg(0, signal.SIGKILL)


def main() -> None:
    signal.signal(_FRONT_DOOR_DIED, lambda *_: os.killpg(0, signal.SIGKILL))
    _die_with_parent(_FRONT_DOOR_DIED, int(sys.argv[1]))
    guard = os.getpid()
    child = os.fork()
    if child == 0:
        signal.signal(_FRONT_DOOR_DIED, signal.SIG_DFL)
        _die_with_parent(signal.SIGKILL, guard)
        try:
            os.execv(sys.argv[2], sys.argv[2:])
        except OSError as error:
            sys.exit(f"{sys.argv[2]}: {error.strerror}")
    for number in _NOT_OURS:
        signal.signal(number, signal.SIG_IGN)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        if -code in _NOT_OURS:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(guard, -code)
    sys.exit(code)


if __name__ == "__main__":
    main()
