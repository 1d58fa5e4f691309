"""Messages with file descriptors over blocking Unix stream sockets, for handshakes.

A message is a frame of core.framing (little-endian uint32 length, then the bytes); its descriptors
travel with the first byte. Set a timeout on the socket before: it bounds each wait.
"""

from __future__ import annotations

import array
import os
import socket
import struct
from collections.abc import Sequence

from pdrelay.errors import ProtocolError, TransportError

MAX_MESSAGE_BYTES = 1 << 20  # a handshake is small
MAX_FDS = 8
_LENGTH = struct.Struct("<I")


def send_with_fds(sock: socket.socket, data: bytes, fds: Sequence[int] = ()) -> None:
    """Send one message. The receiver gets duplicates of `fds`; ours stay open.

    Raises TransportError when the peer is gone or takes nothing within the socket's timeout.
    """
    assert sock.gettimeout() is not None, "set a timeout: every wait has a deadline"
    frame = _LENGTH.pack(len(data)) + data
    try:
        sent = socket.send_fds(sock, [frame], list(fds)) if fds else 0
        sock.sendall(memoryview(frame)[sent:])
    except OSError as error:
        raise TransportError(f"handshake not sent: {error}") from error


def recv_with_fds(sock: socket.socket) -> tuple[bytes, tuple[int, ...]]:
    """Receive one message and the descriptors that came with it; the caller closes them.

    Raises TransportError when the peer is gone or silent for the socket's timeout, ProtocolError
    for an oversized message. No descriptor is left open then.
    """
    assert sock.gettimeout() is not None, "set a timeout: every wait has a deadline"
    fds: list[int] = []
    try:
        header = _recv_exactly(sock, _LENGTH.size, fds)
        (length,) = _LENGTH.unpack(header)
        if length > MAX_MESSAGE_BYTES:
            raise ProtocolError(f"handshake of {length} bytes exceeds {MAX_MESSAGE_BYTES}")
        return bytes(_recv_exactly(sock, length, fds)), tuple(fds)
    except OSError as error:
        _close_all(fds)
        raise TransportError(f"no handshake: {error}") from error
    except BaseException:
        _close_all(fds)
        raise


def _recv_exactly(sock: socket.socket, count: int, fds: list[int]) -> bytearray:
    data = bytearray()
    while len(data) < count:
        part, ancillary, _, _ = sock.recvmsg(count - len(data), socket.CMSG_SPACE(MAX_FDS * 4))
        for level, kind, payload in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                received = array.array("i")
                received.frombytes(payload[: len(payload) - len(payload) % received.itemsize])
                fds.extend(received)
        if not part:
            raise TransportError("the peer closed the socket during the handshake")
        data += part
    return data


def _close_all(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)
