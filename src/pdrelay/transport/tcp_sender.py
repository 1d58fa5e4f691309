"""The producer's side of transport `tcp`: one thread a link that sends straight from KV pages."""

from __future__ import annotations

import os
import select
import socket

from pdrelay.core.clock import Clock
from pdrelay.errors import TransportError
from pdrelay.transport.device import DevicePages
from pdrelay.transport.news import Bell
from pdrelay.transport.pages import SharedPages
from pdrelay.transport.queued_link import LinkClosed, QueuedLink, QueuedPiece
from pdrelay.transport.staging import PageAccess, page_access
from pdrelay.transport.tcp_wire import (
    MAGIC,
    Header,
    TcpDescriptor,
    Vector,
    digest_of,
    encode_header,
)


class TcpLink(QueuedLink):
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
        super().__init__(
            pages, peer.instance, bell, transport=transport, timeout_s=timeout_s, clock=clock
        )
        self._peer = peer
        self.start()

    # ---- the thread

    def _serve(self) -> None:
        access = page_access(self._pages)
        family = socket.AF_INET6 if ":" in self._peer.host else socket.AF_INET
        try:
            with socket.socket(family, socket.SOCK_STREAM) as sock:
                self._connect(sock)
                while True:
                    self._send_piece(sock, self._next_piece(sock.fileno()), access)
        finally:
            access.close()

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

    def _send_piece(self, sock: socket.socket, piece: QueuedPiece, access: PageAccess) -> None:
        """A piece being sent is completed, as the frame must be, with whatever its pages hold."""
        digest = digest_of(piece.outgoing.transfer_id)
        header = Header(digest, piece.layer, piece.first_block, len(piece.src_blocks))
        front = [memoryview(encode_header(header))]
        start = self._clock()
        waited = num_views = 0
        for part in access.read(piece.layer, piece.src_blocks, piece.after):
            waited += self._send_all(sock, [*front, *part.views])
            num_views += len(part.views)
            front = []
        self._done(piece, start, waited, num_views)

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
                    raise LinkClosed
            elif left_ms <= 0:
                raise TransportError(f"it took no data for {self._timeout_s:g} s")
