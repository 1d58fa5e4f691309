"""A producer link with a thread that moves pieces in the order they were sent.

The engine's thread only queues descriptions of pieces. A piece under way when its transfer is
aborted is completed; the consumer discards it (or never commits it). Pieces still queued are
dropped.
"""

from __future__ import annotations

import os
import select
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from pdrelay.core.clock import Clock
from pdrelay.errors import PdrelayError, TransportError
from pdrelay.transport.base import HostLink, Sent, TransferFailed
from pdrelay.transport.copying import check_blocks, check_layer, check_slots
from pdrelay.transport.device import DevicePages, Event
from pdrelay.transport.news import Bell, NewsQueue
from pdrelay.transport.open_transfers import OpenTransfer, OpenTransfers
from pdrelay.transport.pages import SharedPages

MAX_QUEUED_PIECES = 1 << 16  # a few MiB of descriptions; more means that the peer is far behind


@dataclass
class Outgoing(OpenTransfer):
    """One open transfer. Guarded by the link's lock."""

    num_queued: int = 0
    closed: bool = False  # aborted or failed: its queued pieces are dropped


@dataclass(frozen=True)
class QueuedPiece:
    """One layer of request blocks `first_block ..`, which lie in `src_blocks`."""

    outgoing: Outgoing
    layer: int
    first_block: int
    src_blocks: list[int]
    after: Event | None  # the pages are written; None on the host, where they are


class LinkClosed(Exception):
    """Told to end."""


class QueuedLink(HostLink):
    """Transports give `_serve`, which runs on the thread: connect, then `_next_piece`, move it,
    `_done`, and so on, until something raises. `_wake` is readable when there is work, or an end.
    """

    def __init__(
        self,
        pages: SharedPages | DevicePages,
        peer_name: str,
        bell: Bell,
        *,
        transport: str,
        timeout_s: float,
        clock: Clock,
    ) -> None:
        self._pages = pages
        self._peer_name = peer_name
        self._transport = transport
        self._timeout_s = timeout_s
        self._clock = clock
        self._news: NewsQueue[Sent | TransferFailed] = NewsQueue(bell)
        self._lock = threading.Lock()
        self._open: OpenTransfers[Outgoing] = OpenTransfers()
        self._queue: deque[QueuedPiece] = deque()
        self._closing = False
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._run, name=f"kv-{transport}-put", daemon=True)

    def start(self) -> None:
        self._thread.start()

    # ---- the engine's thread

    def begin(self, transfer_id: str, keys: Sequence[bytes]) -> None:
        with self._lock:
            self._open.begin(Outgoing(transfer_id))

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
            self._open.check_alive()
            outgoing = self._open.sending(transfer_id)
            if not src_blocks:
                return
            if len(self._queue) >= MAX_QUEUED_PIECES:
                raise TransportError(f"{self._peer_name} is {len(self._queue)} pieces behind")
            outgoing.num_queued += 1
            piece = QueuedPiece(outgoing, layer, first_block, list(src_blocks), after)
            self._queue.append(piece)
            if len(self._queue) == 1:
                os.eventfd_write(self._wake, 1)

    def finish(self, transfer_id: str) -> None:
        with self._lock:
            self._open.check_alive()
            self._complete(self._open.finish(transfer_id))

    def poll(self) -> list[Sent | TransferFailed]:
        return self._news.take()

    def abort(self, transfer_id: str) -> bool:
        with self._lock:
            outgoing = self._open.pop(transfer_id)
            if outgoing is not None:
                outgoing.closed = True
        return True  # what is still sent is discarded: the consumer aborts before it reuses blocks

    def close(self) -> None:
        with self._lock:
            if self._closing:
                return
            self._closing = True
            self._close_all("the link is closed")
            self._queue.clear()
            os.eventfd_write(self._wake, 1)
        self._thread.join()
        os.close(self._wake)
        self._news.take()

    # ---- the thread

    def _serve(self) -> None:
        raise NotImplementedError

    def _run(self) -> None:
        try:
            self._serve()
        except LinkClosed:
            pass
        except (OSError, ValueError, PdrelayError) as error:
            self._break(f"the link to {self._peer_name} broke: {error}")

    def _break(self, message: str) -> None:
        """Fail all that is open; later calls raise."""
        with self._lock:
            self._queue.clear()
            for outgoing in self._close_all(message):
                self._news.put(TransferFailed(outgoing.transfer_id, message))

    def _close_all(self, message: str) -> list[Outgoing]:
        closed = self._open.break_off(message)
        for outgoing in closed:
            outgoing.closed = True
        return closed

    def _next_piece(self, fd: int) -> QueuedPiece:
        """Wait for work; meanwhile a consumer that leaves is noticed: nothing is due on `fd`."""
        while True:
            with self._lock:
                if self._closing:
                    raise LinkClosed
                while self._queue:
                    piece = self._queue.popleft()
                    if not piece.outgoing.closed:
                        return piece
            poller = select.poll()
            poller.register(self._wake, select.POLLIN)
            poller.register(fd, select.POLLIN)
            ready = dict(poller.poll())
            if self._wake in ready:
                os.eventfd_read(self._wake)
            elif fd in ready:
                raise TransportError("the consumer closed the connection")

    def _done(self, piece: QueuedPiece, start_ns: int, idle_ns: int, num_pieces: int) -> None:
        """The piece is away: begun at `start_ns`, with `idle_ns` of waiting for the peer."""
        num_bytes = len(piece.src_blocks) * self._pages.layout.layer_block_bytes
        outgoing = piece.outgoing
        with self._lock:
            outgoing.meter.add(start_ns, self._clock(), num_bytes, num_pieces)
            outgoing.meter.busy_ns -= idle_ns
            outgoing.num_queued -= 1
            self._complete(outgoing)

    def _complete(self, outgoing: Outgoing) -> None:
        """Report a transfer whose last piece is away; the caller holds the lock."""
        if outgoing.closed or not outgoing.finished or outgoing.num_queued:
            return
        self._open.pop(outgoing.transfer_id)
        self._news.put(Sent(outgoing.meter.report(outgoing.transfer_id, self._transport)))
