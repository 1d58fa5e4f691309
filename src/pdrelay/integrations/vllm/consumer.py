"""The consumer rank's side: announces reserved blocks to producers and learns when they are filled.

No thread and no clock of its own: the engine's thread calls `begin_step` and `poll` in each of its
steps, and vLLM goes on stepping while a request waits for its KV. Nothing here blocks.

A producer may store into announced blocks until it answers or its socket ends, so a load that is
given up (abort, deadline) is reported as finished only then; vLLM keeps the blocks until it is.
"""

from __future__ import annotations

import logging
import os
import socket
import struct
from dataclasses import dataclass

from pdrelay.core.channel import Channel
from pdrelay.core.clock import Clock
from pdrelay.errors import ProtocolError, TransportError
from pdrelay.integrations.vllm.config import rank_address
from pdrelay.integrations.vllm.messages import (
    PROTOCOL,
    Announce,
    Ask,
    Cancel,
    Closed,
    Done,
    Failed,
    FromProducer,
    Hello,
    Refused,
    Welcome,
)
from pdrelay.integrations.vllm.pages import Offer, Pages
from pdrelay.integrations.vllm.stats import HandOverStats
from pdrelay.integrations.vllm.step import Interest, Load, StepPlan

_log = logging.getLogger(__name__)

_RENEWALS = 3  # asks in the time of one lease


@dataclass(eq=False)
class Source:
    """One producer rank that this rank is connected to."""

    address: str  # of the producer's rank 0
    channel: Channel[FromProducer]
    offer: Offer  # of our pages to it
    renew_ns: int  # when its leases are renewed next
    refusal: str = ""


@dataclass(eq=False)
class Incoming:
    """One load under way. `closing`: given up, the producer's last word is awaited."""

    load: Load
    source: Source
    deadline_ns: int
    closing: bool = False
    error: str = ""  # why vLLM is told that the load failed


