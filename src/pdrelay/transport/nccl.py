"""Transport `nccl`: layer by layer through a NCCL communicator of each (producer, consumer) pair.

For GPUs without peer access, and for drivers or containers that forbid IPC handles. The consumer
needs an SM or two for receiving and one further copy on its device, so `mapped` is the default.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence

import msgspec

from pdrelay.core.channel import Channel
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
    check_compatible,
    close_fds,
    decode_descriptor,
)
from pdrelay.transport.device import Device, DevicePages
from pdrelay.transport.incoming import IncomingTransfers
from pdrelay.transport.nccl_library import NcclLibrary, load_nccl
from pdrelay.transport.nccl_receiver import NcclReceiver
from pdrelay.transport.nccl_sender import NcclLink
from pdrelay.transport.nccl_wire import NcclMessage
from pdrelay.transport.news import Bell, NewsQueue
from pdrelay.transport.options import TransportOptions
from pdrelay.transport.pages import SharedPages

NAME = "nccl"


class NcclDescriptor(msgspec.Struct, frozen=True, tag=NAME):
    """Goes with one fd: a connected Unix stream socket."""

    instance: str
    device_uuid: str


class NcclTransport:
    capabilities = Capabilities(
        name=NAME,
        needs_slots=True,
        prefix_store=False,
    )
    prefix_store: PrefixStore | None = None

    def __init__(
        self,
        pages: DevicePages,
        instance: str,
        library: NcclLibrary,
        *,
        timeout_s: float = 30.0,
        clock: Clock = monotonic_ns,
    ) -> None:
        self._pages = pages
        self.device: Device | None = pages.device
        self._instance = instance
        self._library = library
        self._timeout_s = timeout_s
        self._clock = clock
        self._bell = Bell()
        self._news: NewsQueue[Arrived | TransferFailed] = NewsQueue(self._bell)
        self._transfers = IncomingTransfers(
            pages.layout,
            self._news,
            transport=NAME,
            timeout_ns=int(timeout_s * 1e9),
            clock=clock,
        )
        self._receivers: list[NcclReceiver] = []

    def descriptor(self) -> Descriptor:
        """For one producer: each gets a socket of its own."""
        for receiver in [receiver for receiver in self._receivers if not receiver.alive]:
            receiver.close()
            self._receivers.remove(receiver)
        ours, offered = socket.socketpair()
        receiver = NcclReceiver(
            self._pages,
            ours,
            offered,
            self._library,
            self._transfers,
            timeout_s=self._timeout_s,
            clock=self._clock,
        )
        self._receivers.append(receiver)
        data = msgspec.msgpack.encode(NcclDescriptor(self._instance, self._pages.device.uuid))
        return Descriptor(data, (receiver.offered_fd(),))

    def connect(self, layout: KVLayout, descriptor: Descriptor) -> ProducerLink:
        """The communicator is made by the link's thread; if it cannot be, transfers fail."""
        try:
            check_compatible(self._pages.layout, layout)
            peer = decode_descriptor(descriptor, NcclDescriptor)
            if peer.device_uuid == self._pages.device.uuid:
                raise TransportError(
                    f"{peer.instance} is on the same GPU, which NCCL refuses: choose --transport "
                    "mapped or tcp, or give each instance its own GPU"
                )
            if len(descriptor.fds) != 1:
                raise TransportError(f"expected one file descriptor, got {len(descriptor.fds)}")
            sock = socket.socket(fileno=descriptor.fds[0])
        except (TransportError, OSError) as error:
            close_fds(descriptor.fds)
            raise TransportError(f"cannot reach the consumer: {error}") from error
        channel: Channel[NcclMessage] = Channel(sock, NcclMessage)
        return NcclLink(
            self._pages,
            peer.instance,
            channel,
            self._library,
            self._bell,
            transport=NAME,
            timeout_s=self._timeout_s,
            clock=self._clock,
        )

    def expect(
        self, transfer_id: str, first_block: int, blocks: Sequence[int], keys: Sequence[bytes]
    ) -> None:
        check_blocks(blocks, self._pages.layout, "local")
        self._transfers.expect(transfer_id, first_block, blocks)

    def commit(self, transfer_id: str, num_pages: int) -> None:
        self._transfers.commit(transfer_id, num_pages)

    def poll(self) -> list[Arrived | TransferFailed]:
        self._transfers.fail_late()
        return self._news.take()

    def abort(self, transfer_id: str) -> None:
        self._transfers.abort(transfer_id)

    def fileno(self) -> int:
        return self._bell.fileno()

    def close(self) -> None:
        for receiver in self._receivers:
            receiver.close()
        self._receivers.clear()
        self._bell.close()


def create(
    pages: SharedPages | DevicePages, instance: str, options: TransportOptions
) -> NcclTransport:
    """Raises ConfigError for pages of the host, TransportError without a NCCL library."""
    if isinstance(pages, SharedPages):
        raise ConfigError("transport 'nccl' moves KV between GPUs: use mapped or tcp on CPU")
    library = options.nccl or load_nccl()
    return NcclTransport(pages, instance, library, timeout_s=options.timeout_s)
