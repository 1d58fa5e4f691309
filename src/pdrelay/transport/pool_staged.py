"""A producer's link of transport `pool` whose pages are a device's.

The engine's thread only queues what it wants moved; a thread of the link brings pages to pinned
memory and hands them to a `PoolLink`, as if they were pages of the host.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pdrelay.core.kv_layout import KVLayout
from pdrelay.errors import TransportError
from pdrelay.transport.base import HostLink, ProducerLink, Sent, Stopped, TransferFailed
from pdrelay.transport.copying import check_blocks, check_layer
from pdrelay.transport.device import DevicePages
from pdrelay.transport.news import Bell, NewsQueue
from pdrelay.transport.open_transfers import OpenTransfer, OpenTransfers
from pdrelay.transport.pool_file import check_keys
from pdrelay.transport.staging import StagedAccess


class StagingPages:
    """A buffer that looks like pages: block i of any layer is block i of the buffer."""

    def __init__(self, layout: KVLayout, num_blocks: int) -> None:
        self.layout = layout
        self._shape = (layout.num_layers, num_blocks, layout.layer_block_bytes)
        self.array: npt.NDArray[np.uint8] = np.empty((0, 0, 0), np.uint8)

    def show(self, blocks: npt.NDArray[np.uint8]) -> int:
        """Let the buffer be `blocks`, whole blocks one after the other. Returns how many."""
        _, _, size = self._shape
        pages = blocks.reshape(-1, size)
        self.array = np.broadcast_to(pages, (self._shape[0], *pages.shape))
        return len(pages)


@dataclass
class _Outgoing(OpenTransfer):
    num_keys: int = 0
    closed: bool = False  # aborted: what is queued is dropped
    begun: bool = False  # at the inner link; the thread's


_Job = tuple[_Outgoing, Callable[[], None]]


class StagedPoolLink(HostLink):
    def __init__(
        self,
        pages: DevicePages,
        inner: Callable[[StagingPages, Bell], ProducerLink],
        bell: Bell,
    ) -> None:
        self._pages = pages
        self._access = StagedAccess(pages)
        self._staging = StagingPages(pages.layout, self._access.blocks_a_part)
        self._inner_bell = Bell()
        self._inner = inner(self._staging, self._inner_bell)
        self._open: OpenTransfers[_Outgoing] = OpenTransfers()
        self._news: NewsQueue[Sent | Stopped | TransferFailed] = NewsQueue(bell)
        self._lock = threading.Lock()  # of `_open` and `closed`
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="kv-pool-putter", daemon=True)
        self._thread.start()

    # ---- the engine's thread

    def begin(self, transfer_id: str, keys: Sequence[bytes]) -> None:
        check_keys(keys)
        keys = list(keys)
        outgoing = _Outgoing(transfer_id, num_keys=len(keys))
        with self._lock:
            self._open.begin(outgoing)
        self._jobs.put((outgoing, lambda: self._begin(outgoing, keys)))

    def send(
        self,
        transfer_id: str,
        layer: int,
        first_block: int,
        src_blocks: Sequence[int],
        dst_blocks: Sequence[int],
    ) -> None:
        with self._lock:
            self._open.check_alive()
            outgoing = self._open.sending(transfer_id)
        check_layer(layer, self._pages.layout)
        check_blocks(src_blocks, self._pages.layout, "local")
        if first_block < 0 or first_block + len(src_blocks) > outgoing.num_keys:
            raise TransportError(f"blocks behind the last of {outgoing.num_keys} keys")
        blocks, after = list(src_blocks), self._pages.device.writes_of(layer)

        def job() -> None:
            done = 0
            for part in self._access.read(layer, blocks, after):
                count = self._staging.show(np.frombuffer(part.views[0], np.uint8))
                if outgoing.closed:
                    return
                self._inner.send(transfer_id, layer, first_block + done, range(count), ())
                done += count

        self._jobs.put((outgoing, job))

    def finish(self, transfer_id: str) -> None:
        with self._lock:
            outgoing = self._open.finish(transfer_id)
        self._jobs.put((outgoing, lambda: self._inner.finish(transfer_id)))

    def poll(self) -> list[Sent | Stopped | TransferFailed]:
        return self._news.take()

    def abort(self, transfer_id: str) -> bool:
        """The pool's slots may still be written for a moment, but nobody takes them."""
        with self._lock:
            outgoing = self._open.pop(transfer_id)
            if outgoing is not None:
                outgoing.closed = True
        if outgoing is not None:
            self._jobs.put((outgoing, lambda: None))  # lets go of what it holds
        return True

    def close(self) -> None:
        with self._lock:
            if self._open.broken:
                return
            for outgoing in self._open.break_off("the link is closed"):
                outgoing.closed = True
        self._jobs.put(None)
        self._thread.join()
        self._inner.close()
        self._inner_bell.close()
        self._access.close()
        self._news.take()

    # ---- the thread

    def _begin(self, outgoing: _Outgoing, keys: list[bytes]) -> None:
        self._inner.begin(outgoing.transfer_id, keys)
        outgoing.begun = True

    def _run(self) -> None:
        while (item := self._jobs.get()) is not None:
            outgoing, job = item
            if not outgoing.closed:
                try:
                    job()
                except TransportError as error:
                    self._end(outgoing, TransferFailed(outgoing.transfer_id, str(error)))
            for news in self._inner.poll():
                self._end(outgoing, news)
            if outgoing.closed and outgoing.begun:
                outgoing.begun = False
                self._inner.abort(outgoing.transfer_id)

    def _end(self, outgoing: _Outgoing, news: Sent | Stopped | TransferFailed) -> None:
        """One news of each transfer, and none of one that was aborted meanwhile."""
        with self._lock:
            if outgoing.closed:
                return
            outgoing.closed = True
            if self._open.is_open(outgoing):
                self._open.pop(outgoing.transfer_id)
            self._news.put(news)
        if isinstance(news, Sent):
            outgoing.begun = False
