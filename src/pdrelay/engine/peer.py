"""One consumer as its producer sees it: a socket, the link behind it, and what is not said yet.

`Closed` and `Cancel` allow the consumer to reuse the blocks that it promised, so they wait until
nothing of the request is stored any more: neither by copies (`Stopped`) nor by the kernels of
launched steps (`HandOver.storing`).
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass, field

from pdrelay.core.channel import Channel
from pdrelay.core.hand_over import HandOver
from pdrelay.core.messages import Cancel, Closed, PeerHello, PeerIntro, PeerMessage, Reserve
from pdrelay.errors import ProtocolError, TransportError
from pdrelay.transport.base import Descriptor, ProducerLink, RemotePool, Transport


@dataclass
class Closing:
    """A request given up while its stores are not over: what to tell the consumer then."""

    copying: bool  # until the link says Stopped
    hand_over: HandOver
    messages: list[Cancel | Closed] = field(default_factory=list)

    @property
    def over(self) -> bool:
        return not self.copying and not self.hand_over.storing


@dataclass(eq=False)
class Peer:
    """One consumer incarnation. `link` stands once its PeerHello is in."""

    instance: str
    address: str
    channel: Channel[PeerMessage]
    link: ProducerLink | None = None
    early: dict[str, Reserve] = field(default_factory=dict)  # before the front door's Prefill
    closing: dict[str, Closing] = field(default_factory=dict)
    refusal: str = ""  # why the transport cannot reach it
    punctual: bool = True  # its last promise was in time, so the next is worth waiting for

    @property
    def pool(self) -> RemotePool | None:
        """Its pages, where kernels reach them."""
        return None if self.link is None else self.link.remote_pool

    def receive(self) -> Sequence[PeerMessage]:
        """What it said since; also sends what the socket did not take before."""
        self.channel.flush()
        try:
            return self.channel.receive()
        except ProtocolError:
            self.channel.close()
            return ()

    def open_link(self, transport: Transport, hello: PeerHello) -> bool:
        """Returns whether it stands; if not, the connection is closed."""
        fds = tuple(self.channel.received_fds)
        self.channel.received_fds.clear()
        try:
            self.link = transport.connect(hello.layout, Descriptor(hello.descriptor, fds))
        except TransportError as error:
            self.refusal = str(error)
            self.channel.close()
            return False
        return True

    # ---- requests given up

    def close_request(self, request_id: str, hand_over: HandOver, *, copying: bool) -> None:
        """From here on, what is told about it waits for its last store."""
        closing = Closing(copying, hand_over)
        if not closing.over:
            self.closing[request_id] = closing

    def tell(self, message: Cancel | Closed) -> None:
        """Say that the request is stored no more; when it is so."""
        closing = self.closing.get(message.request_id)
        if closing is None:
            self.channel.send(message)
        else:
            closing.messages.append(message)

    def stopped(self, request_id: str) -> None:
        """The link copies no more of it."""
        if request_id in self.closing:
            self.closing[request_id].copying = False
            self.tell_closed()

    def tell_closed(self) -> None:
        """Say what waited for stores that are over by now."""
        for request_id, closing in list(self.closing.items()):
            if closing.over:
                del self.closing[request_id]
                for message in closing.messages:
                    self.channel.send(message)


def connect(own_instance: str, instance: str, address: str) -> Peer:
    """Raises OSError, at once, if nobody listens at the address."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.connect(address)  # local: succeeds or fails at once
    except OSError:
        sock.close()
        raise
    peer = Peer(instance, address, Channel(sock, PeerMessage))
    peer.channel.send(PeerIntro(own_instance))
    return peer
