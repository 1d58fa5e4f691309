"""The producer's bookkeeping of one hand-over: which pages are ready, sent, and still to send.

A (layer, block) leaves by exactly one of two ways. The step's own kernels may store it into the
consumer's pages (*fused*: `fuse` before the step is launched, `stored` when it is complete), all
layers of a block alike; everything else is *sent* as `Piece`s by the transport.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Piece:
    """Request blocks `start .. stop` of one layer, ready to be sent."""

    layer: int
    start: int
    stop: int


@dataclass(frozen=True)
class Fused:
    """Tokens `start .. stop` are stored by a step's kernels; that completes `blocks`."""

    start: int
    stop: int
    blocks: range


class HandOver:
    """Pages of one request on their way out, in block order within each layer.

    Prefill never waits for the link or for slots: what is ready before them is sent once they are.
    """

    def __init__(self, num_layers: int, num_blocks: int, *, needs_slots: bool) -> None:
        assert num_layers > 0 and num_blocks > 0
        self.num_layers = num_layers
        self.num_blocks = num_blocks
        self.first_block: int | None = None  # None until the consumer reserved
        self.dst_blocks: list[int] = []  # of request blocks first_block ..
        self._needs_slots = needs_slots
        self._link_ready = False
        self._ready = [0] * num_layers
        self._sent = [0] * num_layers  # or passed over, as fused
        self._fused = [False] * num_blocks
        self._fused_stop = 0  # the token behind the last fused one
        self._num_storing = 0  # calls of `fuse` whose step is not complete

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

    def rewind(self) -> None:
        """The producer lost the request's blocks (preemption): what was not sent will be computed,
        and marked ready, again."""
        self._ready = list(self._sent)

    # ---- fused stores

    def fuse(self, start: int, stop: int, num_tokens: int, block_size: int) -> Fused | None:
        """A step is about to write tokens `start .. stop` of a prompt of `num_tokens`: which of
        them its kernels store for the consumer too. None: none.

        A block is fused if all its tokens are: one that an earlier step began is gone on with only
        where that step fused it, and one begun here that no later step completes is sent whole.
        The prompt's last block, unless full, is always sent, so that pages are equal to the end.
        """
        if not self._link_ready or self.first_block is None:
            return None
        first = max(self.first_block, *self._sent) * block_size
        start = max(start, first)
        stop = min(stop, num_tokens // block_size * block_size)
        if start % block_size and start != self._fused_stop:
            start += block_size - start % block_size
        # Behind a preemption: blocks that were stored before stay stored.
        while start < stop and self._fused[start // block_size]:
            start += block_size - start % block_size
        if start >= stop:
            return None
        blocks = range(start // block_size, stop // block_size)
        for block in blocks:
            self._fused[block] = True
        self._fused_stop = stop
        self._num_storing += 1
        return Fused(start, stop, blocks)

    def stored(self) -> None:
        """The step of one `fuse` is complete."""
        assert self._num_storing > 0
        self._num_storing -= 1

    @property
    def storing(self) -> bool:
        """Whether the step of some `fuse` is not complete."""
        return self._num_storing > 0

    def slots(self, fused: Fused, block_size: int) -> npt.NDArray[np.int64]:
        """The consumer's slots for the fused tokens: int64 [stop - start]."""
        assert self.first_block is not None
        tokens = np.arange(fused.start, fused.stop, dtype=np.int64)
        blocks = np.asarray(self.dst_blocks, dtype=np.int64)
        return blocks[tokens // block_size - self.first_block] * block_size + tokens % block_size

    # ---- pieces

    def _take_all(self) -> list[Piece]:
        return [piece for layer in range(len(self._ready)) for piece in self._take(layer)]

    def _take(self, layer: int) -> list[Piece]:
        if not self._link_ready or (self._needs_slots and not self.slots_known):
            return []
        block, stop = self._sent[layer], self._ready[layer]
        pieces = []
        while block < stop:
            start = block
            while block < stop and not self._fused[block]:
                block += 1
            if start < block:
                pieces.append(Piece(layer, start, block))
            while block < stop and self._fused[block]:
                block += 1
        self._sent[layer] = max(self._sent[layer], stop)
        return pieces

    @property
    def all_ready(self) -> bool:
        """Every page was written."""
        return all(ready == self.num_blocks for ready in self._ready)

    @property
    def all_sent(self) -> bool:
        """Every page was given to the transport or is stored."""
        return not self.storing and all(sent == self.num_blocks for sent in self._sent)

    def destinations(self, piece: Piece) -> list[int]:
        """The consumer's blocks for `piece`; empty where the transport needs none."""
        if not self._needs_slots:
            return []
        assert self.first_block is not None and piece.start >= self.first_block
        return self.dst_blocks[piece.start - self.first_block : piece.stop - self.first_block]
