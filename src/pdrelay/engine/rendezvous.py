"""The ranks of an instance tell each other a few bytes when they meet, over a Unix socket."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Sequence

import msgspec

from pdrelay.errors import LaunchError, TransportError
from pdrelay.transport.fds import recv_with_fds, send_with_fds

_CONNECT_PAUSE_S = 0.01


def exchange(
    path: str, *, rank: int, world_size: int, payload: bytes, timeout_s: float
) -> list[bytes]:
    """Everyone's `payload`, in rank order. Rank 0 listens at `path`, which must not exist yet and
    does not exist afterwards.

    Raises LaunchError when a rank does not come before the deadline.
    """
    deadline = time.monotonic() + timeout_s
    try:
        if rank == 0:
            return _lead(path, world_size, payload, deadline)
        return _join(path, rank, payload, deadline)
    except (OSError, TransportError, msgspec.MsgspecError) as error:
        raise LaunchError(
            f"tensor-parallel rank {rank} did not meet its {world_size - 1} peers within "
            f"{timeout_s:g} s ({error}): see their logs"
        ) from error


def _lead(path: str, world_size: int, payload: bytes, deadline: float) -> list[bytes]:
    payloads = {0: payload}
    peers: list[socket.socket] = []
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(path)
        try:
            listener.listen(world_size)
            while len(payloads) < world_size:
                listener.settimeout(_left(deadline))
                peer, _ = listener.accept()
                peers.append(peer)
                peer.settimeout(_left(deadline))
                rank, theirs = msgspec.msgpack.decode(
                    recv_with_fds(peer)[0], type=tuple[int, bytes]
                )
                payloads[rank] = theirs
            ordered = [payloads[rank] for rank in range(world_size)]
            _send_all(peers, msgspec.msgpack.encode(ordered))
        finally:
            os.unlink(path)
            for peer in peers:
                peer.close()
    return ordered


def _send_all(peers: Sequence[socket.socket], data: bytes) -> None:
    for peer in peers:
        send_with_fds(peer, data)


def _join(path: str, rank: int, payload: bytes, deadline: float) -> list[bytes]:
    with connect_when_there(path, deadline) as sock:
        send_with_fds(sock, msgspec.msgpack.encode((rank, payload)))
        sock.settimeout(_left(deadline))
        return msgspec.msgpack.decode(recv_with_fds(sock)[0], type=list[bytes])


def connect_when_there(path: str, deadline: float) -> socket.socket:
    """A stream socket connected to the listener at `path`, its timeout the rest until `deadline`
    (of time.monotonic(), seconds). Raises OSError when nobody listens by then."""
    while True:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.settimeout(_left(deadline))
            sock.connect(path)
            return sock
        except (FileNotFoundError, ConnectionRefusedError):
            # Rank 0 is not there yet, and a path that does not exist cannot be waited on.
            sock.close()
            if time.monotonic() > deadline:
                raise
            time.sleep(_CONNECT_PAUSE_S)
        except BaseException:
            sock.close()
            raise


def _left(deadline: float) -> float:
    return max(0.001, deadline - time.monotonic())
