"""Ties a rank to the life of its front door, then becomes the rank's program.

Run by path as `python -I -S child.py PARENT_PID PROGRAM ARGS...` (no imports from the package, no
site: it starts in about 15 ms). A setting of the process survives exec, and code run between fork
and exec of a threaded parent (`preexec_fn`) may deadlock, which is why this is a program.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main() -> None:
    parent = int(sys.argv[1])
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        sys.exit(f"prctl: {os.strerror(ctypes.get_errno())}")
    if os.getppid() != parent:  # died before the line above
        sys.exit("the front door is gone")
    os.execv(sys.argv[2], sys.argv[2:])


if __name__ == "__main__":
    main()
