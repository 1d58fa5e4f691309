"""The consumer's side of P/D: promises blocks, takes KV into them, and releases them safely.

A producer may store into promised blocks until it answers Closed or its socket ends, so a request
given up in between is CLOSING: its blocks stay in_transfer until then. Where a producer's device
stores (`Capabilities.remote_stores`), the end of its socket is not enough: what it launched may
outlive it for a moment, so the blocks stay until its process is gone. That wait has no deadline,
for no time would make reuse safe; the client has its error long before.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass, field

from pdrelay.core.channel import Channel
from pdrelay.core.clock import Clock
from pdrelay.core.events import Event, EventKind
from pdrelay.core.kv_layout import KVLayout
from pdrelay.core.messages import (
    Cancel,
    Closed,
    Commit,
    Expect,
    PeerHello,
    PeerIntro,
    PeerMessage,
    Reserve,
)
from pdrelay.core.request import Request, Status
from pdrelay.core.scheduler import Reservation, Scheduler, StepPlan
from pdrelay.engine.outbox import Outbox
from pdrelay.engine.peer_process import PeerProcess, peer_process
from pdrelay.errors import ProtocolError, RequestError, WorkerLostError
from pdrelay.transport.base import Arrived, TransferFailed, Transport
from pdrelay.transport.checksum import Checksum, PendingChecksum, PreparedChecksum

_BACKLOG = 64


class DamagedTransferError(RequestError):
    """The pages that arrived are not the pages that were sent."""

    code = "kv_damaged"


def _damaged(producer: str) -> DamagedTransferError:
    return DamagedTransferError(f"KV from {producer} arrived damaged; the request was dropped")


@dataclass
class Producers:
    """Sockets of producers: those that introduced themselves, by instance, and those yet to."""

    by_instance: dict[str, Channel[PeerMessage]] = field(default_factory=dict)
    strangers: list[Channel[PeerMessage]] = field(default_factory=list)
    processes: dict[Channel[PeerMessage], PeerProcess] = field(default_factory=dict)


@dataclass
class Incoming:
    """One promised request."""

    request: Request
    producer: str
    first_block: int
    blocks: list[int]
    checksum: PreparedChecksum | None = None
    channel: Channel[PeerMessage] | None = None  # the link that knows the promise
    commit: Commit | None = None
    lost: PeerProcess | None = None  # its producer's socket ended; it may store until it is gone


@dataclass
class Unverified:
    """A request that decodes already, while a device reads its pages (those of `table`) for the
    checksum."""

    request: Request
    producer: str
    table: list[int]
    expected: int
    checksum: PendingChecksum

    @property
    def settled(self) -> bool:
        """Whether the verdict is there, or the pages are given back and it is of no use."""
        return self.request.block_table is not self.table or self.checksum.done()

    def verdict(self) -> bool | None:
        """Whether the pages are what was sent; waits for that. None: the request, which will be
        computed again, has them no more, and whoever got them may have written into them."""
        if self.request.block_table is not self.table:
            return None
        return self.checksum.result() == self.expected


class Consumer:
    """Drives the receiving side from the engine's thread. Calls nothing that blocks.

    A device reads pages for a checksum behind the steps that are launched, and in front of the
    request's first, so that no hand-over waits for it. Of a request whose pages turn out damaged no
    token is told and no block is published.
    """

    def __init__(
        self,
        *,
        instance: str,
        address: str,
        transport: Transport,
        scheduler: Scheduler,
        outbox: Outbox,
        layout: KVLayout,
        checksum: Checksum,
        clock: Clock,
        process_of: Callable[[socket.socket], PeerProcess | None] = peer_process,
    ) -> None:
        self._instance = instance
        self._transport = transport
        self._scheduler = scheduler
        self._outbox = outbox
        self._layout = layout
        self._checksum = checksum
        self._clock = clock
        self._address = address
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(address)
        self._listener.listen(_BACKLOG)
        self._listener.setblocking(False)
        self._producers = Producers()
        self._process_of = process_of
        self._dying: list[PeerProcess] = []
        self._producer_of: dict[str, str] = {}  # of requests not reserved yet
        self._incoming: dict[str, Incoming] = {}
        self._unverified: dict[str, Unverified] = {}
        self.bytes_received = 0
        self.failures = 0

    @property
    def num_transferring(self) -> int:
        return len(self._incoming)

    @property
    def listener(self) -> socket.socket:
        return self._listener

    def channels(self) -> list[Channel[PeerMessage]]:
        return [*self._producers.by_instance.values(), *self._producers.strangers]

    # ---- the front door's requests

    def expect(self, message: Expect) -> None:
        request = Request(message.request)
        self._producer_of[request.request_id] = message.producer
        self._scheduler.expect(request)

    def reserved(self, reservation: Reservation) -> None:
        """The scheduler promised blocks: prepare to receive, and tell the producer."""
        request = reservation.request
        producer = self._producer_of.pop(request.request_id)
        incoming = Incoming(request, producer, reservation.first_block, reservation.blocks)
        self._incoming[request.request_id] = incoming
        detail = f"first_block={incoming.first_block}"
        event = Event(EventKind.RESERVED, self._clock(), self._instance, detail=detail)
        self._outbox.event(request.request_id, event)
        if incoming.blocks:
            keys = request.prompt_keys(self._scheduler.config.block_size)
            self._transport.expect(request.request_id, incoming.first_block, incoming.blocks, keys)
        channel = self._producers.by_instance.get(producer)
        if channel is not None:
            self._promise(incoming, channel)
        incoming.checksum = self._checksum(reservation.blocks, True)  # the producer waits no more

    def abort(self, request_id: str, reason: str) -> None:
        """Forget a request of any state; idempotent."""
        self._producer_of.pop(request_id, None)
        request = self._scheduler.requests.get(request_id)
        if request is None or request.status is Status.CLOSING:
            return
        self._unverified.pop(request_id, None)
        incoming = self._incoming.get(request_id)
        if incoming is None:
            self._scheduler.finish(request)
        else:
            self._give_up(incoming, reason or "aborted")

    def poll(self) -> None:
        self._accept()
        self._bury()
        for channel in self.channels():
            self._read(channel)
            if channel.closed:
                self._lose(channel)
        for report in self._transport.poll():
            match report:
                case Arrived():
                    self._on_arrived(report.report.transfer_id, report.report.num_bytes)
                case TransferFailed(transfer_id=transfer_id, message=text):
                    incoming = self._incoming.get(transfer_id)
                    if incoming is not None and incoming.request.status is Status.RESERVED:
                        self._fail(incoming, WorkerLostError(f"KV hand-over failed: {text}"))
        if self._unverified:
            self._verify(
                [request_id for request_id, one in self._unverified.items() if one.settled]
            )

    def verify(self, plan: StepPlan) -> None:
        """The plan's step is over, so its requests' checksums are: settle them before its tokens
        are taken. Requests with damaged pages are finished then."""
        if self._unverified:
            self._verify([chunk.request.request_id for chunk in plan.chunks])

    def _verify(self, request_ids: list[str]) -> None:
        for request_id in request_ids:
            unverified = self._unverified.pop(request_id, None)
            verdict = None if unverified is None else unverified.verdict()
            if unverified is None or verdict is None:
                continue
            if verdict:
                self._scheduler.verified(unverified.request)
            else:
                self.failures += 1
                self._scheduler.finish(unverified.request)
                self._outbox.fail(request_id, _damaged(unverified.producer))

    def close(self) -> None:
        for channel in self.channels():
            channel.close()
        for process in [*self._producers.processes.values(), *self._dying]:
            process.close()
        self._listener.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._address)

    # ---- peers

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except BlockingIOError:
                return
            channel: Channel[PeerMessage] = Channel(sock, PeerMessage)
            self._producers.strangers.append(channel)
            process = self._process_of(sock) if self._transport.capabilities.remote_stores else None
            if process is not None:
                self._producers.processes[channel] = process

    def _read(self, channel: Channel[PeerMessage]) -> None:
        channel.flush()
        try:
            messages = channel.receive()
        except ProtocolError:
            channel.close()
            return
        for message in messages:
            match message:
                case PeerIntro(instance=producer):
                    self._on_intro(channel, producer)
                case Commit():
                    self._on_commit(message)
                case Cancel(request_id=request_id):
                    self._on_cancel(channel, request_id)
                case Closed(request_id=request_id):
                    incoming = self._incoming.get(request_id)
                    if incoming is not None and incoming.request.status is Status.CLOSING:
                        self._release(incoming)
                case _:
                    channel.close()

    def _on_intro(self, channel: Channel[PeerMessage], producer: str) -> None:
        if channel in self._producers.strangers:
            self._producers.strangers.remove(channel)
        previous = self._producers.by_instance.get(producer)
        if previous is not None:
            self._lose(previous)
        self._reunite(channel)
        self._producers.by_instance[producer] = channel
        descriptor = self._transport.descriptor()
        hello = PeerHello(
            instance=self._instance,
            layout=self._layout,
            transport=self._transport.capabilities.name,
            descriptor=descriptor.data,
        )
        channel.send(hello, descriptor.fds)
        for incoming in self._incoming.values():
            if incoming.producer == producer and incoming.channel is None:
                self._promise(incoming, channel)

    def _lose(self, channel: Channel[PeerMessage]) -> None:
        """The producer behind `channel` is gone: it stores nothing more, once its process ended."""
        if channel in self._producers.strangers:
            self._producers.strangers.remove(channel)
        for producer, known in list(self._producers.by_instance.items()):
            if known is channel:
                del self._producers.by_instance[producer]
        channel.close()
        process = self._producers.processes.pop(channel, None)
        if process is not None:
            self._dying.append(process)
        for incoming in list(self._incoming.values()):
            if incoming.channel is not channel:
                continue
            incoming.channel = None
            if incoming.commit is None:
                incoming.lost = process
            if incoming.request.status is Status.CLOSING and incoming.lost is not None:
                continue
            if incoming.request.status is Status.CLOSING:
                self._release(incoming)
            elif incoming.commit is None:
                self._fail(incoming, WorkerLostError(f"{incoming.producer} is gone; try again"))

    def _bury(self) -> None:
        """Release what producers held that are gone by now."""
        for process in [process for process in self._dying if process.gone()]:
            self._forget(process)

    def _reunite(self, channel: Channel[PeerMessage]) -> None:
        """A producer connects again after its stores over the last connection were complete."""
        process = self._producers.processes.get(channel)
        if process is not None:
            for other in [other for other in self._dying if other.pid == process.pid]:
                self._forget(other)

    def _forget(self, process: PeerProcess) -> None:
        self._dying.remove(process)
        process.close()
        for incoming in list(self._incoming.values()):
            if incoming.lost is process:
                self._release(incoming)

    # ---- one request

    def _promise(self, incoming: Incoming, channel: Channel[PeerMessage]) -> None:
        incoming.channel = channel
        channel.send(
            Reserve(
                request_id=incoming.request.request_id,
                first_block=incoming.first_block,
                blocks=incoming.blocks,
            )
        )

    def _on_commit(self, commit: Commit) -> None:
        incoming = self._incoming.get(commit.request_id)
        if incoming is None or incoming.request.status is not Status.RESERVED:
            return
        incoming.commit = commit
        if incoming.blocks:
            num_pages = len(incoming.blocks) * self._layout.num_layers
            self._transport.commit(commit.request_id, num_pages)
        else:
            self._on_arrived(commit.request_id, 0)

    def _on_arrived(self, request_id: str, taken_bytes: int) -> None:
        """`taken_bytes`: what this side's transport counted."""
        incoming = self._incoming.get(request_id)
        if incoming is None or incoming.commit is None:
            return
        request, commit = incoming.request, incoming.commit
        if request.status is not Status.RESERVED:
            return
        assert incoming.checksum is not None
        pending = incoming.checksum.begin()
        verified = pending.done()
        damaged = verified and pending.result() != commit.checksum
        if commit.num_tokens != request.num_prompt_tokens or damaged:
            self._fail(incoming, _damaged(incoming.producer))
            return
        del self._incoming[request_id]
        # Without slots the producer sends to a store: what came here is what was taken from it.
        needs_slots = self._transport.capabilities.needs_slots
        self._report(incoming, commit, commit.num_bytes if needs_slots else taken_bytes)
        self._scheduler.commit(request, commit.first_token)
        if verified:
            self._scheduler.verified(request)
        else:
            self._unverified[request_id] = Unverified(
                request, incoming.producer, request.block_table, commit.checksum, pending
            )

    def _report(self, incoming: Incoming, commit: Commit, moved: int) -> None:
        request_id = incoming.request.request_id
        self.bytes_received += moved
        if commit.start_ns:
            start = Event(EventKind.TRANSFER_START, commit.start_ns, incoming.producer)
            self._outbox.event(request_id, start)
        end = Event(
            EventKind.TRANSFER_END,
            self._clock(),
            self._instance,
            num_bytes=moved,
            num_pieces=commit.num_pieces,
            busy_ns=commit.busy_ns,
            transport=self._transport.capabilities.name,
        )
        self._outbox.event(request_id, end)

    def _on_cancel(self, channel: Channel[PeerMessage], request_id: str) -> None:
        """The producer gave up and stores nothing more; it reported the failure itself."""
        channel.send(Closed(request_id))
        incoming = self._incoming.get(request_id)
        if incoming is not None:
            self._release(incoming)

    def _give_up(self, incoming: Incoming, reason: str) -> None:
        request = incoming.request
        self._abort_transport(incoming)
        channel = incoming.channel
        if incoming.lost is not None:
            self._scheduler.begin_closing(request)
            return
        if channel is None or incoming.commit is not None:
            # No producer knows the blocks, or it has stored its last.
            self._release(incoming)
            return
        self._scheduler.begin_closing(request)
        channel.send(Cancel(request.request_id, reason))

    def _abort_transport(self, incoming: Incoming) -> None:
        if incoming.blocks:
            self._transport.abort(incoming.request.request_id)

    def _release(self, incoming: Incoming) -> None:
        self._abort_transport(incoming)
        self._incoming.pop(incoming.request.request_id, None)
        self._scheduler.finish(incoming.request)

    def _fail(self, incoming: Incoming, error: RequestError) -> None:
        self.failures += 1
        self._give_up(incoming, str(error))
        self._outbox.fail(incoming.request.request_id, error)
