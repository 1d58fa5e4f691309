"""One request's KV on its way to a consumer: what its link is asked to do, in which order.

`begin` once, then `send` (copies) and `stored` (by a step's kernels) as pages become ready, and
`finish` once none is left. `HandOver` decides which pages; this file gives them to the link.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from pdrelay.core.hand_over import Fused, HandOver, Piece
from pdrelay.core.messages import Commit, Reserve
from pdrelay.core.request import Request
from pdrelay.engine.peer import Peer
from pdrelay.transport.base import ProducerLink, TransferReport
from pdrelay.transport.checksum import Checksum, PendingChecksum


@dataclass(eq=False)
class Outgoing:
    """`send` and `stored` raise TransportError when the link is broken."""

    request: Request
    peer: Peer
    hand_over: HandOver
    block_size: int
    begun: bool = False
    finished: bool = False  # no further send
    report: TransferReport | None = None  # all bytes have left
    first_token: int | None = None
    deadline_ns: int | None = None  # set once prefill is done
    table: list[int] = field(default_factory=list)  # `request.block_table` as last seen
    slots_due_ns: int | None = None  # until when its first step may wait for slots; None: no step
    checksum: PendingChecksum | None = None  # of the pages from `first_block` on

    @property
    def request_id(self) -> str:
        return self.request.request_id

    # ---- news: which pages may leave now

    def link_ready(self) -> list[Piece]:
        self._see_table()
        return self.hand_over.link_ready()

    def set_slots(self, reserve: Reserve) -> list[Piece]:
        self._see_table()
        return self.hand_over.set_slots(reserve.first_block, reserve.blocks)

    def written(self, layer: int, num_tokens: int) -> list[Piece]:
        """One layer of the first `num_tokens` tokens is written, or queued on the device."""
        self._see_table()
        last = num_tokens >= self.request.num_prompt_tokens
        num_blocks = self.hand_over.num_blocks if last else num_tokens // self.block_size
        return self.hand_over.mark_ready(layer, num_blocks)

    def fuse(self, start: int, stop: int) -> Fused | None:
        """Which tokens of `start .. stop` a step stores itself (`HandOver.fuse`)."""
        self._see_table()
        num_tokens = self.request.num_prompt_tokens
        return self.hand_over.fuse(start, stop, num_tokens, self.block_size)

    def _see_table(self) -> None:
        """A preempted request loses its blocks, and gets another table with the next ones."""
        if self.request.block_table is not self.table:
            self.table = self.request.block_table
            self.hand_over.rewind()

    # ---- the link

    def send(self, pieces: list[Piece]) -> None:
        link, request_id = self.peer.link, self.request_id
        if link is None:
            return
        self._begin(link)
        for piece in pieces:
            link.send(
                request_id,
                piece.layer,
                piece.start,
                self.request.block_table[piece.start : piece.stop],
                self.hand_over.destinations(piece),
            )
        if pieces:
            link.flush(request_id)
        self._finish_if_all_sent(link)

    def stored(self, fused: Fused, start_ns: int) -> None:
        """A step that is complete, and began at `start_ns`, stored `fused`, which `HandOver.stored`
        knows."""
        link, num_layers = self.peer.link, self.hand_over.num_layers
        assert link is not None
        self._begin(link)
        link.stored(self.request_id, len(fused.blocks) * num_layers, num_layers, start_ns)
        self._finish_if_all_sent(link)

    def abort(self) -> bool:
        """Returns whether the link still copies; then `Stopped` follows."""
        link = self.peer.link
        return link is not None and self.begun and not link.abort(self.request_id)

    def _begin(self, link: ProducerLink) -> None:
        if not self.begun:
            self.begun = True
            link.begin(self.request_id, self.request.prompt_keys(self.block_size))

    def _finish_if_all_sent(self, link: ProducerLink) -> None:
        if not self.finished and self.hand_over.all_sent:
            self.finished = True
            link.finish(self.request_id)

    # ---- the end

    def sum_launched(self, checksum: Checksum) -> None:
        """The step that completes the prompt is launched: read its pages right behind it. None of
        them changes any more, and a request with a step in flight is not preempted."""
        if self.hand_over.slots_known:
            self.checksum = self._begin_checksum(checksum, in_order=True)

    def _begin_checksum(self, checksum: Checksum, *, in_order: bool) -> PendingChecksum:
        first_block = self.hand_over.first_block
        assert first_block is not None
        blocks = self.request.block_table[first_block : self.hand_over.num_blocks]
        return checksum(blocks, in_order).begin()

    def commit(self, checksum: Checksum) -> Commit | None:
        """What completes the hand-over; None until token 1 is known and all bytes have left."""
        report = self.report
        if report is None or self.first_token is None or not self.hand_over.slots_known:
            return None
        if self.checksum is None:  # the slots came late: steps that follow do not delay it
            self.checksum = self._begin_checksum(checksum, in_order=False)
        return Commit(
            request_id=self.request_id,
            first_token=self.first_token,
            num_tokens=self.request.num_prompt_tokens,
            checksum=self.checksum.result(),
            num_bytes=report.num_bytes,
            num_pieces=report.num_pieces,
            start_ns=report.start_ns,
            busy_ns=report.busy_ns,
        )
