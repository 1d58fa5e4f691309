"""What `pdrelay kv` and its two processes say to each other, over blocking Unix sockets.

    parent -> both       Setup, with the shared pool's fd where there is one
    consumer -> producer Reach, one a transport, with the descriptor's fds
    both -> parent       Up
    parent -> producer   Transfer            producer -> parent    Sample
    producer -> consumer Expect              consumer -> producer  Expecting
    producer -> consumer Commit              consumer -> producer  Landed
    any -> its peer      Trouble: one line; the run ends

A closed socket ends the process.
"""

from __future__ import annotations

import socket
from typing import Literal, TypeVar

import msgspec

from pdrelay.core.kv_layout import KVLayout
from pdrelay.errors import TransportError
from pdrelay.transport.fds import recv_with_fds, send_with_fds

Mode = Literal["bulk", "layerwise", "compute", "copy"]
Message = msgspec.Struct
M = TypeVar("M", bound=msgspec.Struct)


class Setup(msgspec.Struct, frozen=True, kw_only=True, tag="setup"):
    role: Literal["producer", "consumer"]
    device: str  # "cpu", "cuda:0"
    layout: KVLayout
    transports: tuple[str, ...]
    timeout_s: float
    pool: bytes  # PoolHandle.description, or nothing; its fd travels with this message


class Reach(msgspec.Struct, frozen=True, kw_only=True, tag="reach"):
    transport: str
    data: bytes  # Descriptor.data


class Up(msgspec.Struct, frozen=True, kw_only=True, tag="up"):
    """What a producer computes (devices.Rates), and whether it can copy without a transport."""

    unit_ns: float = 0.0
    flops_per_s: float = 0.0
    rate: str = ""
    device: str = ""  # in words
    has_copy: bool = False


class Transfer(msgspec.Struct, frozen=True, kw_only=True, tag="transfer"):
    """One prompt's pages. `units` of computation come before each layer is sent.

    bulk: every layer at once. layerwise: each after its computation. compute: the same without
    sending anything. copy: the same bytes as one plain copy, no transport.
    """

    transfer_id: str
    transport: str
    mode: Mode
    src_blocks: list[int]
    dst_blocks: list[int]
    units: int = 0


class Sample(msgspec.Struct, frozen=True, kw_only=True, tag="sample"):
    """One measured transfer. Times are CLOCK_MONOTONIC ns.

    `sent_ns`: the source pages may be reused. `landed_ns`: the consumer knows that all is there.
    `computed_ns`: the last layer's computation ended (layerwise and compute).
    """

    transfer_id: str
    start_ns: int
    computed_ns: int = 0
    sent_ns: int = 0
    landed_ns: int = 0
    num_bytes: int = 0
    num_pieces: int = 0
    busy_ns: int = 0  # the producer inside copies or socket calls
    taken_ns: int = 0  # the consumer, the same
    damaged: bool = False  # the pages' checksums differ


class Expect(msgspec.Struct, frozen=True, kw_only=True, tag="expect"):
    transfer_id: str
    transport: str
    blocks: list[int]


class Expecting(msgspec.Struct, frozen=True, tag="expecting"):
    transfer_id: str


class Commit(msgspec.Struct, frozen=True, kw_only=True, tag="commit"):
    transfer_id: str
    num_pages: int


class Landed(msgspec.Struct, frozen=True, kw_only=True, tag="landed"):
    transfer_id: str
    landed_ns: int
    busy_ns: int
    checksum: int


class Trouble(msgspec.Struct, frozen=True, tag="trouble"):
    message: str


_ANY = Setup | Reach | Up | Transfer | Sample | Expect | Expecting | Commit | Landed | Trouble


class Peer:
    """One end of a blocking socket. Every wait ends at the socket's timeout."""

    def __init__(self, sock: socket.socket, timeout_s: float) -> None:
        sock.settimeout(timeout_s)
        self._sock = sock

    def send(self, message: Message, fds: tuple[int, ...] = ()) -> None:
        """Raises TransportError when the other end is gone."""
        send_with_fds(self._sock, msgspec.msgpack.encode(message), fds)

    def receive(self, kind: type[M]) -> tuple[M, tuple[int, ...]]:
        """The next message, which must be a `kind`, and its fds.

        Raises TransportError: with the other end's own words where it sent Trouble.
        """
        data, fds = recv_with_fds(self._sock)
        message = msgspec.msgpack.decode(data, type=_ANY)
        if isinstance(message, Trouble):
            raise TransportError(message.message)
        assert isinstance(message, kind), f"wanted {kind.__name__}, got {message}"
        return message, fds

    def set_timeout(self, timeout_s: float) -> None:
        self._sock.settimeout(timeout_s)
