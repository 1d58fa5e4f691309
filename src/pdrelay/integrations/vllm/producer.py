"""The producer rank's side: pushes prompts' KV into consumers' blocks while prefill computes it.

No thread and no clock of its own. Not thread-safe: `service.py` shares one lock between the
engine's thread and its own. Either may `look` and `poll`; begin_step, layer_due, push, end_step and
take_finished are the engine's. Where launching kernels bounds a prefill, what it does here is time
to the first token: a layer is noted without the lock, and what can be is done once a chunk, when
there is enough to submit.
"""

from __future__ import annotations

import contextlib
import logging
import os
from dataclasses import dataclass, field

from pdrelay.core.channel import Channel
from pdrelay.core.clock import Clock
from pdrelay.errors import ConfigError, ProtocolError, TransportError
from pdrelay.integrations.vllm.inbox import Inbox
from pdrelay.integrations.vllm.listener import listen
from pdrelay.integrations.vllm.messages import (
    PROTOCOL,
    Announce,
    Ask,
    Cancel,
    Closed,
    Done,
    Failed,
    FromConsumer,
    Hello,
    Refused,
    Welcome,
)
from pdrelay.integrations.vllm.page_layout import check_inside, check_same_pages
from pdrelay.integrations.vllm.pages import Fence, Move, Pages, PageWriter
from pdrelay.integrations.vllm.progress import Piece, Progress
from pdrelay.integrations.vllm.stats import HandOverStats
from pdrelay.integrations.vllm.step import Chunk, StepPlan

_log = logging.getLogger(__name__)

_MAX_ENDED = 4096  # transfers whose end is remembered for a late consumer
_LOOKS_A_STEP = 8  # by layers, at what consumers say; one takes 2 to 4 µs if it is nothing
_NEVER = 1 << 62


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
    early: dict[str, Early] = field(default_factory=dict)


@dataclass(frozen=True)
class Pairs:
    """Prompt blocks `start .. stop` here and at the consumer."""

    start: int
    stop: int
    src: list[int]
    dst: list[int]


@dataclass(eq=False)
class Outgoing:
    """One prompt on its way. `ended`: nothing more will be stored, and all that was has landed."""

    request_id: str
    transfer_id: str
    num_tokens: int
    digest: bytes
    progress: Progress
    blocks: list[int] = field(default_factory=list)
    pairs: Pairs | None = None  # last written
    link: Link | None = None
    fence: Fence | None = None  # behind the last store
    verdict: Done | Failed | Closed | None = None  # to be sent when `fence` has passed
    ended: bool = False
    held: bool = False  # vLLM waits for us to free the blocks
    lease_end_ns: int = 0  # while held and not announced
    num_pieces: int = 0
    start_ns: int = 0
    end_ns: int = 0
    busy_ns: int = 0

    @property
    def live(self) -> bool:
        """May still be sent."""
        return self.verdict is None and not self.ended

    def pairs_of(self, piece: Piece) -> Pairs:
        """All pieces of a chunk get the same lists: so the writer need not look at them again."""
        if self.pairs is None or (self.pairs.start, self.pairs.stop) != (piece.start, piece.stop):
            src = self.blocks[piece.start : piece.stop]
            dst = self.progress.destinations(piece.start, piece.stop)
            self.pairs = Pairs(piece.start, piece.stop, src, dst)
        return self.pairs


