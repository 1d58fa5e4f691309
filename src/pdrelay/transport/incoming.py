"""A consumer's expected transfers, for transports whose own threads write the pages.

The engine's thread expects, commits and aborts; a transport's threads claim pages before they take
them off the wire, write them under the transfer's lock, and report when all are there.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from pdrelay.core.clock import Clock
from pdrelay.core.kv_layout import KVLayout
from pdrelay.errors import ProtocolError, TransportError
from pdrelay.transport.base import Arrived, TransferFailed
from pdrelay.transport.copying import check_commit
from pdrelay.transport.meter import Meter
from pdrelay.transport.news import NewsQueue


@dataclass
class Incoming:
    """One expected transfer. `lock` guards all that follows it, and the writes into `blocks`."""

    transfer_id: str
    first_block: int
    blocks: Sequence[int]
    claimed: npt.NDArray[np.bool_]  # [num_layers, len(blocks)]: received or being received
    lock: threading.Lock = field(default_factory=threading.Lock)
    closed: bool = False  # aborted, failed or arrived: nothing writes its blocks any more
    num_received: int = 0
    committed: int | None = None
    deadline_ns: int = 0
    source: object | None = None  # the connection that its pages come over
    meter: Meter = field(default_factory=Meter)


class IncomingTransfers:
    """`name` makes of a transfer id what the wire calls it."""

    def __init__(
        self,
        layout: KVLayout,
        news: NewsQueue[Arrived | TransferFailed],
        *,
        transport: str,
        timeout_ns: int,
        clock: Clock,
        name: Callable[[str], bytes] = str.encode,
    ) -> None:
        self._layout = layout
        self._news = news
        self._transport = transport
        self._timeout_ns = timeout_ns
        self._clock = clock
        self._name = name
        self._lock = threading.Lock()  # of `_incoming`; taken before a transfer's lock, if both
        self._incoming: dict[bytes, Incoming] = {}

    def expect(self, transfer_id: str, first_block: int, blocks: Sequence[int]) -> None:
        shape = (self._layout.num_layers, len(blocks))
        incoming = Incoming(transfer_id, first_block, list(blocks), np.zeros(shape, np.bool_))
        with self._lock:
            name = self._name(transfer_id)
            if name in self._incoming:
                raise TransportError(f"transfer {transfer_id} is expected already")
            self._incoming[name] = incoming

    def find(self, name: bytes) -> Incoming | None:
        with self._lock:
            return self._incoming.get(name)

    def _forget(self, incoming: Incoming) -> None:
        with self._lock:
            self._incoming.pop(self._name(incoming.transfer_id), None)

    def commit(self, transfer_id: str, num_pages: int) -> None:
        incoming = self.find(self._name(transfer_id))
        if incoming is None:
            return
        wrong = check_commit(num_pages, incoming.claimed.size)
        if wrong is not None:
            self.fail(incoming, wrong)
            return
        with incoming.lock:
            incoming.committed = num_pages
            incoming.deadline_ns = self._clock() + self._timeout_ns
        self.complete(incoming)

    def complete(self, incoming: Incoming) -> None:
        """Report the transfer if it is committed and all there. Called from both threads."""
        with incoming.lock:
            if incoming.closed or incoming.num_received != incoming.committed:
                return
            incoming.closed = True
            report = incoming.meter.report(incoming.transfer_id, self._transport)
        self._forget(incoming)
        self._news.put(Arrived(report))

    def fail(self, incoming: Incoming, message: str) -> None:
        with incoming.lock:
            if incoming.closed:
                return
            incoming.closed = True
        self._forget(incoming)
        self._news.put(TransferFailed(incoming.transfer_id, message))

    def fail_late(self) -> None:
        """Fail committed transfers whose pages did not arrive within the timeout."""
        now = self._clock()
        with self._lock:
            all_incoming = list(self._incoming.values())
        for incoming in all_incoming:
            if incoming.committed is not None and now >= incoming.deadline_ns:
                self.fail(
                    incoming,
                    f"{incoming.num_received} of {incoming.committed} pages arrived within "
                    f"{self._timeout_ns / 1e9:g} s of the commit",
                )

    def abort(self, transfer_id: str) -> None:
        incoming = self.find(self._name(transfer_id))
        if incoming is None:
            return
        with incoming.lock:  # waits for a write under way: at most one copy
            incoming.closed = True
        self._forget(incoming)

    def claim(
        self, name: bytes, source: object, layer: int, first_block: int, num_blocks: int
    ) -> tuple[Incoming, list[int]] | None:
        """Where pages that are about to come over `source` go; None: nobody wants them.

        Raises ProtocolError for pages that are not due.
        """
        incoming = self.find(name)
        if incoming is None:
            return None
        start = first_block - incoming.first_block
        stop = start + num_blocks
        if start < 0 or stop > len(incoming.blocks):
            raise ProtocolError("pages outside the expected blocks")
        with incoming.lock:
            if incoming.source not in (None, source):
                raise ProtocolError("pages of another producer's transfer")
            if incoming.claimed[layer, start:stop].any():
                raise ProtocolError("pages that were sent before")
            incoming.source = source
            incoming.claimed[layer, start:stop] = True
        return incoming, list(incoming.blocks[start:stop])

    def received(self, incoming: Incoming, num_blocks: int, num_pieces: int) -> None:
        """Claimed pages are in place."""
        with incoming.lock:
            incoming.num_received += num_blocks
            incoming.meter.num_pieces += num_pieces
        self.complete(incoming)

    def fail_source(self, source: object, message: str) -> None:
        """Its connection ended: fail what came over it and is not complete."""
        with self._lock:
            mine = [i for i in self._incoming.values() if i.source is source]
        for incoming in mine:
            if incoming.num_received < incoming.claimed.size:
                self.fail(incoming, message)
