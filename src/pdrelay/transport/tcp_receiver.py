"""The consumer's side of transport `tcp`: one thread that receives straight into KV pages.

The race that matters: the engine aborts a transfer, frees its blocks and gives them to another
request while bytes of the old one are still arriving. So every write into pages happens inside one
non-blocking receive, or one copy to a device that is waited for, under the transfer's lock, and
`abort` takes that lock: once it returned, the thread finds the transfer closed and discards what is
left of the frame. The lock is held for one copy and never while waiting for the peer.
"""

from __future__ import annotations

import hmac
import selectors
import socket
import threading
from collections.abc import Iterator

from pdrelay.core.clock import Clock
from pdrelay.core.kv_layout import KVLayout
from pdrelay.errors import ProtocolError, TransportError
from pdrelay.transport.base import Arrived, TransferFailed
from pdrelay.transport.device import DevicePages
from pdrelay.transport.incoming import Incoming, IncomingTransfers
from pdrelay.transport.news import NewsQueue
from pdrelay.transport.pages import SharedPages
from pdrelay.transport.staging import PageAccess, Part, page_access
from pdrelay.transport.tcp_wire import (
    GREETING_BYTES,
    HEADER_BYTES,
    MAGIC,
    Header,
    Vector,
    decode_header,
    digest_of,
)

_BACKLOG = 64
_MAX_CONNECTIONS = 256
_GREETING_TIMEOUT_NS = 5_000_000_000
_RECEIVES_A_TURN = 16  # of one connection before the others get theirs
_SCRATCH_BYTES = 1 << 18


class Receiver:
    """Listens, receives, and reports. Its thread runs `_run` and what that calls."""

    def __init__(
        self,
        pages: SharedPages | DevicePages,
        host: str,
        token: bytes,
        news: NewsQueue[Arrived | TransferFailed],
        *,
        transport: str,
        timeout_ns: int,
        clock: Clock,
    ) -> None:
        self.layout: KVLayout = pages.layout
        self.pages = pages
        self.scratch = memoryview(bytearray(_SCRATCH_BYTES))
        self.token = token
        self.clock = clock
        self.timeout_ns = timeout_ns
        self.transfers = IncomingTransfers(
            pages.layout,
            news,
            transport=transport,
            timeout_ns=timeout_ns,
            clock=clock,
            name=digest_of,
        )
        self._connections: list[Connection] = []
        self._wake, self._woken = socket.socketpair()
        try:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            self._listener = socket.create_server((host, 0), family=family, backlog=_BACKLOG)
        except OSError as error:
            self._wake.close()
            self._woken.close()
            raise TransportError(
                f"cannot listen on {host!r} for KV transfers ({error}): choose an address of "
                "this host"
            ) from error
        self._listener.setblocking(False)
        self.port: int = self._listener.getsockname()[1]
        self._selector = selectors.DefaultSelector()
        self._thread = threading.Thread(target=self._run, name="kv-tcp-receiver", daemon=True)
        self._thread.start()

    def close(self) -> None:
        if not self._thread.is_alive():
            return
        self._wake.send(b"x")
        self._thread.join()
        self._wake.close()
        self._woken.close()

    # ---- the thread

    def _run(self) -> None:
        with self._selector as selector, self._listener:
            selector.register(self._listener, selectors.EVENT_READ)
            selector.register(self._woken, selectors.EVENT_READ)
            try:
                while True:
                    for key, _ in selector.select(self._patience_s()):
                        if key.fileobj is self._woken:
                            return
                        if key.fileobj is self._listener:
                            self._accept(selector)
                        elif isinstance(key.data, Connection):
                            self._pump(key.data, selector)
                    self._drop_stalled(selector)
            finally:
                for connection in self._connections:
                    connection.close()

    def _patience_s(self) -> float | None:
        """Until the next connection in the middle of something is late; idle ones never are."""
        deadlines = [c.deadline_ns for c in self._connections if c.deadline_ns is not None]
        if not deadlines:
            return None
        return max(0.0, (min(deadlines) - self.clock()) / 1e9)

    def _accept(self, selector: selectors.BaseSelector) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError:  # it left again, or no descriptor is free
            return
        if len(self._connections) >= _MAX_CONNECTIONS:
            sock.close()
            return
        sock.setblocking(False)
        connection = Connection(sock, self)
        self._connections.append(connection)
        selector.register(sock, selectors.EVENT_READ, connection)

    def _pump(self, connection: Connection, selector: selectors.BaseSelector) -> None:
        try:
            for _ in range(_RECEIVES_A_TURN):
                if not connection.receive():
                    return
        except ProtocolError as error:
            self._drop(connection, selector, f"the producer broke the protocol: {error}")
        except (OSError, EOFError):
            self._drop(connection, selector, "the connection to the producer was lost")

    def _drop_stalled(self, selector: selectors.BaseSelector) -> None:
        now = self.clock()
        for connection in list(self._connections):
            if connection.deadline_ns is not None and now >= connection.deadline_ns:
                self._drop(connection, selector, "the producer stopped in the middle of a piece")

    def _drop(self, connection: Connection, selector: selectors.BaseSelector, message: str) -> None:
        """Close the connection and fail what came over it and is not complete."""
        selector.unregister(connection.sock)
        self._connections.remove(connection)
        connection.close()
        self.transfers.fail_source(connection, message)