class Producer:
    def __init__(
        self,
        *,
        pages: Pages,
        address: str,
        instance: str,
        rank: int,
        num_ranks: int,
        lease_s: float,
        clock: Clock,
    ) -> None:
        """Listen at `address`. Raises ConfigError when that cannot be."""
        self._pages = pages
        self._address = address
        self._instance = instance
        self._rank = (rank, num_ranks)
        self._lease_ns = int(lease_s * 1e9)
        self._clock = clock
        self._listener = listen(address)
        self._inbox = Inbox()
        self._inbox.watch(self._listener.fileno())
        self._links: list[Link] = []
        self._by_fd: dict[int, Link] = {}  # those in the inbox
        self._by_request: dict[str, Outgoing] = {}
        self._by_transfer: dict[str, Outgoing] = {}
        self._ended: dict[str, str] = {}  # transfer -> why nothing comes of it
        self._closing: list[Outgoing] = []  # whose verdict waits for a fence
        self._finished: set[str] = set()
        self._layer_bytes = [layer.block_bytes for layer in pages.layout.layers]  # of one block
        self._block_bytes = sum(self._layer_bytes)
        self._page_bytes = max(self._layer_bytes)
        self._step: list[Outgoing] = []  # what this step computes
        self._written: dict[int, None] = {}  # layers of this step; engine's thread only
        self._push_stride = 0  # layers between two submissions of this step
        self._push_at = 0  # layers at which the next may be worth it; engine's thread only
        self._look_stride = -(-len(self._layer_bytes) // _LOOKS_A_STEP)
        self._look_at = 0  # as _push_at
        self._due_at = _NEVER  # layers at which push has something to do
        self._abandoned = False
        self.stats = HandOverStats()

    # ---- the engine's thread

    def begin_step(self, plan: StepPlan) -> None:
        """Apply what the scheduler decided, before the step's forward."""
        if plan.rewound or plan.dropped:
            self._pages.before_overwrite()
        for left in self._step:
            left.progress.abandon_step()  # as a rule there is none: the last step did end
        self._step = []
        for request_id in plan.rewound:
            outgoing = self._by_request.get(request_id)
            if outgoing is not None:
                outgoing.progress.rewind()
                outgoing.blocks = []
        for request_id, reason in plan.dropped.items():
            outgoing = self._by_request.pop(request_id, None)
            if outgoing is not None:
                self._give_up(outgoing, reason)
        for transfer_id, reason in plan.refused.items():
            self._refuse(transfer_id, reason)
        for request_id in plan.held:
            self._hold(request_id)
        self._step = [self._add(chunk) for chunk in plan.chunks]
        self._written.clear()
        self._push_stride = self._push_at = self._layers_a_push()
        self._look_at = self._look_stride
        self._due_at = self._next_due()

    def layer_due(self, layer: int) -> bool:
        """The step's KV of `layer` is issued; whether `push` should follow. Needs no lock."""
        self._written[layer] = None
        return len(self._written) >= self._due_at

    def push(self) -> None:
        """Look for consumers, and send what the layers written so far complete, to those for whom
        that is worth a submission."""
        written = list(self._written)
        if len(written) >= self._look_at:
            self._look_at = len(written) + self._look_stride
            self.look()
        if len(written) >= self._push_at:
            self._push_at = len(written) + self._push_stride
            due = self._due(len(written))
            if due:
                self._pages.kv_written()
                self._write_all([(out, out.progress.take(written)) for out in due])
        self._due_at = self._next_due()

    def _next_due(self) -> int:
        """After how many of the step's layers `push` should come."""
        due_at = self._look_at if self._closing else _NEVER
        for out in self._step:
            if out.live:
                due_at = min(due_at, self._look_at if out.link is None else self._push_at)
        return due_at

    def end_step(self) -> None:
        """The forward is issued: layers that did not report (graph replay) are written too."""
        if not self._step:
            return
        step, self._step = self._step, []
        self._written.update(dict.fromkeys(range(len(self._layer_bytes))))
        written = list(self._written)
        self._pages.kv_written()
        self._write_all([(out, out.progress.end_step(written)) for out in step])

    @property
    def _pages_a_push(self) -> int:
        """Pages of one layer that are worth a submission."""
        return max(1, -(-self._pages.batch_bytes // self._page_bytes))

    def _layers_a_push(self) -> int:
        """After how many layers at the earliest `push` finds something due."""
        num_blocks = sum(out.progress.blocks_a_layer for out in self._step if out.live)
        return -(-self._pages_a_push // max(1, num_blocks))

    def _due(self, num_written: int) -> list[Outgoing]:
        """What the step computes for consumers for whom together there is enough."""
        by_link: dict[Link, list[Outgoing]] = {}
        for out in self._step:
            if out.live and out.link is not None:
                by_link.setdefault(out.link, []).append(out)
        return [
            out
            for outs in by_link.values()
            if sum(out.progress.num_due(num_written) for out in outs) >= self._pages_a_push
            for out in outs
        ]

    @property
    def has_finished(self) -> bool:
        return bool(self._finished)

    def take_finished(self) -> set[str]:
        """Held requests whose blocks are free to go, each once."""
        finished, self._finished = self._finished, set()
        return finished

    # ---- whoever attends

    def fileno(self) -> int:
        """Readable when consumers have something to say; until `close`."""
        return self._inbox.fileno()

    def open_fences(self) -> list[Fence]:
        return [out.fence for out in self._closing if out.fence is not None]

    def next_deadline_ns(self) -> int | None:
        ends = [out.lease_end_ns for out in self._by_request.values() if self._on_lease(out)]
        ends += [early.deadline_ns for link in self._links for early in link.early.values()]
        return min(ends, default=None)

    def look(self) -> None:
        """Read what consumers say, tell them what has landed. Never blocks."""
        if self._abandoned:
            return
        ready = self._inbox.ready()
        if not ready and not self._closing:
            return
        for fd in ready:
            link = self._by_fd.get(fd)
            if link is None:
                self._accept()
            else:
                self._read(link)
        for outgoing in list(self._closing):
            if self._landed(outgoing):
                self._end(outgoing)
        self._due_at = self._next_due()

    def poll(self) -> None:
        """`look`, enforce leases, and let go of consumers that are gone. Never blocks."""
        if self._abandoned:
            return
        self.look()
        self._expire(self._clock())
        for link in list(self._links):
            self._watch(link)
            if link.channel.closed:
                self._lose(link)

    def close(self) -> None:
        """Stop handing over: consumers see the sockets end, held blocks are freed."""
        if self._abandoned:
            return
        self._abandoned = True
        outgoings = [*self._by_request.values(), *self._closing]
        for outgoing in outgoings:
            if outgoing.fence is not None:
                outgoing.fence.wait()
            elif outgoing.link is not None and outgoing.link.writer is not None:
                outgoing.link.writer.fence().wait()
        for link in self._links:
            self._close_link(link)
        self._links.clear()
        self._closing.clear()
        for outgoing in outgoings:
            outgoing.ended, outgoing.link = True, None
            self._free(outgoing)
        self._inbox.close()
        self._listener.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._address)

    # ---- requests

    def _add(self, chunk: Chunk) -> Outgoing:
        outgoing = self._by_request.get(chunk.request_id)
        if outgoing is None:
            outgoing = self._begin(chunk)
        outgoing.blocks, outgoing.pairs = chunk.blocks, None
        progress = outgoing.progress
        last = chunk.num_ready >= outgoing.num_tokens
        complete = chunk.num_ready // self._pages.layout.block_size
        progress.begin_step(progress.num_blocks if last else complete)
        return outgoing

    def _begin(self, chunk: Chunk) -> Outgoing:
        layout = self._pages.layout
        num_blocks = -(-chunk.num_tokens // layout.block_size)
        outgoing = Outgoing(
            chunk.request_id,
            chunk.transfer_id,
            chunk.num_tokens,
            chunk.digest,
            Progress(len(layout.layers), num_blocks),
        )
        self._by_request[chunk.request_id] = outgoing
        if self._abandoned:
            outgoing.ended = True
            return outgoing
        if chunk.transfer_id in self._by_transfer or chunk.transfer_id in self._ended:
            _log.warning("transfer id %s was used before: not handed over", chunk.transfer_id)
            outgoing.ended = True
            return outgoing
        self._by_transfer[chunk.transfer_id] = outgoing
        for link in self._links:
            early = link.early.pop(chunk.transfer_id, None)
            if early is not None:
                self._match(outgoing, link, early.announce)
        return outgoing

    def _hold(self, request_id: str) -> None:
        outgoing = self._by_request.get(request_id)
        if outgoing is None:
            self._finished.add(request_id)  # it was given up before
            return
        outgoing.held = True
        outgoing.lease_end_ns = self._clock() + self._lease_ns
        if outgoing.ended:
            self._free(outgoing)
        elif outgoing.verdict is None and not outgoing.progress.all_ready:
            self._give_up(outgoing, "the producer preempted it after its prefill")

    def _refuse(self, transfer_id: str, reason: str) -> None:
        """There will be no prefill of this transfer."""
        if transfer_id in self._by_transfer or transfer_id in self._ended:
            return
        self._remember(transfer_id, reason)
        for link in self._links:
            if link.early.pop(transfer_id, None) is not None:
                link.channel.send(Failed(transfer_id, reason))

    def _free(self, outgoing: Outgoing) -> None:
        """Its blocks are not needed any more."""
        if outgoing.held and self._by_request.pop(outgoing.request_id, None) is not None:
            self._finished.add(outgoing.request_id)

    def _on_lease(self, outgoing: Outgoing) -> bool:
        return outgoing.held and outgoing.link is None and not outgoing.ended

    def _expire(self, now_ns: int) -> None:
        for outgoing in list(self._by_request.values()):
            if self._on_lease(outgoing) and now_ns >= outgoing.lease_end_ns:
                self.stats.num_expired += 1
                _log.warning("nobody asked for transfer %s: freed", outgoing.transfer_id)
                self._give_up(outgoing, "the producer's lease has ended: nobody asked for it")
        for link in self._links:
            for transfer_id, early in list(link.early.items()):
                if now_ns >= early.deadline_ns:
                    del link.early[transfer_id]
                    reason = "the producer got no such request"
                    link.channel.send(Failed(transfer_id, reason))

    # ---- one transfer

    def _match(self, outgoing: Outgoing, link: Link, announce: Announce) -> None:
        reason = self._mismatch(outgoing, link, announce)
        if reason:
            link.channel.send(Failed(announce.transfer_id, reason))
            return
        if not self._open(link):
            return
        outgoing.link = link
        progress = outgoing.progress
        first = min(announce.first_block, progress.num_blocks)
        progress.announce(first, announce.blocks[: progress.num_blocks - first])
        if not progress.in_step:  # else the step writes it, as it knows what is ready
            self._write_all([(outgoing, progress.take_rest())])

    def _open(self, link: Link) -> bool:
        """Reach the consumer's pages, if that was not done yet; refuse it if that fails."""
        if link.writer is not None:
            return True
        hello, fds = link.hello, link.fds
        assert hello is not None
        link.fds = ()
        try:
            link.writer = self._pages.open(hello.layout, hello.handles, fds)
        except TransportError as error:
            self._refuse_link(link, error)
            return False
        return True

    def _mismatch(self, outgoing: Outgoing, link: Link, announce: Announce) -> str:
        """Why `announce` cannot have the prompt's KV; empty if it can."""
        if outgoing.link is not None:
            return "another consumer has it"
        ahead = announce.num_tokens - outgoing.num_tokens
        if not 0 <= ahead < len(announce.digests) or announce.digests[ahead] != outgoing.digest:
            return "the prompts at producer and consumer differ"
        num_blocks = -(-announce.num_tokens // self._pages.layout.block_size)
        if announce.first_block < 0 or announce.first_block + len(announce.blocks) != num_blocks:
            return "the announced blocks do not fit the prompt"
        assert link.hello is not None
        end = link.hello.layout.num_blocks
        if announce.blocks and not 0 <= min(announce.blocks) <= max(announce.blocks) < end:
            return "an announced block does not exist"
        return ""

    def _write_all(self, pieces: list[tuple[Outgoing, Piece | None]]) -> None:
        """Store pieces, those for one consumer in one submission; that all of a prompt is stored
        ends its transfer."""
        by_link: dict[Link, list[tuple[Outgoing, Piece]]] = {}
        for outgoing, piece in pieces:
            if piece is not None and outgoing.live and outgoing.link is not None:
                by_link.setdefault(outgoing.link, []).append((outgoing, piece))
        for link, parts in by_link.items():
            self._write(link, parts)
        for outgoing, _ in pieces:
            if outgoing.live and outgoing.progress.all_sent:
                self._conclude(outgoing, self._done(outgoing))

    def _write(self, link: Link, parts: list[tuple[Outgoing, Piece]]) -> None:
        assert link.writer is not None
        moves: list[Move] = []
        sizes: list[int] = []
        for outgoing, piece in parts:
            pairs = outgoing.pairs_of(piece)
            moves += [Move(layer, pairs.src, pairs.dst) for layer in piece.layers]
            layer_bytes = sum([self._layer_bytes[layer] for layer in piece.layers])
            sizes.append(len(pairs.src) * layer_bytes)
        start_ns = self._clock()
        try:
            num_pieces = link.writer.write(moves)
        except TransportError as error:
            for outgoing, _ in parts:
                self._give_up(outgoing, f"the producer cannot store: {error}")
            if not link.channel.closed:
                self._refuse_link(link, error)
            return
        end_ns, total = self._clock(), sum(sizes)
        self.stats.num_bytes += total
        for (outgoing, _), size in zip(parts, sizes, strict=True):
            # Of what they share, each counts its part.
            outgoing.num_pieces += max(1, num_pieces * size // total)
            outgoing.busy_ns += (end_ns - start_ns) * size // total
            outgoing.start_ns = outgoing.start_ns or start_ns
            outgoing.end_ns = end_ns

    def _done(self, outgoing: Outgoing) -> Done:
        num_blocks = len(outgoing.progress.dst_blocks)
        return Done(
            transfer_id=outgoing.transfer_id,
            num_tokens=outgoing.num_tokens,
            num_bytes=num_blocks * self._block_bytes,
            num_pieces=outgoing.num_pieces,
            start_ns=outgoing.start_ns,
            end_ns=outgoing.end_ns,
            busy_ns=outgoing.busy_ns,
        )

    def _give_up(self, outgoing: Outgoing, reason: str) -> None:
        if outgoing.ended or outgoing.verdict is not None:
            return
        self.stats.num_failed += 1
        self._conclude(outgoing, Failed(outgoing.transfer_id, reason))

    def _conclude(self, outgoing: Outgoing, verdict: Done | Failed | Closed) -> None:
        """Store nothing more; say so, and free the blocks, once what was stored has landed."""
        assert outgoing.verdict is None and not outgoing.ended
        outgoing.verdict = verdict
        link = outgoing.link
        if link is not None and link.writer is not None and outgoing.num_pieces:
            outgoing.fence = link.writer.fence()
        if self._landed(outgoing):
            self._end(outgoing)
        else:
            self._closing.append(outgoing)

    def _landed(self, outgoing: Outgoing) -> bool:
        """Whether all that was stored has landed, or never will: then its consumer is refused,
        which also ends what may still be on its way there."""
        if outgoing.fence is None:
            return True
        try:
            return outgoing.fence.done()
        except TransportError as error:
            if isinstance(outgoing.verdict, Done):
                self.stats.num_failed += 1
                outgoing.verdict = Failed(outgoing.transfer_id, str(error))
            if outgoing.link is not None and not outgoing.link.channel.closed:
                self._refuse_link(outgoing.link, error)
            return True

    def _end(self, outgoing: Outgoing) -> None:
        verdict, link = outgoing.verdict, outgoing.link
        assert verdict is not None
        outgoing.ended = True
        if outgoing in self._closing:
            self._closing.remove(outgoing)
        if self._by_transfer.get(outgoing.transfer_id) is outgoing:
            del self._by_transfer[outgoing.transfer_id]
        if isinstance(verdict, Done):
            self._remember(outgoing.transfer_id, "it was handed over before")
            self.stats.observe(verdict)
        else:
            self._remember(outgoing.transfer_id, getattr(verdict, "reason", "it was cancelled"))
        if link is not None:
            link.channel.send(verdict)
        self._free(outgoing)

    def _remember(self, transfer_id: str, reason: str) -> None:
        self._ended[transfer_id] = reason
        while len(self._ended) > _MAX_ENDED:
            del self._ended[next(iter(self._ended))]

    # ---- consumers

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except (BlockingIOError, InterruptedError):
                return
            link = Link(Channel(sock, FromConsumer))
            self._links.append(link)
            self._watch(link)
            self._read(link)  # as a rule it has spoken

    def _watch(self, link: Link) -> None:
        """Be told when it has something to say, or takes what it did not take before."""
        if link.channel.closed:
            self._unwatch(link)
            return
        fd = link.channel.fileno()
        self._by_fd[fd] = link
        self._inbox.watch(fd, writing=link.channel.has_pending)

    def _unwatch(self, link: Link) -> None:
        fd = link.channel.fileno()
        if self._by_fd.pop(fd, None) is not None:
            self._inbox.forget(fd)

    def _read(self, link: Link) -> None:
        link.channel.flush()
        try:
            messages = link.channel.receive()
            for message in messages:
                self._on_message(link, message)
        except (ProtocolError, ConfigError) as error:
            self._refuse_link(link, error)
        self._watch(link)

    def _refuse_link(self, link: Link, error: Exception) -> None:
        _log.warning("%s is refused: %s", link.name, error)
        link.channel.send(Refused(str(error)))
        self._close_channel(link)

    def _close_channel(self, link: Link) -> None:
        self._unwatch(link)
        link.channel.close()

    def _on_message(self, link: Link, message: FromConsumer) -> None:
        if isinstance(message, Hello):
            self._on_hello(link, message)
            return
        if link.hello is None:
            raise ProtocolError("a consumer must say Hello first")
        match message:
            case Ask(transfer_id):
                self._on_ask(link, transfer_id)
            case Announce():
                self._on_announce(link, message)
            case Cancel(transfer_id):
                self._on_cancel(link, transfer_id)

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

    def _on_ask(self, link: Link, transfer_id: str) -> None:
        deadline_ns = self._clock() + self._lease_ns
        outgoing = self._by_transfer.get(transfer_id)
        if outgoing is not None:
            outgoing.lease_end_ns = deadline_ns
        early = link.early.get(transfer_id)
        if early is not None:
            early.deadline_ns = deadline_ns

    def _on_announce(self, link: Link, announce: Announce) -> None:
        outgoing = self._by_transfer.get(announce.transfer_id)
        ended = self._ended.get(announce.transfer_id)
        if outgoing is not None and outgoing.verdict is None:
            self._match(outgoing, link, announce)
        elif ended is not None or outgoing is not None:
            link.channel.send(Failed(announce.transfer_id, ended or "the producer gave it up"))
        else:
            deadline_ns = self._clock() + self._lease_ns
            link.early[announce.transfer_id] = Early(announce, deadline_ns)

    def _on_cancel(self, link: Link, transfer_id: str) -> None:
        link.early.pop(transfer_id, None)
        outgoing = self._by_transfer.get(transfer_id)
        if outgoing is None:
            # Its prefill may be yet to come: then it need not be kept.
            self._remember(transfer_id, self._ended.get(transfer_id, "it was cancelled"))
        elif outgoing.link in (None, link):
            if outgoing.verdict is None:
                outgoing.link = link
                self._conclude(outgoing, Closed(transfer_id))
            return  # else its verdict is on the way, which answers as well
        link.channel.send(Closed(transfer_id))

    def _lose(self, link: Link) -> None:
        """A consumer is gone: once fences have passed, nothing more is stored into its memory."""
        for outgoing in [out for out in self._by_request.values() if out.link is link]:
            if outgoing.verdict is None and not outgoing.ended:
                self._give_up(outgoing, "the consumer is gone")
        if any(out.link is link for out in self._closing):
            return  # its pages stay open until then; poll comes back
        self._links.remove(link)
        self._close_link(link)

    def _close_link(self, link: Link) -> None:
        for fd in (*link.fds, *link.channel.received_fds):
            os.close(fd)
        link.fds = ()
        link.channel.received_fds.clear()
        self._close_channel(link)
        if link.writer is not None:
            link.writer.close()
