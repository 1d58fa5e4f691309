"""Transport `mapped`: the producer maps the consumer's KV pool and stores into it.

One copy, no copy left at the end, nothing to receive. The consumer's memfd travels over the
engines' peer socket, so no name exists that could be guessed or left behind. A consumer that dies
leaves its memory to the producers that map it: their stores stay harmless until they hear of it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import msgspec

from pdrelay.core.clock import Clock, monotonic_ns
from pdrelay.core.kv_layout import KVLayout
from pdrelay.errors import TransportError
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
    check_blocks,
    check_compatible,
    check_layer,
    check_slots,
    close_fds,
    copy_layer,
    decode_descriptor,
)
from pdrelay.transport.device import Device, DevicePages
from pdrelay.transport.device_mapped import DeviceMappedTransport
from pdrelay.transport.news import Bell, NewsQueue
from pdrelay.transport.open_transfers import OpenTransfer, OpenTransfers
from pdrelay.transport.options import TransportOptions
from pdrelay.transport.pages import SharedPages
from pdrelay.transport.stored import StoredTransfers

NAME = "mapped"


class MappedDescriptor(msgspec.Struct, frozen=True, tag=NAME):
    """Goes with one fd: the consumer's pages."""

    instance: str
    num_bytes: int


class MappedTransport:
    capabilities = Capabilities(
        name=NAME,
        needs_slots=True,
        prefix_store=False,
    )
    prefix_store: PrefixStore | None = None
    device: Device | None = None

    def __init__(self, pages: SharedPages, instance: str, *, clock: Clock = monotonic_ns) -> None:
        self._pages = pages
        self._instance = instance
        self._clock = clock
        self._bell = Bell()
        self._news: NewsQueue[Arrived | TransferFailed] = NewsQueue(self._bell)
        self._stored = StoredTransfers(pages.layout, NAME, self._news, clock)

    def descriptor(self) -> Descriptor:
        data = MappedDescriptor(self._instance, self._pages.layout.total_bytes)
        return Descriptor(msgspec.msgpack.encode(data), (self._pages.fd,))

    def connect(self, layout: KVLayout, descriptor: Descriptor) -> ProducerLink:
        try:
            check_compatible(self._pages.layout, layout)
            sent = decode_descriptor(descriptor, MappedDescriptor)
            if len(descriptor.fds) != 1:
                raise TransportError(f"expected one file descriptor, got {len(descriptor.fds)}")
            size = os.fstat(descriptor.fds[0]).st_size
            # A store behind the end of the file would kill this process (SIGBUS).
            if not layout.total_bytes == sent.num_bytes <= size:
                raise TransportError(f"the consumer's pages are {size} bytes, not as announced")
            remote = SharedPages(layout, descriptor.fds[0])
        except (TransportError, OSError, ValueError) as error:
            close_fds(descriptor.fds)
            raise TransportError(f"cannot map the consumer's pages: {error}") from error
        return MappedLink(self._pages, remote, self._bell, self._clock)

    def expect(
        self, transfer_id: str, first_block: int, blocks: Sequence[int], keys: Sequence[bytes]
    ) -> None:
        self._stored.expect(transfer_id, blocks)

    def commit(self, transfer_id: str, num_pages: int) -> None:
        self._stored.commit(transfer_id, num_pages)

    def poll(self) -> list[Arrived | TransferFailed]:
        return self._news.take()

    def abort(self, transfer_id: str) -> None:
        """Forget the transfer. A producer may go on storing until *its* `abort` returned."""
        self._stored.forget(transfer_id)

    def fileno(self) -> int:
        return self._bell.fileno()

    def close(self) -> None:
        self._stored.clear()
        self._bell.close()


class MappedLink(HostLink):
    """Stores from the engine's own thread: when `abort` returns, no store is under way."""

    def __init__(self, local: SharedPages, remote: SharedPages, bell: Bell, clock: Clock) -> None:
        self._local = local
        self._remote = remote
        self._clock = clock
        self._news: NewsQueue[Sent | TransferFailed] = NewsQueue(bell)
        self._open: OpenTransfers[OpenTransfer] = OpenTransfers()

    def begin(self, transfer_id: str, keys: Sequence[bytes]) -> None:
        self._open.begin(OpenTransfer(transfer_id))

    def send(
        self,
        transfer_id: str,
        layer: int,
        first_block: int,
        src_blocks: Sequence[int],
        dst_blocks: Sequence[int],
    ) -> None:
        meter = self._open.sending(transfer_id).meter
        check_layer(layer, self._local.layout)
        check_slots(src_blocks, dst_blocks)
        check_blocks(src_blocks, self._local.layout, "local")
        check_blocks(dst_blocks, self._remote.layout, "remote")
        start = self._clock()
        pieces = copy_layer(self._local.array, self._remote.array, layer, src_blocks, dst_blocks)
        num_bytes = len(src_blocks) * self._local.layout.layer_block_bytes
        meter.add(start, self._clock(), num_bytes, pieces)

    def finish(self, transfer_id: str) -> None:
        transfer = self._open.finish(transfer_id)
        self._open.pop(transfer_id)
        self._news.put(Sent(transfer.meter.report(transfer_id, NAME)))

    def poll(self) -> list[Sent | TransferFailed]:
        return self._news.take()

    def abort(self, transfer_id: str) -> bool:
        self._open.pop(transfer_id)
        return True

    def close(self) -> None:
        if self._open.broken:
            return
        self._open.break_off("the link is closed")
        self._news.take()
        self._remote.close()


def create(
    pages: SharedPages | DevicePages, instance: str, options: TransportOptions
) -> MappedTransport | DeviceMappedTransport:
    if isinstance(pages, SharedPages):
        return MappedTransport(pages, instance)
    return DeviceMappedTransport(pages, instance)
