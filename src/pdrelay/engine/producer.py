"""The producer's side of P/D: sends prompts' KV to consumers while prefill computes it.

It knows every request on its way (`outgoing.py`: what one asks of its link), every consumer
(`peer.py`: what one is told, and when), and the steps in flight (`fused_step.py`: what their
kernels store). News of any of them comes here and goes to the others.

On accelerators nothing that stores into a consumer's pages is over when the call that launched it
returns. What tells the consumer that it may reuse promised blocks (Commit, Closed, Cancel) is
therefore held back until every store of the request is complete: copies, by the transport's news
(`Sent`, `Stopped`); stores by the kernels of launched steps, by `end_step`, which the loop calls
once it has read the step. `transport/device_mapped.py` has the whole argument.

The loop's calls, in this order for each step, and each of them once a step:

    await_slots(plan, idle=...)   wait a moment, if that may let the step store for its consumer
    remote_store(plan)            where the step's kernels shall store besides the own pages
    begin_step()
    after_layer(plan, layer) ...  the layer's writes are launched (or done)
    launched(plan)                so is all of the step
    end_step()                    the step is complete and read; steps end in the order they began
"""

from __future__ import annotations

import contextlib
from collections import deque
from dataclasses import dataclass, field
from typing import Any, Protocol

from pdrelay.core.channel import Channel
from pdrelay.core.clock import Clock
from pdrelay.core.hand_over import Fused, HandOver, Piece
from pdrelay.core.messages import Cancel, Closed, PeerHello, PeerMessage, Prefill, Reserve
from pdrelay.core.request import Request
from pdrelay.core.scheduler import Scheduler, StepPlan
from pdrelay.engine.fused_step import FusedStep, busiest, fuse, reachable
from pdrelay.engine.outbox import Outbox
from pdrelay.engine.outgoing import Outgoing
from pdrelay.engine.peer import Peer, connect
from pdrelay.engine.slot_wait import SlotWait
from pdrelay.engine.step import RemoteSlots
from pdrelay.errors import DeadlineError, RequestError, TransportError, WorkerLostError
from pdrelay.transport.base import ProducerLink, Sent, Stopped, TransferFailed, Transport
from pdrelay.transport.checksum import Checksum


@dataclass
class BegunStep:
    """A step that is launched and not read."""

    fused: FusedStep | None
    given_up: list[Request] = field(default_factory=list)  # while it was the newest; freed with it


class PoolListener(Protocol):
    """Prepares steps that store into a peer's pool (`RemoteSlots.tensor`)."""

    def pool_opened(self, pool: Any) -> None: ...

    def pool_closed(self, pool: Any) -> None:
        """No step will name it any more; its mapping is closed next."""


