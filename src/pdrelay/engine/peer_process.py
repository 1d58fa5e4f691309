"""Whether the process at the other end of a Unix socket is gone, with all its device contexts."""

from __future__ import annotations

import os
import select
import socket
import struct


class PeerProcess:
    """The process that connected, held by a pidfd, so that another one with its id is not mistaken
    for it.

    A killed process closes its sockets before a device has dropped what it launched. Its pidfd
    becomes readable when it is a zombie (Linux, `do_exit`: `exit_task_work` closes the device
    files, which waits for the driver, before `exit_notify`).
    """

    def __init__(self, pid: int, pidfd: int) -> None:
        self.pid = pid
        self._pidfd = pidfd

    def gone(self) -> bool:
        return self._pidfd < 0 or bool(select.select([self._pidfd], [], [], 0)[0])

    def close(self) -> None:
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1


def peer_process(sock: socket.socket) -> PeerProcess | None:
    """The process that connected `sock`; None where it is this one, or gone already."""
    credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid, _, _ = struct.unpack("3i", credentials)
    if pid in (0, os.getpid()):
        return None
    try:
        return PeerProcess(pid, os.pidfd_open(pid))
    except OSError:
        return None
