"""Transport `mapped` on accelerators: the producer stores into the consumer's pool.

The consumer's pool is opened once an incarnation, by a handle that names exactly it. Pages go
there in two ways, each (layer, block) by exactly one (`core/hand_over.py`):

- *fused*: the kernel that writes a layer's K and V into the producer's pages stores them into the
  consumer's as well (`RemotePool`). It costs no launch and no further read.
- *copied*: whole pages, on the side stream, behind the writes of their layer: slots that were
  promised late, blocks out of the producer's prefix cache, a prompt's last block (whose unwritten
  rest makes the pages equal, so that a checksum covers them), further consumers of one step.

**Why the consumer may reuse a page.** It gives a promised block back after `Commit`, `Closed`,
`Cancel` or the producer's end, and on its own side all work that touched the block is complete
(the scheduler keeps blocks of steps in flight). Stores from here are asynchronous, so each of these
must mean *completed*, not *enqueued*:

- `Commit` follows `Sent`, which follows the event behind the transfer's last copy, and the end of
  every step whose kernels stored for it (`RemoteTransfer.stored` is called then).
- `Closed` and `Cancel` leave the producer when its `abort` said that nothing is under way, or when
  `Stopped` came; and when no launched step still stores for the request (`engine/peer.py`).
- A producer's socket ends when its process does, but a device may finish a kernel of a process
  that was killed. The consumer waits for the process, which the kernel reaps only after its device
  contexts are gone (`engine/consumer.py`).
- A mapping is closed behind everything that may use it, never while work is launched: an unmapped
  page would take the whole device context down.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import msgspec

from pdrelay.core.clock import Clock, monotonic_ns
from pdrelay.core.kv_layout import KVLayout
from pdrelay.errors import TransportError
from pdrelay.transport.base import (
    Arrived,
    Capabilities,
    Descriptor,
    PrefixStore,
    ProducerLink,
    RemotePool,
    Sent,
    Stopped,
    TransferFailed,
)
from pdrelay.transport.completions import Completions
from pdrelay.transport.copying import (
    check_blocks,
    check_compatible,
    check_layer,
    check_slots,
    close_fds,
    decode_descriptor,
)
from pdrelay.transport.device import (
    AllOf,
    BlockPairs,
    Copy,
    Device,
    DevicePages,
    Event,
    PageMove,
    PagePool,
    alike,
)
from pdrelay.transport.news import Bell, NewsQueue
from pdrelay.transport.open_transfers import OpenTransfer, OpenTransfers
from pdrelay.transport.stored import StoredTransfers

NAME = "mapped"
# Layers are copied together until they are worth a launch (5 µs of NVLink), or a round is over.
BATCH_BYTES = 2 << 20
# A long round starts before it is over, so that the host says the rest while the device copies: 85
# µs of NVLink are more than what it takes to say and launch as much again, or twice as much.
ROUND_BYTES = 32 << 20
_CLOSE_TIMEOUT_S = 10.0


class DeviceDescriptor(msgspec.Struct, frozen=True, tag="mapped-device"):
    instance: str
    device: str  # "cuda:1", for messages
    device_uuid: str
    num_bytes: int
    handle: bytes


class DeviceMappedTransport:
    capabilities = Capabilities(
        name=NAME,
        needs_slots=True,
        prefix_store=False,
        remote_stores=True,
    )
    prefix_store: PrefixStore | None = None

    def __init__(self, pages: DevicePages, instance: str, *, clock: Clock = monotonic_ns) -> None:
        self._pages = pages
        self.device: Device | None = pages.device
        self._instance = instance
        self._clock = clock
        self._bell = Bell()
        self._news: NewsQueue[Arrived | TransferFailed] = NewsQueue(self._bell)
        self._stored = StoredTransfers(pages.layout, NAME, self._news, clock)
        self._completions = Completions("kv-mapped")
        self._mappings: list[int] = []  # opened and not closed yet
        self._closed = False
        pages.device.prepare_page_copies(PagePool(pages.layout, pages.address))

    def descriptor(self) -> Descriptor:
        """Raises TransportError where the driver does not share memory between processes."""
        pages = self._pages
        data = DeviceDescriptor(
            self._instance,
            pages.device.name,
            pages.device.uuid,
            pages.layout.total_bytes,
            pages.ipc_handle(),
        )
        return Descriptor(msgspec.msgpack.encode(data))

    def connect(self, layout: KVLayout, descriptor: Descriptor) -> ProducerLink:
        close_fds(descriptor.fds)
        check_compatible(self._pages.layout, layout)
        peer = decode_descriptor(descriptor, DeviceDescriptor)
        if peer.num_bytes != layout.total_bytes:
            raise TransportError("the consumer's pages are not as large as laid out")
        address = self._pages.device.open_peer(peer.handle, peer.num_bytes)
        self._mappings.append(address)
        return DeviceMappedLink(
            self._pages,
            layout,
            address,
            self._bell,
            self._completions,
            close_mapping=self._close_mapping,
            clock=self._clock,
        )

    def _close_mapping(self, address: int, problem: str) -> None:
        if not problem:  # on a device that failed nothing can be unmapped: it goes with the process
            self._mappings.remove(address)
            self._pages.device.close_peer(address)

    def expect(
        self, transfer_id: str, first_block: int, blocks: Sequence[int], keys: Sequence[bytes]
    ) -> None:
        self._stored.expect(transfer_id, blocks)

    def commit(self, transfer_id: str, num_pages: int) -> None:
        self._stored.commit(transfer_id, num_pages)

    def poll(self) -> list[Arrived | TransferFailed]:
        self._completions.reap()
        return self._news.take()

    def abort(self, transfer_id: str) -> None:
        """Forget the transfer. A producer may go on storing until *it* says `Closed`."""
        self._stored.forget(transfer_id)

    def fileno(self) -> int:
        return self._bell.fileno()

    def close(self) -> None:
        """Waits, for some seconds at most, until nothing uses the mappings of closed links."""
        if self._closed:
            return
        self._closed = True
        self._stored.clear()
        self._completions.close(_CLOSE_TIMEOUT_S)
        self._bell.close()


@dataclass
class _Outgoing(OpenTransfer):
    queued: list[PageMove] = field(default_factory=list)
    num_queued: int = 0  # pages
    room: int = 0  # pages; the queue of this round starts when it is longer
    copies: list[Copy] = field(default_factory=list)
    # The latest blocks: the layers of a chunk have the same ones, and share their pairs.
    blocks: tuple[list[int], list[int]] = ([], [])
    pairs: BlockPairs | None = None  # None: no blocks
    num_pairs: int = 0


class DeviceMappedLink:
    """Everything is called from the engine's thread, but callbacks may come from the waiting one:
    `_lock` guards what both touch."""

    def __init__(
        self,
        pages: DevicePages,
        remote_layout: KVLayout,
        remote_address: int,
        bell: Bell,
        completions: Completions,
        *,
        close_mapping: Callable[[int, str], None],
        clock: Clock,
    ) -> None:
        self._pages = pages
        self._device = pages.device
        self._local = PagePool(pages.layout, pages.address)
        self._remote = PagePool(remote_layout, remote_address)
        self._num_layers = pages.layout.num_layers
        self._round_pages = max(1, ROUND_BYTES // pages.layout.layer_block_bytes)
        self._completions = completions
        self._close_mapping = close_mapping
        self._clock = clock
        self._news: NewsQueue[Sent | Stopped | TransferFailed] = NewsQueue(bell)
        self._open: OpenTransfers[_Outgoing] = OpenTransfers()
        self._lock = threading.RLock()
        self._last_copy: Copy | None = None
        self._over: Event | None = None  # set by `close`: behind all that may use the mapping
        self.remote_pool: RemotePool | None = RemotePool(
            remote_layout, pages.device.peer_tensor(remote_layout, remote_address)
        )

    def begin(self, transfer_id: str, keys: Sequence[bytes]) -> None:
        with self._lock:
            self._open.begin(_Outgoing(transfer_id, room=self._round_pages))

    def send(
        self,
        transfer_id: str,
        layer: int,
        first_block: int,
        src_blocks: Sequence[int],
        dst_blocks: Sequence[int],
    ) -> None:
        # Without the lock: the waiting thread ends only transfers that are finished.
        outgoing = self._open.get(transfer_id)
        if outgoing is None or outgoing.finished:
            self._open.check_alive()
            outgoing = self._open.sending(transfer_id)
        if not 0 <= layer < self._num_layers:
            check_layer(layer, self._local.layout)
        if outgoing.blocks != (src_blocks, dst_blocks):
            self._pair(outgoing, src_blocks, dst_blocks)
        if outgoing.pairs is None:
            return
        outgoing.queued.append(PageMove(layer, outgoing.pairs))
        outgoing.num_queued += outgoing.num_pairs
        if outgoing.num_queued >= outgoing.room:
            outgoing.room *= 2
            self._start(outgoing)

    def _pair(
        self, outgoing: _Outgoing, src_blocks: Sequence[int], dst_blocks: Sequence[int]
    ) -> None:
        """Raises TransportError for blocks that do not exist."""
        check_slots(src_blocks, dst_blocks)
        check_blocks(src_blocks, self._local.layout, "local")
        check_blocks(dst_blocks, self._remote.layout, "remote")
        outgoing.blocks = (list(src_blocks), list(dst_blocks))
        outgoing.pairs = BlockPairs(src_blocks, dst_blocks) if src_blocks else None
        outgoing.num_pairs = len(src_blocks)

    def flush(self, transfer_id: str) -> None:
        with self._lock:
            outgoing = self._open.get(transfer_id)
        if outgoing is None:
            return
        outgoing.room = self._round_pages
        if not outgoing.queued:
            return
        layout = self._local.layout
        last = outgoing.queued[-1].layer == layout.num_layers - 1
        if last or outgoing.num_queued * layout.layer_block_bytes >= BATCH_BYTES:
            self._start(outgoing)

    def _start(self, outgoing: _Outgoing) -> None:
        """Copy what is queued, of all layers, as one batch."""
        moves, outgoing.queued = outgoing.queued, []
        num_pages, outgoing.num_queued = outgoing.num_queued, 0
        if not moves:
            return
        now = self._clock()
        # In the middle of a step the last layer's latest writes are older than the first one's.
        after = self._device.writes_of(*[move.layer for move in moves])
        copy = self._device.copy_pages(self._local, self._remote, moves, after)
        self._last_copy = copy
        with self._lock:
            outgoing.copies.append(copy)
            num_bytes = num_pages * self._local.layout.layer_block_bytes
            num_runs = sum(pairs.num_runs * len(layers) for pairs, layers in alike(moves))
            outgoing.meter.add(now, now, num_bytes, num_runs)

    def stored(self, transfer_id: str, num_pages: int, num_pieces: int, start_ns: int) -> None:
        """A completed step's kernels stored `num_pages` pages of the transfer (`remote_pool`)."""
        with self._lock:
            outgoing = self._open.sending(transfer_id)
            now = self._clock()
            outgoing.meter.add(now, now, 0, 0)
            meter = outgoing.meter
            meter.start_ns = min(meter.start_ns, start_ns)
            meter.num_bytes += num_pages * self._pages.layout.layer_block_bytes
            meter.num_pieces += num_pieces

    def finish(self, transfer_id: str) -> None:
        with self._lock:
            outgoing = self._open.sending(transfer_id)
        self._start(outgoing)
        with self._lock:
            self._open.finish(transfer_id)
        if not outgoing.copies:
            self._report(outgoing, "")
        else:  # the side stream is in order: the last copy is behind the others
            self._completions.add(outgoing.copies[-1], partial(self._report, outgoing))

    def _report(self, outgoing: _Outgoing, problem: str) -> None:
        transfer_id, meter = outgoing.transfer_id, outgoing.meter
        with self._lock:
            if not self._open.is_open(outgoing):
                return
            self._open.pop(transfer_id)
            if problem:
                self._news.put(TransferFailed(transfer_id, f"a device copy failed: {problem}"))
                return
            if outgoing.copies:
                meter.busy_ns += sum(copy.busy_ns() for copy in outgoing.copies)
                meter.end_ns = max(meter.end_ns, self._clock(), meter.start_ns + meter.busy_ns)
            self._news.put(Sent(meter.report(transfer_id, NAME)))

    def poll(self) -> list[Sent | Stopped | TransferFailed]:
        self._completions.reap()
        return self._news.take()

    def abort(self, transfer_id: str) -> bool:
        """What is queued is dropped, what was launched goes on until `Stopped`."""
        with self._lock:
            outgoing = self._open.pop(transfer_id)
        if outgoing is None or not outgoing.copies or outgoing.copies[-1].done():
            return True
        self._completions.add(outgoing.copies[-1], partial(self._stopped, transfer_id))
        return False

    def _stopped(self, transfer_id: str, problem: str) -> None:
        """On a device that failed nothing is said: the blocks come back with this process's end."""
        with self._lock:
            if not problem and not self._open.broken:
                self._news.put(Stopped(transfer_id))

    def close(self) -> None:
        """The mapping goes once nothing launched can still store through it."""
        with self._lock:
            if self._open.broken:
                return
            self._open.break_off("the link is closed")
            self._news.take()
        self.remote_pool = None
        over: Event = self._device.launched()
        if self._last_copy is not None:
            over = AllOf(self._last_copy, over)
        self._over = over
        self._completions.add(over, partial(self._close_mapping, self._remote.address))

    def quiet(self) -> bool:
        return self._over is not None and self._over.done()
