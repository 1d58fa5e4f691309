"""Transport `pool`: producers put pages into a shared CPU pool, consumers take them.

The pool is also a prefix cache for all instances of one host: a block that is ready under its key
is not written again (where its bytes are the same), and any instance can load it.

Producers need no slots of the consumer, so nothing of theirs ever waits for a reservation.
Pages of a device pass through pinned memory (`pool_staged.py`); consumers take slots directly.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from pdrelay.core.block_hash import tail_key
from pdrelay.core.clock import Clock, monotonic_ns
from pdrelay.core.kv_layout import KVLayout
from pdrelay.errors import ConfigError, TransportError
from pdrelay.transport.base import (
    Arrived,
    Capabilities,
    Descriptor,
    HostLink,
    PrefixStore,
    ProducerLink,
    Sent,
    TransferFailed,
)
from pdrelay.transport.copying import (
    Pages,
    check_blocks,
    check_commit,
    check_compatible,
    check_layer,
    close_fds,
    copy_layer,
    decode_descriptor,
    differing,
)
from pdrelay.transport.device import Device, DevicePages, page_runs
from pdrelay.transport.meter import Meter
from pdrelay.transport.news import Bell, NewsQueue
from pdrelay.transport.open_transfers import OpenTransfer, OpenTransfers
from pdrelay.transport.options import TransportOptions
from pdrelay.transport.pages import SharedPages
from pdrelay.transport.pool_staged import StagedPoolLink, StagingPages
from pdrelay.transport.pool_store import (
    KEY_BYTES,
    Lease,
    PoolDescription,
    PoolStats,
    PoolStore,
    create_pool_file,
)

NAME = "pool"
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


class PoolDescriptor(msgspec.Struct, frozen=True, tag=NAME):
    """Names the consumer in whose favour slots are pinned."""

    instance: str
    instance_index: int


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
        staged=True,
        layer_wise=False,
        needs_slots=False,
        cross_host=False,
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
        return StagedPoolLink(self._pages, link, self._bell, _check_keys)

    # ---- consumer

    def expect(
        self, transfer_id: str, first_block: int, blocks: Sequence[int], keys: Sequence[bytes]
    ) -> None:
        check_blocks(blocks, self._pages.layout, "local")
        if transfer_id in self._incoming:
            raise TransportError(f"transfer {transfer_id} is expected already")
        wanted = list(keys[first_block : first_block + len(blocks)])
        _check_keys(wanted)
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


@dataclass
class _Outgoing(OpenTransfer):
    keys: list[bytes] = field(default_factory=list)
    lease: Lease | None = None
    slots: dict[int, int] = field(default_factory=dict)  # request block to slot
    # Request blocks that the pool has already, and the layers (as bits) found to be equal.
    shared: dict[int, int] = field(default_factory=dict)
    own: list[int] = field(default_factory=list)  # slots that we write
    failed: bool = False


class PoolLink(HostLink):
    """Writes from the engine's own thread: when `abort` returns, no store is under way."""

    def __init__(
        self,
        pages: SharedPages | StagingPages,
        store: PoolStore,
        index: int,
        consumer: PoolDescriptor,
        bell: Bell,
        clock: Clock,
    ) -> None:
        self._pages = pages
        self._store = store
        self._index = index
        self._consumer = consumer
        self._clock = clock
        self._news: NewsQueue[Sent | TransferFailed] = NewsQueue(bell)
        self._open: OpenTransfers[_Outgoing] = OpenTransfers()

    def begin(self, transfer_id: str, keys: Sequence[bytes]) -> None:
        _check_keys(keys)
        self._open.begin(_Outgoing(transfer_id, keys=list(keys)))

    def send(
        self,
        transfer_id: str,
        layer: int,
        first_block: int,
        src_blocks: Sequence[int],
        dst_blocks: Sequence[int],
    ) -> None:
        """`dst_blocks` is ignored. Slots are taken when a block is first sent, and not before:
        a prompt that waits for its prefill holds nothing."""
        outgoing = self._open.sending(transfer_id)
        check_layer(layer, self._pages.layout)
        check_blocks(src_blocks, self._pages.layout, "local")
        if first_block < 0 or first_block + len(src_blocks) > len(outgoing.keys):
            raise TransportError(f"blocks behind the last of {len(outgoing.keys)} keys")
        if outgoing.failed:
            return
        try:
            self._place(outgoing, first_block, first_block + len(src_blocks))
            self._write(outgoing, layer, first_block, src_blocks)
        except TransportError as error:
            self._fail(outgoing, str(error))

    def _place(self, outgoing: _Outgoing, first: int, stop: int) -> None:
        blocks = [block for block in range(first, stop) if block not in outgoing.slots]
        if not blocks:
            return
        if outgoing.lease is None:
            outgoing.lease = self._store.open_lease(
                outgoing.transfer_id, self._index, self._consumer.instance_index
            )
        first, stop = blocks[0], blocks[-1] + 1
        if len(blocks) != stop - first:
            raise TransportError("blocks of one send were partly sent before")
        unique = tail_key(outgoing.transfer_id)
        keys = outgoing.keys[first:stop]
        private = [key == unique for key in keys]
        placed = self._store.place(outgoing.lease, first, keys, self._index, private=private)
        for block, place in zip(blocks, placed, strict=True):
            outgoing.slots[block] = place.slot
            if place.shared:
                outgoing.shared[block] = 0
            else:
                outgoing.own.append(place.slot)

    def _write(
        self, outgoing: _Outgoing, layer: int, first_block: int, src_blocks: Sequence[int]
    ) -> None:
        start = self._clock()
        src, dst, shared = [], [], []
        for block, page in enumerate(src_blocks, first_block):
            if block in outgoing.shared:
                shared.append((block, page))
            else:
                src.append(page)
                dst.append(outgoing.slots[block])
        moved = len(src)
        pieces = copy_layer(self._pages.array, self._store.slots, layer, src, dst)
        if shared:
            split = self._compare(outgoing, layer, shared)
            moved += split
            pieces += split
        num_bytes = moved * self._pages.layout.layer_block_bytes
        if moved:
            outgoing.meter.add(start, self._clock(), num_bytes, pieces)

    def _compare(self, outgoing: _Outgoing, layer: int, shared: Sequence[tuple[int, int]]) -> int:
        """Look whether the pool's pages are ours, bit for bit; give a block its own slot if not.

        Equal tokens give equal pages only up to rounding: another instance may have cut the prompt
        into other chunks. The consumer is promised the producer's very bytes (checksum, and the
        same tokens as without a pool). Returns the pages copied.
        """
        pages, slots = self._pages.array, self._store.slots
        where = [outgoing.slots[block] for block, _ in shared]
        unequal = differing(pages, slots, layer, [page for _, page in shared], where)
        copied = 0
        for i in unequal:
            block, page = shared[i]
            copied += self._split(outgoing, block, layer, page)
        for block, _ in shared:
            if block in outgoing.shared:
                outgoing.shared[block] |= 1 << layer
        return copied

    def _split(self, outgoing: _Outgoing, block: int, layer: int, page: int) -> int:
        assert outgoing.lease is not None
        slots, old = self._store.slots, outgoing.slots[block]
        slot = self._store.split(outgoing.lease, outgoing.keys[block], self._index)
        outgoing.own.append(slot)
        equal = outgoing.shared.pop(block)
        layers = [k for k in range(self._pages.layout.num_layers) if equal >> k & 1]
        for k in layers:
            slots[k, slot] = slots[k, old]
        slots[layer, slot] = self._pages.array[layer, page]
        self._store.swap(outgoing.lease, block, slot)
        outgoing.slots[block] = slot
        return len(layers) + 1

    def finish(self, transfer_id: str) -> None:
        outgoing = self._open.finish(transfer_id)
        if not outgoing.failed:
            try:
                if outgoing.lease is not None:
                    self._store.finish(outgoing.lease, outgoing.own)
                self._news.put(Sent(outgoing.meter.report(transfer_id, NAME)))
            except TransportError as error:
                self._fail(outgoing, str(error))
        self._open.pop(transfer_id)

    def _fail(self, outgoing: _Outgoing, message: str) -> None:
        self._let_go(outgoing)
        outgoing.failed = True
        self._news.put(TransferFailed(outgoing.transfer_id, message))

    def _let_go(self, outgoing: _Outgoing) -> None:
        if outgoing.failed or outgoing.lease is None:
            return
        self._store.release(outgoing.transfer_id)
        self._store.abandon(outgoing.own)

    def poll(self) -> list[Sent | TransferFailed]:
        return self._news.take()

    def abort(self, transfer_id: str) -> bool:
        outgoing = self._open.pop(transfer_id)
        if outgoing is not None:
            self._let_go(outgoing)
        return True

    def close(self) -> None:
        if self._open.broken:
            return
        for outgoing in self._open.break_off("the link is closed"):
            self._let_go(outgoing)
        self._news.take()


