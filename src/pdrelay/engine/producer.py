"""The producer's side of P/D: sends prompts' KV to consumers while prefill computes it."""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import dataclass, field

from pdrelay.core.channel import Channel
from pdrelay.core.clock import Clock
from pdrelay.core.hand_over import HandOver, Piece
from pdrelay.core.messages import (
    Cancel,
    Closed,
    Commit,
    PeerHello,
    PeerIntro,
    PeerMessage,
    Prefill,
    Reserve,
)
from pdrelay.core.request import Request
from pdrelay.core.scheduler import Scheduler, StepPlan
from pdrelay.engine.outbox import Outbox
from pdrelay.errors import (
    DeadlineError,
    ProtocolError,
    RequestError,
    TransportError,
    WorkerLostError,
)
from pdrelay.transport.base import (
    Descriptor,
    ProducerLink,
    Sent,
    TransferFailed,
    TransferReport,
    Transport,
)

Checksum = Callable[[list[int]], int]


@dataclass
class Peer:
    """One consumer incarnation. `link` stands once its PeerHello is in."""

    instance: str
    address: str
    channel: Channel[PeerMessage]
    link: ProducerLink | None = None
    early: dict[str, Reserve] = field(default_factory=dict)  # before the front door's Prefill


@dataclass
class Outgoing:
    """One request on its way to a consumer."""

    request: Request
    peer: Peer
    hand_over: HandOver
    begun: bool = False
    finished: bool = False  # no further send
    report: TransferReport | None = None  # all bytes have left
    first_token: int | None = None
    deadline_ns: int | None = None  # set once prefill is done


