"""How a prompt gets to its consumer: stored in its pages piece by piece, and its end told once all
that was stored has landed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from pdrelay.core.clock import Clock
from pdrelay.errors import TransportError
from pdrelay.integrations.vllm.links import Link, Links
from pdrelay.integrations.vllm.messages import Closed, Done, Failed
from pdrelay.integrations.vllm.page_layout import PageLayout
from pdrelay.integrations.vllm.pages import Fence, Move
from pdrelay.integrations.vllm.progress import Piece, Progress
from pdrelay.integrations.vllm.stats import HandOverStats


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

    @property
    def on_lease(self) -> bool:
        """Its blocks are kept for whoever may ask."""
        return self.held and self.link is None and not self.ended

    def pairs_of(self, piece: Piece) -> Pairs:
        """All pieces of a chunk get the same lists: so the writer need not look at them again."""
        if self.pairs is None or (self.pairs.start, self.pairs.stop) != (piece.start, piece.stop):
            src = self.blocks[piece.start : piece.stop]
            dst = self.progress.destinations(piece.start, piece.stop)
            self.pairs = Pairs(piece.start, piece.stop, src, dst)
        return self.pairs


class Sender:
    def __init__(
        self,
        layout: PageLayout,
        links: Links,
        clock: Clock,
        on_ended: Callable[[Outgoing], None],
    ) -> None:
        """`on_ended`: it has its verdict, and what it stored has landed."""
        self._layer_bytes = [layer.block_bytes for layer in layout.layers]  # of one block
        self._block_bytes = sum(self._layer_bytes)
        self._links = links
        self._clock = clock
        self._on_ended = on_ended
        self.closing: list[Outgoing] = []  # whose verdict waits for a fence
        self.stats = HandOverStats()

    def write_all(self, pieces: list[tuple[Outgoing, Piece | None]]) -> None:
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
                self.conclude(outgoing, self._done(outgoing))

    def give_up(self, outgoing: Outgoing, reason: str) -> None:
        """Idempotent."""
        if outgoing.ended or outgoing.verdict is not None:
            return
        self.stats.num_failed += 1
        self.conclude(outgoing, Failed(outgoing.transfer_id, reason))

    def conclude(self, outgoing: Outgoing, verdict: Done | Failed | Closed) -> None:
        """Store nothing more; say so, and free the blocks, once what was stored has landed."""
        assert outgoing.verdict is None and not outgoing.ended
        outgoing.verdict = verdict
        link = outgoing.link
        if link is not None and link.writer is not None and outgoing.num_pieces:
            outgoing.fence = link.writer.fence()
        if self._landed(outgoing):
            self._end(outgoing)
        else:
            self.closing.append(outgoing)

    def end_landed(self) -> None:
        """Of those that are closing."""
        for outgoing in list(self.closing):
            if self._landed(outgoing):
                self._end(outgoing)

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
                self.give_up(outgoing, f"the producer cannot store: {error}")
            if not link.channel.closed:
                self._links.refuse(link, error)
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
                self._links.refuse(outgoing.link, error)
            return True

    def _end(self, outgoing: Outgoing) -> None:
        verdict, link = outgoing.verdict, outgoing.link
        assert verdict is not None
        outgoing.ended = True
        if outgoing in self.closing:
            self.closing.remove(outgoing)
        if isinstance(verdict, Done):
            self.stats.observe(verdict)
        if link is not None:
            link.channel.send(verdict)
        self._on_ended(outgoing)
