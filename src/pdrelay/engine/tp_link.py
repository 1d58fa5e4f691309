"""Rank 0 tells the other ranks of an instance what to compute, as frames on Unix sockets:
`BatchInput` on CPU, `StepMessage` on CUDA.

Only batches travel, never scheduler state: ranks cannot diverge. A lost rank ends the instance;
the supervisor starts it again as a whole.
"""

from __future__ import annotations

import os
import socket
from typing import Generic, TypeVar

from pdrelay.core.framing import FrameCodec
from pdrelay.errors import LaunchError

_RECV_BYTES = 1 << 18

T = TypeVar("T")


class Leader(Generic[T]):
    """Rank 0's end. Bind before the ranks meet in their process group, accept after it."""

    def __init__(self, path: str, num_followers: int, timeout_s: float, message: type[T]) -> None:
        self._path = path
        self._num_followers = num_followers
        self._codec: FrameCodec[T] = FrameCodec(message)
        self._sockets: list[socket.socket] = []
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(path)
        self._listener.listen(num_followers)
        self._listener.settimeout(timeout_s)

    def accept(self) -> None:
        """Wait for every follower. Raises LaunchError at the deadline."""
        try:
            while len(self._sockets) < self._num_followers:
                sock, _ = self._listener.accept()
                sock.settimeout(None)
                self._sockets.append(sock)
        except TimeoutError as error:
            raise LaunchError("a tensor-parallel rank did not connect; see its log") from error
        finally:
            self._listener.close()
            os.unlink(self._path)

    def broadcast(self, batch: T) -> None:
        """Raises OSError when a follower is gone: fatal for the instance."""
        frame = self._codec.encode(batch)
        for sock in self._sockets:
            sock.sendall(frame)

    def close(self) -> None:
        for sock in self._sockets:
            sock.close()


class Follower(Generic[T]):
    """The end of rank 1.. ."""

    def __init__(self, path: str, message: type[T]) -> None:
        self._codec: FrameCodec[T] = FrameCodec(message)
        self._ready: list[T] = []
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._sock.connect(path)

    def next_batch(self) -> T | None:
        """Wait for the next batch; None when rank 0 is gone (its end is closed by its death)."""
        while not self._ready:
            data = self._sock.recv(_RECV_BYTES)
            if not data:
                return None
            self._ready.extend(self._codec.feed(data))
        return self._ready.pop(0)

    def close(self) -> None:
        self._sock.close()
