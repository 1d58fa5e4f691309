"""The producer's bookkeeping of one hand-over: which pages are ready, sent, and still to send."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Piece:
    """Request blocks `start .. stop` of one layer, ready to be sent."""

    layer: int
    start: int
    stop: int


class HandOver:
    """Pages of one request on their way out, in block order within each layer.

    Prefill never waits for the link or for slots: what is ready before them is sent once they are.
    """

    def __init__(self, num_layers: int, num_blocks: int, *, needs_slots: bool) -> None:
        assert num_layers > 0 and num_blocks > 0
        self.num_blocks = num_blocks
        self.first_block: int | None = None  # None until the consumer reserved
        self.dst_blocks: list[int] = []  # of request blocks first_block ..
        self._needs_slots = needs_slots
        self._link_ready = False
        self._ready = [0] * num_layers
        self._sent = [0] * num_layers

    @property
    def slots_known(self) -> bool:
        return self.first_block is not None

    def set_slots(self, first_block: int, dst_blocks: Sequence[int]) -> list[Piece]:
        """The consumer reserved `dst_blocks`; it has the earlier ones. Returns what can go now."""
        assert not self.slots_known
        assert first_block + len(dst_blocks) == self.num_blocks
        self.first_block = first_block
        self.dst_blocks = list(dst_blocks)
        if self._needs_slots:
            self._sent = [max(sent, first_block) for sent in self._sent]
        return self._take_all()

    def link_ready(self) -> list[Piece]:
        """The link to the consumer stands. Returns what can go now."""
        self._link_ready = True
        return self._take_all()

    def mark_ready(self, layer: int, num_blocks: int) -> list[Piece]:
        """Blocks `.. num_blocks` of `layer` are written. Returns what can go now."""
        assert num_blocks <= self.num_blocks
        self._ready[layer] = max(self._ready[layer], num_blocks)
        return self._take(layer)

    def _take_all(self) -> list[Piece]:
        return [piece for layer in range(len(self._ready)) for piece in self._take(layer)]

    def _take(self, layer: int) -> list[Piece]:
        if not self._link_ready or (self._needs_slots and not self.slots_known):
            return []
        start, stop = self._sent[layer], self._ready[layer]
        if start >= stop:
            return []
        self._sent[layer] = stop
        return [Piece(layer, start, stop)]

    def forget_unsent(self) -> None:
        """The source pages are gone (preemption): what was ready and not sent must be marked anew."""
        self._ready = [min(ready, sent) for ready, sent in zip(self._ready, self._sent, strict=True)]

    @property
    def all_ready(self) -> bool:
        """Every page was written."""
        return all(ready == self.num_blocks for ready in self._ready)

    @property
    def all_sent(self) -> bool:
        """Every page was given to the transport."""
        return all(sent == self.num_blocks for sent in self._sent)

    def destinations(self, piece: Piece) -> list[int]:
        """The consumer's blocks for `piece`; empty where the transport needs none."""
        if not self._needs_slots:
            return []
        assert self.first_block is not None and piece.start >= self.first_block
        return self.dst_blocks[piece.start - self.first_block : piece.stop - self.first_block]
