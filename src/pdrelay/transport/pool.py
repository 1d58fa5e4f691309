"""Transport `pool`: producers put pages into a shared CPU pool, consumers take them.

The pool is also a prefix cache for all instances of one host: a block that is ready under its key
is not written again (where its bytes are the same), and any instance can load it.

Producers need no slots of the consumer, so nothing of theirs ever waits for a reservation. Here is
the consumer's half; `pool_link.py` is the producer's, `pool_prefix.py` the cache. Pages of a device
pass through pinned memory (`pool_staged.py`); consumers take slots directly.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from pdrelay.core.clock import Clock, monotonic_ns
from pdrelay.core.kv_layout import KVLayout
from pdrelay.errors import ConfigError, TransportError
from pdrelay.transport.base import (
    Arrived,
    Capabilities,
    Descriptor,
    PrefixStore,
    ProducerLink,
    TransferFailed,
)
from pdrelay.transport.copying import (
    check_blocks,
    check_commit,
    check_compatible,
    close_fds,
    decode_descriptor,
)
from pdrelay.transport.device import Device, DevicePages
from pdrelay.transport.meter import Meter
from pdrelay.transport.news import Bell, NewsQueue
from pdrelay.transport.options import TransportOptions
from pdrelay.transport.pages import SharedPages
from pdrelay.transport.pool_file import PoolDescription, check_keys, create_pool_file
from pdrelay.transport.pool_link import NAME, PoolDescriptor, PoolLink
from pdrelay.transport.pool_prefix import PoolPrefixStore, load_layer
from pdrelay.transport.pool_staged import StagedPoolLink, StagingPages
from pdrelay.transport.pool_store import PoolStats, PoolStore

_NUM_LEASES = 1024  # transfers under way in one server, at most


@dataclass(frozen=True)
class PoolHandle:
    """A pool to hand to ranks: `fd` by inheritance, `description` as bytes (msgpack).

    The launcher keeps it as long as the server runs, calls `reclaim` after an instance died, and
    `close` at the end; the memory goes with the last process that maps it.
    """

    fd: int
    description: bytes

    def open(self, *, timeout_s: float = 10.0) -> PoolStore:
        """Raises TransportError when fd and description do not belong together."""
        try:
            description = msgspec.msgpack.decode(self.description, type=PoolDescription)
        except msgspec.MsgspecError as error:
            raise TransportError(f"the shared pool's description is damaged: {error}") from error
        return PoolStore(self.fd, description, timeout_s=timeout_s)

    def reclaim(self, instance_index: int) -> None:
        """Free what the dead instance held, before another takes its index."""
        store = self.open()
        try:
            store.reclaim(instance_index)
        finally:
            store.close()

    def stats(self) -> PoolStats:
        store = self.open()
        try:
            return store.stats()
        finally:
            store.close()

    def close(self) -> None:
        os.close(self.fd)


def create_pool(layout: KVLayout, num_slots: int) -> PoolHandle:
    """Make a pool of `num_slots` blocks for pages of `layout` (its `num_blocks` does not matter).

    Takes `num_slots * layout.block_bytes` bytes of memory once all slots were used. Raises
    ConfigError for no slots, TransportError when the memory cannot be had.
    """
    if num_slots < 1:
        raise ConfigError(f"a shared pool of {num_slots} blocks is no pool: give it more memory")
    description = PoolDescription(
        layout=msgspec.structs.replace(layout, num_blocks=num_slots), num_leases=_NUM_LEASES
    )
    return PoolHandle(create_pool_file(description), msgspec.msgpack.encode(description))


@dataclass
class _Incoming:
    """`lock` guards `closed` and the writes into `blocks`, as in transport tcp."""

    transfer_id: str
    first_block: int
    blocks: list[int]
    keys: list[bytes]  # of request blocks `first_block ..`
    lock: threading.Lock = field(default_factory=threading.Lock)
    closed: bool = False
    meter: Meter = field(default_factory=Meter)


class PoolTransport:
    capabilities = Capabilities(
        name=NAME,
        needs_slots=False,
        prefix_store=True,
    )

    def __init__(
        self,
        pages: SharedPages | DevicePages,
        handle: PoolHandle,
        instance_index: int,
        instance: str = "",
        *,
        timeout_s: float = 30.0,
        clock: Clock = monotonic_ns,
    ) -> None:
        """Raises TransportError when the pool cannot be mapped or holds other pages."""
        self._pages = pages
        self.device: Device | None = None if isinstance(pages, SharedPages) else pages.device
        self._instance = instance
        self._index = instance_index
        self._clock = clock
        self._store = handle.open(timeout_s=timeout_s)
        try:
            check_compatible(pages.layout, self._store.layout)
            self._store.reclaim(instance_index)  # of an earlier incarnation
        except TransportError:
            self._store.close()
            raise
        self._pinned = self._pin()
        self.prefix_store: PrefixStore | None = PoolPrefixStore(pages, self._store, instance_index)
        self._bell = Bell()
        self._news: NewsQueue[Arrived | TransferFailed] = NewsQueue(self._bell)
        self._incoming: dict[str, _Incoming] = {}
        self._jobs: queue.SimpleQueue[_Incoming | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._closed = False

    def _pin(self) -> bool:
        """Let a device copy to and from the slots directly; slower, but right, without."""
        if self.device is None:
            return False
        slots = self._store.slots
        try:
            self.device.pin(slots.ctypes.data, slots.nbytes)
        except TransportError:
            return False
        return True

    # ---- producer

    def descriptor(self) -> Descriptor:
        return Descriptor(msgspec.msgpack.encode(PoolDescriptor(self._instance, self._index)))

    def connect(self, layout: KVLayout, descriptor: Descriptor) -> ProducerLink:
        close_fds(descriptor.fds)
        check_compatible(self._pages.layout, layout)
        consumer = decode_descriptor(descriptor, PoolDescriptor)

        def link(pages: SharedPages | StagingPages, bell: Bell) -> PoolLink:
            return PoolLink(pages, self._store, self._index, consumer, bell, self._clock)

        if isinstance(self._pages, SharedPages):
            return link(self._pages, self._bell)
        return StagedPoolLink(self._pages, link, self._bell)

    # ---- consumer

    def expect(
        self, transfer_id: str, first_block: int, blocks: Sequence[int], keys: Sequence[bytes]
    ) -> None:
        check_blocks(blocks, self._pages.layout, "local")
        if transfer_id in self._incoming:
            raise TransportError(f"transfer {transfer_id} is expected already")
        wanted = list(keys[first_block : first_block + len(blocks)])
        check_keys(wanted)
        if len(wanted) != len(blocks):
            raise TransportError(f"{len(blocks)} blocks are expected under {len(wanted)} keys")
        self._incoming[transfer_id] = _Incoming(transfer_id, first_block, list(blocks), wanted)

    def commit(self, transfer_id: str, num_pages: int) -> None:
        incoming = self._incoming.get(transfer_id)
        if incoming is None:
            return
        wrong = check_commit(num_pages, len(incoming.blocks) * self._pages.layout.num_layers)
        if wrong is not None:
            self.abort(transfer_id)
            self._news.put(TransferFailed(transfer_id, wrong))
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="kv-pool-taker", daemon=True)
            self._thread.start()
        self._jobs.put(incoming)

    def poll(self) -> list[Arrived | TransferFailed]:
        news = self._news.take()
        for item in news:
            done = item.transfer_id if isinstance(item, TransferFailed) else item.report.transfer_id
            self._incoming.pop(done, None)
        return news

    def abort(self, transfer_id: str) -> None:
        """Also lets go of what a producer finished for a transfer forgotten here already."""
        incoming = self._incoming.pop(transfer_id, None)
        if incoming is not None:
            with incoming.lock:  # waits for a copy under way: at most one layer
                incoming.closed = True
        self._store.release(transfer_id)

    def fileno(self) -> int:
        return self._bell.fileno()

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        for transfer_id in list(self._incoming):
            self.abort(transfer_id)
        if self._thread is not None:
            self._jobs.put(None)
            self._thread.join()
        if self._pinned and self.device is not None:
            self.device.unpin(self._store.slots.ctypes.data)
        self._store.reclaim(self._index)
        self._store.close()
        self._bell.close()

    # ---- the thread

    def _run(self) -> None:
        while (incoming := self._jobs.get()) is not None:
            try:
                if self._take(incoming):
                    report = incoming.meter.report(incoming.transfer_id, NAME)
                    self._news.put(Arrived(report))
            except TransportError as error:
                with contextlib.suppress(TransportError):  # `close` and `reclaim` release it too
                    self._store.release(incoming.transfer_id)
                self._news.put(TransferFailed(incoming.transfer_id, str(error)))

    def _take(self, incoming: _Incoming) -> bool:
        """Copy the pages from the pool. Returns False when the transfer was aborted meanwhile."""
        slots = self._store.take(incoming.transfer_id, incoming.first_block, incoming.keys)
        layout = self._pages.layout
        for layer in range(layout.num_layers):
            with incoming.lock:
                if incoming.closed:
                    return False
                start = self._clock()
                pieces = load_layer(self._store.slots, self._pages, layer, slots, incoming.blocks)
                num_bytes = len(slots) * layout.layer_block_bytes
                incoming.meter.add(start, self._clock(), num_bytes, pieces)
        self._store.release(incoming.transfer_id)
        return True


def create(
    pages: SharedPages | DevicePages, instance: str, options: TransportOptions
) -> PoolTransport:
    """Raises ConfigError without a pool."""
    if options.pool_fd < 0 or not options.pool:
        raise ConfigError("transport 'pool' needs a shared pool: start it with 'pdrelay serve'")
    handle = PoolHandle(options.pool_fd, options.pool)
    return PoolTransport(
        pages, handle, options.instance_index, instance, timeout_s=options.timeout_s
    )
