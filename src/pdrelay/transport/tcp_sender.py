"""The producer's side of transport `tcp`: one thread a link that sends straight from KV pages.

The engine's thread only queues descriptions of pieces. A piece being sent when its transfer is
aborted is completed, as the frame must be, with whatever its pages hold by then; the consumer
discards it (or never commits it). Pieces still queued are dropped.
"""

from __future__ import annotations

import os
import select
import socket
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from pdrelay.core.clock import Clock
from pdrelay.errors import TransportError
from pdrelay.transport.base import HostLink, Sent, TransferFailed
from pdrelay.transport.copying import check_blocks, check_layer, check_slots
from pdrelay.transport.device import DevicePages, Event
from pdrelay.transport.meter import Meter
from pdrelay.transport.news import Bell, NewsQueue
from pdrelay.transport.pages import SharedPages
from pdrelay.transport.staging import PageAccess, page_access
from pdrelay.transport.tcp_wire import (
    MAGIC,
    Header,
    TcpDescriptor,
    Vector,
    digest_of,
    encode_header,
)

MAX_QUEUED_PIECES = 1 << 16  # a few MiB of descriptions; more means that the peer is far behind


@dataclass
class Outgoing:
    """One open transfer. Guarded by the link's lock."""

    transfer_id: str
    digest: bytes
    num_queued: int = 0
    finished: bool = False
    closed: bool = False  # aborted or failed: its queued pieces are dropped
    meter: Meter = field(default_factory=Meter)


@dataclass(frozen=True)
class _Piece:
    outgoing: Outgoing
    header: Header
    src_blocks: list[int]
    after: Event | None  # the pages are written; None on the host, where they are


class _LinkClosed(Exception):
    """Told to end."""