class Producer:
    """Drives hand-overs from the engine's thread. What blocks is `await_slots`, and for some 50 us
    the checksum of a prompt whose slots came after its last step was launched."""

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
        pools: PoolListener | None = None,
        slot_wait: SlotWait | None = None,
    ) -> None:
        """`pools` hears of the pools that `remote_store` names."""
        self._pools = pools
        self._slot_wait = slot_wait or SlotWait(clock)
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
        self._fused: FusedStep | None = None  # of the step that begins next
        self._steps: deque[BegunStep] = deque()
        self._leaving: dict[str, ProducerLink] = {}  # closed, by address
        self.bytes_sent = 0
        self.failures = 0

    @property
    def num_transferring(self) -> int:
        return len(self._outgoing)

    @property
    def num_copying(self) -> int:
        """Requests of which all is sent and not all has left."""
        return sum(out.finished and out.report is None for out in self._outgoing.values())

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
        outgoing = Outgoing(request, peer, hand_over, self._block_size)
        self._outgoing[request.request_id] = outgoing
        self._scheduler.add(request)
        if peer.link is not None:
            self._send(outgoing, outgoing.link_ready())
        early = peer.early.pop(request.request_id, None)
        if early is not None:
            self._set_slots(outgoing, early)

    def meet(self, consumer: str, address: str) -> None:
        """Connect before prompts come. A consumer that cannot be reached is one for `prefill` to
        report."""
        with contextlib.suppress(OSError):
            self._peer(consumer, address)

    def is_meeting(self, address: str) -> bool:
        """Whether the consumer there has not said hello yet, and may still."""
        peer = self._peers.get(address)
        return peer is not None and peer.link is None

    def abort(self, request_id: str, reason: str) -> None:
        outgoing = self._outgoing.get(request_id)
        if outgoing is not None:
            self._drop(outgoing, cancel=reason or "aborted")

    # ---- during and after a step

    def await_slots(self, plan: StepPlan, *, idle: bool) -> None:
        """Give the consumer of most rows `SLOT_WAIT_NS` to say where the prompts that begin in
        this step go. `idle`: no step is in flight; otherwise, and for a consumer that was late
        last time, nothing is waited for."""
        stores = reachable(plan, self._outgoing)
        peer = busiest(stores)
        if peer is None:
            return
        due_ns = self._slot_wait.due_ns()
        missing = [
            outgoing
            for outgoing, _ in stores
            if outgoing.slots_due_ns is None and not outgoing.hand_over.slots_known
        ]
        for outgoing in missing:
            outgoing.slots_due_ns = due_ns
        awaited = [outgoing for outgoing in missing if outgoing.peer is peer]
        if not (idle and awaited and peer.punctual):
            return

        def over() -> bool:
            self._read(peer)
            return peer.channel.closed or not any(map(self._lacks_slots, awaited))

        peer.punctual = self._slot_wait.until(over, peer.channel, due_ns)

    def _lacks_slots(self, outgoing: Outgoing) -> bool:
        known = outgoing.hand_over.slots_known
        return not known and self._outgoing.get(outgoing.request_id) is outgoing

    def remote_store(self, plan: StepPlan) -> RemoteSlots | None:
        """Which consumer's pages the plan's step shall store into, too: of the one to which most
        of its rows go. What is not stored so is copied. Claims the rows: the step must follow."""
        assert self._fused is None
        fused = fuse(plan, self._outgoing, self._clock())
        if fused is None:
            return None
        self._fused, remote = fused
        return remote

    def begin_step(self) -> None:
        """Until `end_step`, requests that are given up keep their blocks: the step uses them."""
        self._steps.append(BegunStep(self._fused))
        self._fused = None

    def end_step(self) -> None:
        step = self._steps.popleft()
        if step.fused is not None:
            for outgoing, fused in step.fused.stores:
                self._stored(outgoing, fused, step.fused.start_ns)
            step.fused.peer.tell_closed()
        for request in step.given_up:
            self._scheduler.finish(request)

    def _stored(self, outgoing: Outgoing, fused: Fused, start_ns: int) -> None:
        """A step's stores for one request, which may be given up meanwhile, are complete."""
        outgoing.hand_over.stored()
        if self._outgoing.get(outgoing.request_id) is not outgoing:
            return
        try:
            outgoing.stored(fused, start_ns)
        except TransportError as error:
            self._fail(outgoing, WorkerLostError(f"KV hand-over failed: {error}"))

    def after_layer(self, plan: StepPlan, layer: int) -> None:
        """Layer `layer` of all the plan's chunks is written: send the blocks it completes, also
        into slots that consumers reserved meanwhile. Launching a long prompt takes milliseconds,
        for which no other hand-over waits."""
        if self._transport.device is not None:
            self._transport.device.written(layer)
        for peer in list(self._peers.values()):
            self._read(peer)
            if self.num_copying:
                self._take_reports(peer)
        for chunk in plan.chunks:
            outgoing = self._outgoing.get(chunk.request.request_id)
            if outgoing is not None:
                self._send(outgoing, outgoing.written(layer, chunk.start + chunk.length))

    def launched(self, plan: StepPlan) -> None:
        """Begin the checksums of the prompts that the step completes, where a device orders its
        work: a host would read pages that are not written yet."""
        if self._transport.device is None:
            return
        for chunk in plan.chunks:
            outgoing = self._outgoing.get(chunk.request.request_id)
            if outgoing is not None and chunk.samples:
                outgoing.sum_launched(self._checksum)

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
            self._take_reports(peer)
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
            left = self._leaving.get(address)
            if left is not None and not left.quiet():
                raise OSError("stores over the last connection to it are not complete yet")
            self._leaving.pop(address, None)
            peer = self._peers[address] = connect(self._instance, instance, address)
        return peer

    def _read(self, peer: Peer) -> None:
        for message in peer.receive():
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
                    peer.tell(Closed(request_id))
                case Closed(request_id=request_id):
                    peer.early.pop(request_id, None)
                case _:
                    peer.channel.close()

    def _on_hello(self, peer: Peer, hello: PeerHello) -> None:
        if not peer.open_link(self._transport, hello):
            return
        if self._pools is not None and peer.pool is not None:
            self._pools.pool_opened(peer.pool.tensor)
        for outgoing in self._of(peer):
            self._send(outgoing, outgoing.link_ready())

    def _of(self, peer: Peer) -> list[Outgoing]:
        return [o for o in self._outgoing.values() if o.peer is peer]

    def _lose(self, peer: Peer) -> None:
        del self._peers[peer.address]
        for outgoing in self._of(peer):
            reason = f"cannot be reached: {peer.refusal}" if peer.refusal else "is gone; try again"
            self._fail(outgoing, WorkerLostError(f"{peer.instance} {reason}"))
        if peer.link is not None:
            if self._pools is not None and peer.pool is not None:
                self._pools.pool_closed(peer.pool.tensor)
            peer.link.close()
            self._leaving[peer.address] = peer.link
        peer.channel.close()

    # ---- one hand-over

    def _set_slots(self, outgoing: Outgoing, reserve: Reserve) -> None:
        due_ns = outgoing.slots_due_ns
        if due_ns is None or self._clock() <= due_ns:
            outgoing.peer.punctual = True
        self._send(outgoing, outgoing.set_slots(reserve))
        self._commit_if_complete(outgoing)

    def _send(self, outgoing: Outgoing, pieces: list[Piece]) -> None:
        try:
            outgoing.send(pieces)
        except TransportError as error:
            self._fail(outgoing, WorkerLostError(f"KV hand-over failed: {error}"))

    def _take_reports(self, peer: Peer) -> None:
        if peer.link is not None:
            for report in peer.link.poll():
                self._on_report(peer, report)

    def _on_report(self, peer: Peer, report: Sent | Stopped | TransferFailed) -> None:
        match report:
            case Stopped(transfer_id=transfer_id):
                peer.stopped(transfer_id)
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
        commit = outgoing.commit(self._checksum)
        if commit is None:
            return
        outgoing.peer.channel.send(commit)
        self.bytes_sent += commit.num_bytes
        del self._outgoing[outgoing.request_id]
        self._scheduler.finish(outgoing.request)

    def _drop(self, outgoing: Outgoing, *, cancel: str | None = None) -> None:
        """Stop storing, free the blocks; tell the consumer, once nothing of it is stored any more,
        unless it was the one to ask."""
        request_id, peer = outgoing.request_id, outgoing.peer
        del self._outgoing[request_id]
        peer.close_request(request_id, outgoing.hand_over, copying=outgoing.abort())
        if cancel is not None:
            peer.tell(Cancel(request_id, cancel))
        if self._steps:
            self._steps[-1].given_up.append(outgoing.request)
        else:
            self._scheduler.finish(outgoing.request)

    def _fail(self, outgoing: Outgoing, error: RequestError) -> None:
        if outgoing.request_id not in self._outgoing:
            return
        self.failures += 1
        self._drop(outgoing, cancel=str(error))
        self._outbox.fail(outgoing.request_id, error)