class Consumer:
    def __init__(
        self,
        *,
        pages: Pages,
        instance: str,
        rank: int,
        num_ranks: int,
        lease_s: float,
        load_timeout_s: float,
        clock: Clock,
    ) -> None:
        self._pages = pages
        self._instance = instance
        self._rank, self._num_ranks = rank, num_ranks
        self._renewal_ns = int(lease_s * 1e9 / _RENEWALS)
        self._timeout_ns = int(load_timeout_s * 1e9)
        self._clock = clock
        self._sources: dict[str, Source] = {}
        self._incoming: dict[str, Incoming] = {}  # by request
        self._finished: set[str] = set()
        self._failed_blocks: set[int] = set()
        self.stats = HandOverStats()

    @property
    def num_loading(self) -> int:
        return len(self._incoming)

    def begin_step(self, plan: StepPlan) -> None:
        """Apply what the scheduler decided."""
        for request_id in plan.cancelled:
            incoming = self._incoming.get(request_id)
            if incoming is not None:
                self._give_up(incoming)
        for interest in plan.released:
            self._tell(interest, Cancel(interest.transfer_id))
        for interest in plan.waiting:
            self._tell(interest, Ask(interest.transfer_id))
        for load in plan.loads:
            self._announce(load)

    def poll(self) -> None:
        """Read what producers say, renew leases, enforce deadlines."""
        for source in list(self._sources.values()):
            self._read(source)
        now_ns = self._clock()
        for incoming in list(self._incoming.values()):
            if not incoming.closing and now_ns >= incoming.deadline_ns:
                incoming.error = "it took longer than load_timeout_s"
                self._give_up(incoming)
        for source in list(self._sources.values()):
            self._renew(source, now_ns)
            if source.channel.closed:
                self._lose(source)

    def take_finished(self) -> set[str]:
        """Requests whose loads have ended, well or not, each once."""
        finished, self._finished = self._finished, set()
        return finished

    def take_failed_blocks(self) -> set[int]:
        """Blocks of failed loads, no later than `take_finished` names their requests."""
        failed, self._failed_blocks = self._failed_blocks, set()
        return failed

    def close(self) -> None:
        for source in self._sources.values():
            source.channel.close()
            source.offer.close()
        self._sources.clear()

    # ---- loads

    def _announce(self, load: Load) -> None:
        assert load.request_id not in self._incoming
        deadline_ns = self._clock() + self._timeout_ns
        try:
            source = self._source(load.producer)
        except TransportError as error:
            self._fail(load, str(error))
            return
        self._incoming[load.request_id] = Incoming(load, source, deadline_ns)
        source.channel.send(
            Announce(
                transfer_id=load.transfer_id,
                first_block=load.first_block,
                blocks=load.blocks,
                num_tokens=load.num_tokens,
                digests=load.digests,
            )
        )

    def _give_up(self, incoming: Incoming) -> None:
        """Idempotent; ends when the producer has said its last word."""
        if not incoming.closing:
            incoming.closing = True
            incoming.source.channel.send(Cancel(incoming.load.transfer_id))

    def _fail(self, load: Load, reason: str) -> None:
        _log.warning("KV of request %s did not arrive: %s", load.request_id, reason)
        self.stats.num_failed += 1
        self._failed_blocks.update(load.blocks)
        self._finished.add(load.request_id)

    def _end(self, incoming: Incoming, error: str = "") -> None:
        """The producer stores nothing more into its blocks."""
        del self._incoming[incoming.load.request_id]
        error = incoming.error or error
        # What vLLM itself gave up has no blocks to recompute.
        if error and (incoming.error or not incoming.closing):
            self._fail(incoming.load, error)
        else:
            self._finished.add(incoming.load.request_id)

    # ---- producers

    def _tell(self, interest: Interest, message: Ask | Cancel) -> None:
        try:
            self._source(interest.producer).channel.send(message)
        except TransportError as error:
            _log.debug("%s not sent: %s", type(message).__name__, error)

    def _source(self, address: str) -> Source:
        """The connected producer at `address`. Raises TransportError when it is not there."""
        source = self._sources.get(address)
        if source is not None and source.channel.closed:
            self._lose(source)
            source = None
        if source is None:
            sock = connect_to_own(rank_address(address, self._rank))
            channel: Channel[FromProducer] = Channel(sock, FromProducer)
            try:
                offer = self._pages.offer()
            except TransportError:
                channel.close()
                raise
            source = Source(address, channel, offer, self._clock() + self._renewal_ns)
            hello = Hello(
                protocol=PROTOCOL,
                instance=self._instance,
                rank=self._rank,
                num_ranks=self._num_ranks,
                transport=self._pages.transport,
                layout=self._pages.layout,
                handles=offer.handles,
            )
            channel.send(hello, offer.fds)
            offer.passed_on()
            self._sources[address] = source
        return source

    def _read(self, source: Source) -> None:
        source.channel.flush()
        try:
            messages = source.channel.receive()
        except ProtocolError as error:
            source.refusal = f"it does not speak this protocol ({error})"
            source.channel.close()
            return
        for message in messages:
            match message:
                case Welcome():
                    pass
                case Refused(reason):
                    source.refusal = reason
                    source.channel.close()
                case Done() | Failed() | Closed():
                    self._on_verdict(source, message)

    def _on_verdict(self, source: Source, verdict: Done | Failed | Closed) -> None:
        incoming = self._find(source, verdict.transfer_id)
        if incoming is None:
            return
        load = incoming.load
        match verdict:
            case Done(num_tokens=num_tokens, num_bytes=num_bytes):
                if not load.num_tokens - 1 <= num_tokens <= load.num_tokens:
                    self._end(incoming, f"the producer handed over {num_tokens} tokens")
                    return
                incoming.error = ""  # it came in time after all
                self.stats.num_bytes += num_bytes
                self.stats.observe(verdict)
                self._end(incoming)
            case Failed(reason=reason):
                self._end(incoming, reason)
            case Closed():
                self._end(incoming, "the producer closed it")

    def _find(self, source: Source, transfer_id: str) -> Incoming | None:
        for incoming in self._incoming.values():
            if incoming.source is source and incoming.load.transfer_id == transfer_id:
                return incoming
        return None

    def _renew(self, source: Source, now_ns: int) -> None:
        if now_ns < source.renew_ns:
            return
        source.renew_ns = now_ns + self._renewal_ns
        for incoming in self._incoming.values():
            if incoming.source is source and not incoming.closing:
                source.channel.send(Ask(incoming.load.transfer_id))

    def _lose(self, source: Source) -> None:
        """The producer is gone, and with it its stores."""
        if self._sources.get(source.address) is source:
            del self._sources[source.address]
        source.channel.close()
        source.offer.close()
        reason = source.refusal or "the producer is gone"
        for incoming in list(self._incoming.values()):
            if incoming.source is source:
                self._end(incoming, reason)


def connect_to_own(path: str) -> socket.socket:
    """Connect to a Unix socket of a process of this user.

    Raises TransportError. Never blocks: a Unix connect succeeds or fails at once.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.setblocking(False)
    try:
        sock.connect(path)
        credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    except OSError as error:
        sock.close()
        raise TransportError(f"no producer listens at {path} ({error})") from error
    _, uid, _ = struct.unpack("3i", credentials)
    if uid != os.geteuid():
        sock.close()
        raise TransportError(f"the producer at {path} belongs to another user")
    return sock