class TcpLink(HostLink):
    """A producer's connection to one consumer incarnation."""

    def __init__(
        self,
        pages: SharedPages | DevicePages,
        peer: TcpDescriptor,
        bell: Bell,
        *,
        transport: str,
        timeout_s: float,
        clock: Clock,
    ) -> None:
        self._pages = pages
        self._peer = peer
        self._transport = transport
        self._timeout_s = timeout_s
        self._clock = clock
        self._news: NewsQueue[Sent | TransferFailed] = NewsQueue(bell)
        self._lock = threading.Lock()
        self._open: dict[str, Outgoing] = {}
        self._queue: deque[_Piece] = deque()
        self._broken = ""
        self._closing = False
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._run, name="kv-tcp-sender", daemon=True)
        self._thread.start()

    # ---- the engine's thread

    def begin(self, transfer_id: str, keys: Sequence[bytes]) -> None:
        with self._lock:
            self._check_alive()
            if transfer_id in self._open:
                raise TransportError(f"transfer {transfer_id} is open already")
            self._open[transfer_id] = Outgoing(transfer_id, digest_of(transfer_id))

    def send(
        self,
        transfer_id: str,
        layer: int,
        first_block: int,
        src_blocks: Sequence[int],
        dst_blocks: Sequence[int],
    ) -> None:
        check_layer(layer, self._pages.layout)
        check_slots(src_blocks, dst_blocks)
        check_blocks(src_blocks, self._pages.layout, "local")
        after = None
        if not isinstance(self._pages, SharedPages):
            after = self._pages.device.writes_of(layer)
        with self._lock:
            self._check_alive()
            outgoing = self._outgoing(transfer_id)
            if not src_blocks:
                return
            if len(self._queue) >= MAX_QUEUED_PIECES:
                raise TransportError(f"{self._peer.instance} is {len(self._queue)} pieces behind")
            header = Header(outgoing.digest, layer, first_block, len(src_blocks))
            outgoing.num_queued += 1
            self._queue.append(_Piece(outgoing, header, list(src_blocks), after))
            if len(self._queue) == 1:
                os.eventfd_write(self._wake, 1)

    def finish(self, transfer_id: str) -> None:
        with self._lock:
            self._check_alive()
            outgoing = self._outgoing(transfer_id)
            outgoing.finished = True
            self._complete(outgoing)

    def _check_alive(self) -> None:
        if self._broken:
            raise TransportError(self._broken)

    def _outgoing(self, transfer_id: str) -> Outgoing:
        outgoing = self._open.get(transfer_id)
        if outgoing is None or outgoing.finished:
            raise TransportError(f"transfer {transfer_id} is not open")
        return outgoing

    def poll(self) -> list[Sent | TransferFailed]:
        return self._news.take()

    def abort(self, transfer_id: str) -> bool:
        with self._lock:
            outgoing = self._open.pop(transfer_id, None)
            if outgoing is not None:
                outgoing.closed = True
        return True  # what is still sent is discarded: the consumer aborts before it reuses blocks

    def close(self) -> None:
        with self._lock:
            if self._closing:
                return
            self._closing = True
            self._broken = self._broken or "the link is closed"
            self._close_all()
            self._queue.clear()
            os.eventfd_write(self._wake, 1)
        self._thread.join()
        os.close(self._wake)
        self._news.take()

    # ---- the thread

    def _run(self) -> None:
        access = page_access(self._pages)
        family = socket.AF_INET6 if ":" in self._peer.host else socket.AF_INET
        try:
            with socket.socket(family, socket.SOCK_STREAM) as sock:
                self._connect(sock)
                while True:
                    piece = self._next_piece(sock)
                    self._send_piece(sock, piece, access)
        except _LinkClosed:
            pass
        except (OSError, ValueError, TransportError) as error:
            self._break(f"the link to {self._peer.instance} broke: {error}")
        finally:
            access.close()

    def _break(self, message: str) -> None:
        """Fail all that is open; later calls raise."""
        with self._lock:
            self._broken = self._broken or message
            self._queue.clear()
            for transfer_id in self._close_all():
                self._news.put(TransferFailed(transfer_id, message))

    def _close_all(self) -> list[str]:
        transfer_ids = list(self._open)
        for outgoing in self._open.values():
            outgoing.closed = True
        self._open.clear()
        return transfer_ids

    def _connect(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            sock.connect((self._peer.host, self._peer.port))
        except BlockingIOError:
            self._wait_writable(sock)
            error = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if error:
                raise OSError(error, os.strerror(error)) from None
        self._send_all(sock, [memoryview(MAGIC + self._peer.token)])

    def _next_piece(self, sock: socket.socket) -> _Piece:
        """Wait for work; meanwhile a consumer that leaves is noticed (it never sends anything)."""
        while True:
            with self._lock:
                if self._closing:
                    raise _LinkClosed
                while self._queue:
                    piece = self._queue.popleft()
                    if not piece.outgoing.closed:
                        return piece
            poller = select.poll()
            poller.register(self._wake, select.POLLIN)
            poller.register(sock, select.POLLIN)
            ready = dict(poller.poll())
            if self._wake in ready:
                os.eventfd_read(self._wake)
            elif sock.fileno() in ready:
                raise TransportError("the consumer closed the connection")

    def _send_piece(self, sock: socket.socket, piece: _Piece, access: PageAccess) -> None:
        header = memoryview(encode_header(piece.header))
        outgoing = piece.outgoing
        start = self._clock()
        waited = num_views = 0
        front = [header]
        for part in access.read(piece.header.layer, piece.src_blocks, piece.after):
            waited += self._send_all(sock, [*front, *part.views])
            num_views += len(part.views)
            front = []
        end = self._clock()
        num_bytes = len(piece.src_blocks) * self._pages.layout.layer_block_bytes
        with self._lock:
            outgoing.meter.add(start, end, num_bytes, num_views)
            outgoing.meter.busy_ns -= waited
            outgoing.num_queued -= 1
            self._complete(outgoing)

    def _complete(self, outgoing: Outgoing) -> None:
        """Report a transfer whose last piece is in the socket; the caller holds the lock."""
        if outgoing.closed or not outgoing.finished or outgoing.num_queued:
            return
        self._open.pop(outgoing.transfer_id, None)
        self._news.put(Sent(outgoing.meter.report(outgoing.transfer_id, self._transport)))

    def _send_all(self, sock: socket.socket, buffers: list[memoryview]) -> int:
        """Send everything. Returns the ns spent waiting for room in the socket.

        Raises TransportError when the peer takes nothing for the timeout.
        """
        vector = Vector(buffers)
        waited = 0
        while not vector.done:
            try:
                vector.advance(sock.sendmsg(vector.head()))
            except BlockingIOError:
                start = self._clock()
                self._wait_writable(sock)
                waited += self._clock() - start
        return waited

    def _wait_writable(self, sock: socket.socket) -> None:
        poller = select.poll()
        poller.register(sock, select.POLLOUT)
        poller.register(self._wake, select.POLLIN)
        deadline = self._clock() + int(self._timeout_s * 1e9)
        while True:
            left_ms = (deadline - self._clock()) / 1e6
            ready = dict(poller.poll(max(0.0, left_ms)))
            if sock.fileno() in ready:
                return
            if self._wake in ready:
                os.eventfd_read(self._wake)
                if self._closing:
                    raise _LinkClosed
            elif left_ms <= 0:
                raise TransportError(f"it took no data for {self._timeout_s:g} s")
