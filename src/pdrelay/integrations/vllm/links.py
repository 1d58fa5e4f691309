"""A producer's consumers: who has connected and fits, who says something, who is refused."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, field

from pdrelay.core.channel import Channel
from pdrelay.errors import ConfigError, ProtocolError, TransportError
from pdrelay.integrations.vllm.inbox import Inbox
from pdrelay.integrations.vllm.listener import listen
from pdrelay.integrations.vllm.messages import (
    PROTOCOL,
    Announce,
    Ask,
    Cancel,
    FromConsumer,
    Hello,
    Refused,
    Welcome,
)
from pdrelay.integrations.vllm.page_layout import check_inside, check_same_pages
from pdrelay.integrations.vllm.pages import Pages, PageWriter

_log = logging.getLogger(__name__)


@dataclass
class Early:
    """An announcement that came before the prefill."""

    announce: Announce
    deadline_ns: int


@dataclass(eq=False)
class Link:
    """One consumer rank that has connected. Its pages are opened for its first transfer and not
    before: a driver call between a starting engine's graph captures would spoil them."""

    channel: Channel[FromConsumer]
    name: str = "a consumer"
    hello: Hello | None = None
    fds: tuple[int, ...] = ()  # of its Hello, until its pages are opened
    writer: PageWriter | None = None
    early: dict[str, Early] = field(default_factory=dict)  # by transfer


OnMessage = Callable[[Link, Ask | Announce | Cancel], None]  # about a transfer


class Links:
    def __init__(self, pages: Pages, address: str, instance: str, rank: tuple[int, int]) -> None:
        """Listen at `address`. Raises ConfigError when that cannot be."""
        self._pages = pages
        self._address = address
        self._instance = instance
        self._rank = rank  # and how many there are
        self._listener = listen(address)
        self.inbox = Inbox()
        self.inbox.watch(self._listener.fileno())
        self.all: list[Link] = []
        self._by_fd: dict[int, Link] = {}  # those in the inbox

    def read(self, fd: int, on_message: OnMessage) -> None:
        """What `inbox` found ready."""
        link = self._by_fd.get(fd)
        if link is None:
            self._accept(on_message)
        else:
            self._read(link, on_message)

    def watch(self, link: Link) -> None:
        """Be told when it has something to say, or takes what it did not take before."""
        if link.channel.closed:
            self._unwatch(link)
            return
        fd = link.channel.fileno()
        self._by_fd[fd] = link
        self.inbox.watch(fd, writing=link.channel.has_pending)

    def open(self, link: Link) -> bool:
        """Reach the consumer's pages, if that was not done yet; refuse it if that fails."""
        if link.writer is not None:
            return True
        hello, fds = link.hello, link.fds
        assert hello is not None
        link.fds = ()
        try:
            link.writer = self._pages.open(hello.layout, hello.handles, fds)
        except TransportError as error:
            self.refuse(link, error)
            return False
        return True

    def refuse(self, link: Link, error: Exception) -> None:
        _log.warning("%s is refused: %s", link.name, error)
        link.channel.send(Refused(str(error)))
        self._close_channel(link)

    def let_go(self, link: Link) -> None:
        self.all.remove(link)
        self._close(link)

    def close(self) -> None:
        for link in self.all:
            self._close(link)
        self.all.clear()
        self.inbox.close()
        self._listener.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._address)

    def _accept(self, on_message: OnMessage) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except (BlockingIOError, InterruptedError):
                return
            link = Link(Channel(sock, FromConsumer))
            self.all.append(link)
            self.watch(link)
            self._read(link, on_message)  # as a rule it has spoken

    def _read(self, link: Link, on_message: OnMessage) -> None:
        link.channel.flush()
        try:
            messages = link.channel.receive()
            for message in messages:
                if isinstance(message, Hello):
                    self._on_hello(link, message)
                elif link.hello is None:
                    raise ProtocolError("a consumer must say Hello first")
                else:
                    on_message(link, message)
        except (ProtocolError, ConfigError) as error:
            self.refuse(link, error)
        self.watch(link)

    def _on_hello(self, link: Link, hello: Hello) -> None:
        if link.hello is not None:
            raise ProtocolError("a consumer says Hello once")
        self._check(hello)
        link.hello, link.name = hello, hello.instance
        link.fds = tuple(link.channel.received_fds)
        link.channel.received_fds.clear()
        link.channel.send(Welcome(self._instance))

    def _check(self, hello: Hello) -> None:
        if hello.protocol != PROTOCOL:
            raise ConfigError(
                f"the consumer's pdrelay speaks hand-over protocol {hello.protocol}, the "
                f"producer's {PROTOCOL}: install the same version on both sides"
            )
        if (hello.rank, hello.num_ranks) != self._rank:
            raise ConfigError(
                f"the consumer has {hello.num_ranks} tensor-parallel ranks, the producer "
                f"{self._rank[1]}: start both with the same --tensor-parallel-size"
            )
        if hello.transport != self._pages.transport:
            raise ConfigError(
                f"the consumer moves KV by {hello.transport}, the producer by "
                f"{self._pages.transport}: set the same transport on both sides"
            )
        check_inside(hello.layout)
        check_same_pages(self._pages.layout, hello.layout)

    def _unwatch(self, link: Link) -> None:
        fd = link.channel.fileno()
        if self._by_fd.pop(fd, None) is not None:
            self.inbox.forget(fd)

    def _close_channel(self, link: Link) -> None:
        self._unwatch(link)
        link.channel.close()

    def _close(self, link: Link) -> None:
        for fd in (*link.fds, *link.channel.received_fds):
            os.close(fd)
        link.fds = ()
        link.channel.received_fds.clear()
        self._close_channel(link)
        if link.writer is not None:
            link.writer.close()
