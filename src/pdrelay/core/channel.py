"""A message channel over a connected Unix stream socket, for a rank's single-threaded loop.

Never blocks: `send` queues what the socket does not take, `flush` goes on later. Plain sockets
rather than ZeroMQ: a peer's death is an end of file that the loop sees at once, nothing reconnects
behind our back, and file descriptors can travel (KV pages are mapped through them).
"""

from __future__ import annotations

import array
import socket
from typing import Any, Generic, TypeVar

from pdrelay.core.framing import FrameCodec

T = TypeVar("T")

_RECV_BYTES = 1 << 18
_MAX_FDS = 8
_SOCKET_BUFFER_BYTES = 1 << 22


class Channel(Generic[T]):
    """`receive` yields messages of `message_type`; `closed` turns True at end of file or error."""

    def __init__(self, sock: socket.socket, message_type: Any) -> None:
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BUFFER_BYTES)
        self._sock = sock
        self._codec: FrameCodec[T] = FrameCodec(message_type)
        self._pending = bytearray()
        self.received_fds: list[int] = []
        self.closed = False

    def fileno(self) -> int:
        return self._sock.fileno()

    @property
    def has_pending(self) -> bool:
        return bool(self._pending)

    def send(self, message: Any, fds: tuple[int, ...] = ()) -> None:
        """Queue a message. `fds` travel with it; only the first message of a channel may have any
        (the buffer is empty then, so that they arrive with its first byte)."""
        if self.closed:
            return
        frame = self._codec.encode(message)
        if fds:
            assert not self._pending
            try:
                sent = socket.send_fds(self._sock, [frame], list(fds))
            except OSError:
                self.closed = True
                return
            self._pending += frame[sent:]
            return
        if not self._pending:  # a long prompt is not copied when the socket takes it as it is
            frame = frame[self._send(frame) :]
        if frame and not self.closed:
            self._pending += frame
            self.flush()

    def flush(self) -> None:
        while self._pending and not self.closed:
            sent = self._send(self._pending)
            if not sent:
                return
            del self._pending[:sent]

    def _send(self, data: bytes | bytearray) -> int:
        """Bytes that the socket took."""
        try:
            return self._sock.send(data)
        except BlockingIOError:
            return 0
        except OSError:
            self.closed = True
            return 0

    def receive(self) -> list[T]:
        """Messages that have arrived. Raises ProtocolError for undecodable bytes."""
        messages: list[T] = []
        while not self.closed:
            try:
                data, ancillary, _, _ = self._sock.recvmsg(
                    _RECV_BYTES, socket.CMSG_SPACE(_MAX_FDS * 4)
                )
            except BlockingIOError:
                break
            except OSError:
                self.closed = True
                break
            for level, kind, payload in ancillary:
                if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                    fds = array.array("i")
                    fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
                    self.received_fds.extend(fds)
            if not data:
                self.closed = True
                break
            messages.extend(self._codec.feed(data))
            if len(data) < _RECV_BYTES:
                break
        return messages

    def close(self) -> None:
        self.closed = True
        self._sock.close()