class PoolPrefixStore:
    """The pool as a prefix cache of one instance. Trouble with the pool is a miss."""

    def __init__(
        self, pages: SharedPages | DevicePages, store: PoolStore, instance_index: int
    ) -> None:
        self._pages = pages
        self._store = store
        self._index = instance_index
        self._num_loads = 0

    def match(self, keys: Sequence[bytes]) -> int:
        try:
            return self._store.match(keys)
        except TransportError:
            return 0

    def load(self, keys: Sequence[bytes], dst_blocks: Sequence[int]) -> int:
        check_blocks(dst_blocks, self._pages.layout, "local")
        wanted = keys[: len(dst_blocks)]
        self._num_loads += 1
        name = f"prefix:{self._index}:{self._num_loads}"
        try:
            slots = self._store.pin_prefix(name, wanted, self._index)
        except TransportError:
            return 0
        if not slots:
            return 0
        try:
            for layer in range(self._pages.layout.num_layers):
                load_layer(self._store.slots, self._pages, layer, slots, dst_blocks[: len(slots)])
        finally:
            self._store.release(name)
        return len(slots)


def load_layer(
    slots: Pages,
    pages: SharedPages | DevicePages,
    layer: int,
    src_slots: Sequence[int],
    dst_blocks: Sequence[int],
) -> int:
    """Copy one layer from the pool's slots into pages; a device's copy is waited for. Returns the
    number of copies."""
    if isinstance(pages, SharedPages):
        return copy_layer(slots, pages.array, layer, src_slots, dst_blocks)
    layout = msgspec.structs.replace(pages.layout, num_blocks=slots.shape[1])
    runs = page_runs(
        layout, slots.ctypes.data, pages.layout, pages.address, layer, src_slots, dst_blocks
    )
    pages.device.copy(runs, None).wait()
    return len(runs)


def _check_keys(keys: Sequence[bytes]) -> None:
    if any(len(key) != KEY_BYTES for key in keys):
        raise TransportError(f"keys of the shared pool are {KEY_BYTES} bytes long")


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
