"""How far the hand-over of one prompt is: which blocks are written, and which a writer was given.

Between steps all layers are alike, so that two numbers tell it. Within a step one layer is written
after the other, and each completes the same blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Piece:
    """Prompt blocks `start .. stop` of some layers, to be written now."""

    layers: Sequence[int]
    start: int
    stop: int


class Progress:
    """What is ready before it is announced is given out once it is; nothing twice."""

    def __init__(self, num_layers: int, num_blocks: int) -> None:
        assert num_layers > 0 and num_blocks > 0
        self.num_blocks = num_blocks
        self.first_block: int | None = None  # None until the consumer announced
        self.dst_blocks: list[int] = []  # of prompt blocks first_block ..
        self.in_step = False
        self._layers = range(num_layers)
        self._ready = 0  # blocks that are written in every layer
        self._sent = 0  # blocks that were given out in every layer, or that the consumer has
        self._step_ready = 0  # blocks of a layer once this step has written it
        self._num_taken = 0  # of the step's layers, in the order of their writing

    def announce(self, first_block: int, dst_blocks: Sequence[int]) -> None:
        """The consumer reserved `dst_blocks`; it has the earlier ones."""
        assert self.first_block is None
        assert first_block + len(dst_blocks) == self.num_blocks
        self.first_block = first_block
        self.dst_blocks = list(dst_blocks)
        self._sent = max(self._sent, first_block)

    def rewind(self) -> None:
        """The producer lost the blocks (preemption): what was not given out will be written
        again."""
        assert not self.in_step
        self._ready = self._sent

    # ---- in a step

    def begin_step(self, num_ready: int) -> None:
        """The step completes blocks `.. num_ready`, layer by layer."""
        assert num_ready <= self.num_blocks
        self.in_step = True
        self._step_ready = max(self._ready, num_ready)
        self._num_taken = 0

    @property
    def blocks_a_layer(self) -> int:
        """How many blocks of a layer this step gives out, if they are announced in time."""
        return max(0, self._step_ready - self._sent)

    def num_due(self, num_written: int) -> int:
        """Pages that `take` would give out, of `num_written` layers."""
        if self.first_block is None:
            return 0
        return (num_written - self._num_taken) * self.blocks_a_layer

    def take(self, written: Sequence[int]) -> Piece | None:
        """What can go of the layers `written` by this step so far, in the order of all calls."""
        if not self.num_due(len(written)):
            return None
        layers = written[self._num_taken :]
        self._num_taken = len(written)
        return Piece(layers, self._sent, self._step_ready)

    def end_step(self, written: Sequence[int]) -> Piece | None:
        """As `take`; `written` are all layers."""
        piece = self.take(written)
        self.in_step = False
        self._ready = self._step_ready
        if self.first_block is not None:
            self._sent = max(self._sent, self._ready)
        return piece

    def abandon_step(self) -> None:
        """It never ended: what it gave out counts as not given."""
        self.in_step = False

    # ---- between steps

    def take_rest(self) -> Piece | None:
        """What is ready and was not given out."""
        assert not self.in_step
        if self.first_block is None or self._sent >= self._ready:
            return None
        piece = Piece(self._layers, self._sent, self._ready)
        self._sent = self._ready
        return piece

    def destinations(self, start: int, stop: int) -> list[int]:
        """The consumer's blocks for prompt blocks `start .. stop`."""
        assert self.first_block is not None and start >= self.first_block
        return self.dst_blocks[start - self.first_block : stop - self.first_block]

    @property
    def all_ready(self) -> bool:
        """Every page is written, as of the last step's end."""
        return self._ready == self.num_blocks

    @property
    def all_sent(self) -> bool:
        """Every page was given out, as of the last step's end, or is not needed."""
        return self.first_block is not None and self._sent == self.num_blocks
