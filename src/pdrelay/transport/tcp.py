"""Transport `tcp`: layer by layer over a socket, from pages to pages without a copy in between.

Pages of a device pass through pinned host memory on both sides (`staging.py`).

Works between any hosts. Producers show a random token that reached them over the engines' own
link; bytes are not encrypted, so the address should be loopback or a private network.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence

import msgspec

from pdrelay.core.clock import Clock, monotonic_ns
from pdrelay.core.kv_layout import KVLayout
from pdrelay.errors import ConfigError
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
from pdrelay.transport.news import Bell, NewsQueue
from pdrelay.transport.options import TransportOptions
from pdrelay.transport.pages import SharedPages
from pdrelay.transport.tcp_receiver import Receiver
from pdrelay.transport.tcp_sender import TcpLink
from pdrelay.transport.tcp_wire import TOKEN_BYTES, TcpDescriptor

NAME = "tcp"
_WILDCARDS = ("", "0.0.0.0", "::")


class TcpTransport:
    """Listens from its first `descriptor` or `expect` on: producers need no port."""

    capabilities = Capabilities(
        name=NAME,
        needs_slots=True,
        prefix_store=False,
    )
    prefix_store: PrefixStore | None = None

    def __init__(
        self,
        pages: SharedPages | DevicePages,
        instance: str,
        *,
        host: str = "127.0.0.1",
        timeout_s: float = 30.0,
        clock: Clock = monotonic_ns,
    ) -> None:
        """Raises ConfigError for an address that producers could not connect to."""
        if host in _WILDCARDS:
            raise ConfigError(f"tcp host {host!r} is no address to connect to: name one interface")
        self._pages = pages
        self.device: Device | None = None if isinstance(pages, SharedPages) else pages.device
        self._instance = instance
        self._host = host
        self._timeout_s = timeout_s
        self._clock = clock
        self._token = secrets.token_bytes(TOKEN_BYTES)
        self._bell = Bell()
        self._news: NewsQueue[Arrived | TransferFailed] = NewsQueue(self._bell)
        self._receiver: Receiver | None = None

    def _listening(self) -> Receiver:
        if self._receiver is None:
            self._receiver = Receiver(
                self._pages,
                self._host,
                self._token,
                self._news,
                transport=NAME,
                timeout_ns=int(self._timeout_s * 1e9),
                clock=self._clock,
            )
        return self._receiver

    def descriptor(self) -> Descriptor:
        """Raises TransportError when the address cannot be listened on."""
        port = self._listening().port
        data = TcpDescriptor(self._instance, self._host, port, self._token)
        return Descriptor(msgspec.msgpack.encode(data))

    def connect(self, layout: KVLayout, descriptor: Descriptor) -> ProducerLink:
        """The connection is made by the link's thread; a consumer that is gone fails transfers."""
        close_fds(descriptor.fds)
        check_compatible(self._pages.layout, layout)
        peer = decode_descriptor(descriptor, TcpDescriptor)
        return TcpLink(
            self._pages,
            peer,
            self._bell,
            transport=NAME,
            timeout_s=self._timeout_s,
            clock=self._clock,
        )

    def expect(
        self, transfer_id: str, first_block: int, blocks: Sequence[int], keys: Sequence[bytes]
    ) -> None:
        check_blocks(blocks, self._pages.layout, "local")
        self._listening().transfers.expect(transfer_id, first_block, blocks)

    def commit(self, transfer_id: str, num_pages: int) -> None:
        self._listening().transfers.commit(transfer_id, num_pages)

    def poll(self) -> list[Arrived | TransferFailed]:
        if self._receiver is not None:
            self._receiver.transfers.fail_late()
        return self._news.take()

    def abort(self, transfer_id: str) -> None:
        if self._receiver is not None:
            self._receiver.transfers.abort(transfer_id)

    def fileno(self) -> int:
        return self._bell.fileno()

    def close(self) -> None:
        if self._receiver is not None:
            self._receiver.close()
            self._receiver = None
        self._bell.close()


def create(
    pages: SharedPages | DevicePages, instance: str, options: TransportOptions
) -> TcpTransport:
    return TcpTransport(pages, instance, host=options.tcp_host, timeout_s=options.timeout_s)