class Connection:
    """One producer's byte stream, cut into greeting, headers, and pages."""

    def __init__(self, sock: socket.socket, receiver: Receiver) -> None:
        self.sock = sock
        self.deadline_ns: int | None = receiver.clock() + min(
            _GREETING_TIMEOUT_NS, receiver.timeout_ns
        )
        self._receiver = receiver
        self._greeted = False
        self._buffer = bytearray(GREETING_BYTES)
        self._target = Vector([memoryview(self._buffer)])
        self._header: Header | None = None  # set while its pages arrive
        self._incoming: Incoming | None = None  # where they go; None discards them
        self._left = 0  # bytes of the frame
        self._num_views = 0
        self._access: PageAccess = page_access(receiver.pages)
        self._parts: Iterator[Part] = iter(())
        self._part: Part | None = None  # being filled
        self._at_start = True  # of a header

    def receive(self) -> bool:
        """Take what one receive gives. Returns False when nothing is there now.

        Raises EOFError, OSError, ProtocolError.
        """
        try:
            count = self._receive_pages() if self._header is not None else self._receive_control()
        except BlockingIOError:
            return False
        if count == 0:
            raise EOFError
        if self._greeted:
            # In the middle of a frame each byte buys time; between frames there is no hurry.
            idle = self._header is None and self._at_start
            self.deadline_ns = None if idle else self._receiver.clock() + self._receiver.timeout_ns
        return True

    def _receive_control(self) -> int:
        """Greeting or header bytes."""
        count = self.sock.recvmsg_into(self._target.head())[0]
        self._at_start = False
        self._target.advance(count)
        if self._target.done:
            if not self._greeted:
                self._check_greeting()
                self._expect_header()
            else:
                self._begin_frame(decode_header(self._buffer, self._receiver.layout))
        return count

    def _check_greeting(self) -> None:
        expected = MAGIC + self._receiver.token
        if not hmac.compare_digest(bytes(self._buffer), expected):
            raise ProtocolError("wrong greeting")
        self._greeted = True

    def _expect_header(self) -> None:
        self._header = self._incoming = None
        self._buffer = bytearray(HEADER_BYTES)
        self._target = Vector([memoryview(self._buffer)])
        self._at_start = True

    def _begin_frame(self, header: Header) -> None:
        """Find where the pages go. Raises ProtocolError for pages that are not due."""
        self._header = header
        self._left = header.num_blocks * self._receiver.layout.layer_block_bytes
        claimed = self._receiver.transfers.claim(
            header.digest, self, header.layer, header.first_block, header.num_blocks
        )
        if claimed is None:
            return
        self._incoming, blocks = claimed
        self._num_views = 0
        self._parts = self._access.write(header.layer, blocks)
        self._next_part()

    def _next_part(self) -> None:
        self._part = next(self._parts, None)
        if self._part is not None:
            self._num_views += len(self._part.views)
            self._target = Vector(self._part.views)

    def _receive_pages(self) -> int:
        incoming = self._incoming
        if incoming is None:
            count = self._discard()
        else:
            with incoming.lock:
                if incoming.closed:
                    self._incoming = None
                    count = self._discard()
                else:
                    count = self._receive_into(incoming)
        self._left -= count
        if self._left == 0:
            self._end_frame()
        return count

    def _discard(self) -> int:
        scratch = self._receiver.scratch
        return self.sock.recv_into(scratch[: min(self._left, len(scratch))])

    def _receive_into(self, incoming: Incoming) -> int:
        """One receive into the pages; the caller holds the transfer's lock."""
        start = self._receiver.clock()
        count = self.sock.recvmsg_into(self._target.head())[0]
        incoming.meter.add(start, self._receiver.clock(), count, 0)
        self._target.advance(count)
        if self._target.done and self._part is not None:
            self._part.finish()
            self._next_part()
        return count

    def close(self) -> None:
        self.sock.close()
        self._parts, self._part = iter(()), None
        self._target = Vector([])
        self._access.close()

    def _end_frame(self) -> None:
        header, incoming = self._header, self._incoming
        assert header is not None
        self._expect_header()
        if incoming is None:
            return
        self._receiver.transfers.received(incoming, header.num_blocks, self._num_views)
