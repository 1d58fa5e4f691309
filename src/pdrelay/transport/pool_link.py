"""A producer's link of transport `pool`: pages into slots of the shared pool."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from pdrelay.core.block_hash import tail_key
from pdrelay.core.clock import Clock
from pdrelay.errors import TransportError
from pdrelay.transport.base import HostLink, Sent, TransferFailed
from pdrelay.transport.copying import check_blocks, check_layer, copy_layer, differing
from pdrelay.transport.news import Bell, NewsQueue
from pdrelay.transport.open_transfers import OpenTransfer, OpenTransfers
from pdrelay.transport.pages import SharedPages
from pdrelay.transport.pool_file import check_keys
from pdrelay.transport.pool_staged import StagingPages
from pdrelay.transport.pool_store import Lease, PoolStore

NAME = "pool"


class PoolDescriptor(msgspec.Struct, frozen=True, tag=NAME):
    """Names the consumer in whose favour slots are pinned."""

    instance: str
    instance_index: int


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
        check_keys(keys)
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