class Producer:
    """Drives hand-overs from the engine's thread. Calls nothing that blocks."""

    def __init__(
        self,
        *,
        instance: str,
        transport: Transport,
        scheduler: Scheduler,
        outbox: Outbox,
        num_layers: int,
        checksum: Checksum,
        timeout_s: float,
        clock: Clock,
    ) -> None:
        self._instance = instance
        self._transport = transport
        self._scheduler = scheduler
        self._outbox = outbox
        self._num_layers = num_layers
        self._checksum = checksum
        self._timeout_s = timeout_s
        self._clock = clock
        self._block_size = scheduler.config.block_size
        self._peers: dict[str, Peer] = {}  # by address
        self._outgoing: dict[str, Outgoing] = {}
        self._in_step = False
        self._to_finish: list[Request] = []  # given up while a step computes on their blocks
        self.bytes_sent = 0
        self.failures = 0

    @property
    def num_transferring(self) -> int:
        return len(self._outgoing)

    def channels(self) -> list[Channel[PeerMessage]]:
        return [peer.channel for peer in self._peers.values()]

    # ---- the front door's requests

    def prefill(self, message: Prefill) -> None:
        """Queue the prompt; its KV goes to the named consumer."""
        request = Request(message.request, samples_only_first=True)
        try:
            peer = self._peer(message.consumer, message.consumer_address)
        except OSError as error:
            self._outbox.fail(
                request.request_id,
                WorkerLostError(f"cannot reach {message.consumer} for the hand-over: {error}"),
            )
            return
        num_blocks = -(-request.num_prompt_tokens // self._block_size)
        hand_over = HandOver(
            self._num_layers, num_blocks, needs_slots=self._transport.capabilities.needs_slots
        )
        outgoing = Outgoing(request, peer, hand_over)
        self._outgoing[request.request_id] = outgoing
        self._scheduler.add(request)
        if peer.link is not None:
            self._send(outgoing, hand_over.link_ready())
        early = peer.early.pop(request.request_id, None)
        if early is not None:
            self._set_slots(outgoing, early)

    def abort(self, request_id: str, reason: str) -> None:
        outgoing = self._outgoing.get(request_id)
        if outgoing is not None:
            self._drop(outgoing, cancel=reason or "aborted")

    # ---- during and after a step

    def begin_step(self) -> None:
        """Until `end_step`, requests that are given up keep their blocks: the step uses them."""
        self._in_step = True

    def end_step(self) -> None:
        self._in_step = False
        for request in self._to_finish:
            self._scheduler.finish(request)
        self._to_finish.clear()

    def after_layer(self, plan: StepPlan, layer: int) -> None:
        """Layer `layer` of all the plan's chunks is written: send the blocks it completes, also
        into slots that consumers reserved meanwhile."""
        for peer in list(self._peers.values()):
            self._read(peer)
        for chunk in plan.chunks:
            outgoing = self._outgoing.get(chunk.request.request_id)
            if outgoing is None:
                continue
            done = chunk.start + chunk.length
            last = done >= chunk.request.num_prompt_tokens
            ready = outgoing.hand_over.num_blocks if last else done // self._block_size
            self._send(outgoing, outgoing.hand_over.mark_ready(layer, ready))

    def prefill_done(self, request: Request, first_token: int) -> None:
        """The first token is sampled and the request goes on: commit when all bytes have left."""
        outgoing = self._outgoing[request.request_id]
        self._scheduler.begin_hand_over(request)
        outgoing.first_token = first_token
        outgoing.deadline_ns = self._clock() + int(self._timeout_s * 1e9)
        self._commit_if_complete(outgoing)

    def finished_early(self, request: Request) -> None:
        """The first token ended the request: the consumer is not needed."""
        outgoing = self._outgoing.get(request.request_id)
        if outgoing is not None:
            self._drop(outgoing, cancel="finished with the first token")

    def poll(self) -> None:
        """Read what consumers say and what links report; enforce deadlines."""
        for peer in list(self._peers.values()):
            self._read(peer)
            if peer.link is not None:
                for report in peer.link.poll():
                    self._on_report(report)
            if peer.channel.closed:
                self._lose(peer)
        now = self._clock()
        for outgoing in list(self._outgoing.values()):
            if outgoing.deadline_ns is not None and now > outgoing.deadline_ns:
                self._fail(
                    outgoing,
                    DeadlineError(
                        f"KV hand-over to {outgoing.peer.instance} took over "
                        f"{self._timeout_s:g} s: raise --kv-transfer-timeout or add decode workers"
                    ),
                )

    def next_deadline_ns(self) -> int | None:
        deadlines = [o.deadline_ns for o in self._outgoing.values() if o.deadline_ns is not None]
        return min(deadlines, default=None)

    def close(self) -> None:
        for peer in list(self._peers.values()):
            self._lose(peer)

    # ---- peers

    def _peer(self, instance: str, address: str) -> Peer:
        peer = self._peers.get(address)
        if peer is None:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                sock.connect(address)  # local: succeeds or fails at once
            except OSError:
                sock.close()
                raise
            peer = Peer(instance, address, Channel(sock, PeerMessage))
            peer.channel.send(PeerIntro(self._instance))
            self._peers[address] = peer
        return peer

    def _read(self, peer: Peer) -> None:
        peer.channel.flush()
        try:
            messages = peer.channel.receive()
        except ProtocolError:
            peer.channel.close()
            return
        for message in messages:
            match message:
                case PeerHello():
                    self._on_hello(peer, message)
                case Reserve(request_id=request_id):
                    outgoing = self._outgoing.get(request_id)
                    if outgoing is None:
                        peer.early[request_id] = message
                    else:
                        self._set_slots(outgoing, message)
                case Cancel(request_id=request_id):
                    peer.early.pop(request_id, None)
                    if request_id in self._outgoing:
                        self._drop(self._outgoing[request_id])
                    peer.channel.send(Closed(request_id))
                case Closed(request_id=request_id):
                    peer.early.pop(request_id, None)
                case _:
                    peer.channel.close()

    def _on_hello(self, peer: Peer, hello: PeerHello) -> None:
        fds = tuple(peer.channel.received_fds)
        peer.channel.received_fds.clear()
        try:
            peer.link = self._transport.connect(hello.layout, Descriptor(hello.descriptor, fds))
        except TransportError:
            peer.channel.close()
            return
        for outgoing in self._of(peer):
            self._send(outgoing, outgoing.hand_over.link_ready())

    def _of(self, peer: Peer) -> list[Outgoing]:
        return [o for o in self._outgoing.values() if o.peer is peer]

    def _lose(self, peer: Peer) -> None:
        del self._peers[peer.address]
        for outgoing in self._of(peer):
            self._fail(outgoing, WorkerLostError(f"{peer.instance} is gone; try again"))
        if peer.link is not None:
            peer.link.close()
        peer.channel.close()

    # ---- one hand-over

    def _set_slots(self, outgoing: Outgoing, reserve: Reserve) -> None:
        self._send(outgoing, outgoing.hand_over.set_slots(reserve.first_block, reserve.blocks))
        self._commit_if_complete(outgoing)

    def _send(self, outgoing: Outgoing, pieces: list[Piece]) -> None:
        link = outgoing.peer.link
        request_id = outgoing.request.request_id
        if link is None:
            return
        try:
            if not outgoing.begun:
                outgoing.begun = True
                link.begin(request_id, outgoing.request.prompt_keys(self._block_size))
            for piece in pieces:
                link.send(
                    request_id,
                    piece.layer,
                    piece.start,
                    outgoing.request.block_table[piece.start : piece.stop],
                    outgoing.hand_over.destinations(piece),
                )
            if outgoing.hand_over.all_sent and not outgoing.finished:
                outgoing.finished = True
                link.finish(request_id)
        except TransportError as error:
            self._fail(outgoing, WorkerLostError(f"KV hand-over failed: {error}"))

    def _on_report(self, report: Sent | TransferFailed) -> None:
        match report:
            case Sent(report=done):
                outgoing = self._outgoing.get(done.transfer_id)
                if outgoing is not None:
                    outgoing.report = done
                    self._commit_if_complete(outgoing)
            case TransferFailed(transfer_id=transfer_id, message=text):
                outgoing = self._outgoing.get(transfer_id)
                if outgoing is not None:
                    self._fail(outgoing, WorkerLostError(f"KV hand-over failed: {text}"))

    def _commit_if_complete(self, outgoing: Outgoing) -> None:
        report, hand_over = outgoing.report, outgoing.hand_over
        if report is None or outgoing.first_token is None or hand_over.first_block is None:
            return
        request = outgoing.request
        sent_blocks = request.block_table[hand_over.first_block : hand_over.num_blocks]
        commit = Commit(
            request_id=request.request_id,
            first_token=outgoing.first_token,
            num_tokens=request.num_prompt_tokens,
            checksum=self._checksum(sent_blocks),
            num_bytes=report.num_bytes,
            num_pieces=report.num_pieces,
            start_ns=report.start_ns,
            busy_ns=report.busy_ns,
        )
        outgoing.peer.channel.send(commit)
        self.bytes_sent += report.num_bytes
        del self._outgoing[request.request_id]
        self._scheduler.finish(request)

    def _drop(self, outgoing: Outgoing, *, cancel: str | None = None) -> None:
        """Stop storing, free the blocks; tell the consumer unless it was the one to ask."""
        request_id = outgoing.request.request_id
        del self._outgoing[request_id]
        if outgoing.peer.link is not None and outgoing.begun:
            outgoing.peer.link.abort(request_id)
        if cancel is not None:
            outgoing.peer.channel.send(Cancel(request_id, cancel))
        if self._in_step:
            self._to_finish.append(outgoing.request)
        else:
            self._scheduler.finish(outgoing.request)

    def _fail(self, outgoing: Outgoing, error: RequestError) -> None:
        if outgoing.request.request_id not in self._outgoing:
            return
        self.failures += 1
        self._drop(outgoing, cancel=str(error))
        self._outbox.fail(outgoing.request.request_id, error)
