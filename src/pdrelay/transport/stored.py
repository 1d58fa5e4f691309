"""The consumer's bookkeeping where producers store into its pages: nothing is received."""

from __future__ import annotations

from collections.abc import Sequence

from pdrelay.core.clock import Clock
from pdrelay.core.kv_layout import KVLayout
from pdrelay.errors import TransportError
from pdrelay.transport.base import Arrived, TransferFailed
from pdrelay.transport.copying import check_blocks, check_commit
from pdrelay.transport.meter import Meter
from pdrelay.transport.news import NewsQueue


class StoredTransfers:
    """Transfers that are expected; each ends with its commit or is forgotten."""

    def __init__(
        self,
        layout: KVLayout,
        transport: str,
        news: NewsQueue[Arrived | TransferFailed],
        clock: Clock,
    ) -> None:
        self._layout = layout
        self._transport = transport
        self._news = news
        self._clock = clock
        self._pages_due: dict[str, int] = {}  # by transfer id

    def expect(self, transfer_id: str, blocks: Sequence[int]) -> None:
        """Raises TransportError for a known transfer or blocks out of range."""
        if transfer_id in self._pages_due:
            raise TransportError(f"transfer {transfer_id} is expected already")
        check_blocks(blocks, self._layout, "local")
        self._pages_due[transfer_id] = len(blocks) * self._layout.num_layers

    def commit(self, transfer_id: str, num_pages: int) -> None:
        """The producer's stores were complete before its commit left: nothing is left to do, or to
        time; what reads the pages from now on sees them."""
        due = self._pages_due.pop(transfer_id, None)
        if due is None:
            return
        wrong = check_commit(num_pages, due)
        if wrong is not None:
            self._news.put(TransferFailed(transfer_id, wrong))
            return
        now = self._clock()
        meter = Meter(num_bytes=num_pages * self._layout.layer_block_bytes)
        meter.start_ns = meter.end_ns = now
        self._news.put(Arrived(meter.report(transfer_id, self._transport)))

    def forget(self, transfer_id: str) -> None:
        self._pages_due.pop(transfer_id, None)

    def clear(self) -> None:
        self._pages_due.clear()
