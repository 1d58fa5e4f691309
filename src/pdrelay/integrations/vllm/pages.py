"""The seam between the hand-over's protocol and the memory that it moves.

The engine computes into its own pages and, on a GPU, ahead of the host: what `kv_written` marks
is complete for a writer even though the device may still be working on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import msgspec

from pdrelay.integrations.vllm.page_layout import PageLayout


class Fence(Protocol):
    """A point in a writer's work."""

    def done(self) -> bool:
        """Whether everything written before it has landed. Never blocks. Raises TransportError
        when it never will; then nothing is stored any more."""

    def wait(self) -> None:
        """Block until `done` would not say False, without holding the interpreter's lock."""


class Move(msgspec.Struct, frozen=True):
    """One layer of blocks, from the producer's to the consumer's. Moves of a chunk share their
    lists, which nobody changes."""

    layer: int
    src_blocks: Sequence[int]
    dst_blocks: Sequence[int]

    def same_chunk(self, other: Move | None) -> bool:
        """Whether the two share their lists."""
        return (
            other is not None
            and self.src_blocks is other.src_blocks
            and self.dst_blocks is other.dst_blocks
        )


def alike(moves: Sequence[Move]) -> list[tuple[list[int], Move]]:
    """Layers whose moves are the same but for them, of neighbours, and one such move."""
    groups: list[tuple[list[int], Move]] = []
    layers: list[int] = []
    last: Move | None = None
    for move in moves:
        if not move.same_chunk(last):
            layers, last = [], move
            groups.append((layers, move))
        layers.append(move.layer)
    return groups


class PageWriter(Protocol):
    """A producer's way into one consumer's pages. Used under the producer's lock."""

    def write(self, moves: Sequence[Move]) -> int:
        """Copy what was written before the last `kv_written`, as one submission where that is
        possible; returns the contiguous pieces. The moves may be of several prompts.

        Raises TransportError when the consumer's pages cannot be reached any more.
        """

    def fence(self) -> Fence: ...

    def close(self) -> None:
        """Let go of the consumer's pages. All fences are done by then."""


class Offer(Protocol):
    """A consumer's pages, as one producer may reach them."""

    @property
    def handles(self) -> list[bytes]: ...

    @property
    def fds(self) -> tuple[int, ...]: ...

    def passed_on(self) -> None:
        """The file descriptors have been sent to the producer."""

    def close(self) -> None:
        """The producer has ended: when this returns, nothing more is stored by way of this offer.
        Idempotent."""


@dataclass(frozen=True)
class StandingOffer:
    """Handles and descriptors that hold as long as the pages do. What a producer stores by them
    ends with it."""

    handles: list[bytes]
    fds: tuple[int, ...] = ()

    def passed_on(self) -> None:
        return

    def close(self) -> None:
        return


class Pages(Protocol):
    """One rank's registered KV cache."""

    transport: str
    layout: PageLayout
    batch_bytes: int  # what makes a submission within a step worth its cost; 0: every layer

    def offer(self) -> Offer:
        """What one producer's `open` needs. Raises TransportError."""

    def open(self, layout: PageLayout, handles: list[bytes], fds: Sequence[int]) -> PageWriter:
        """Reach a consumer's pages. Takes over `fds`. Raises TransportError."""

    def kv_written(self) -> None:
        """Engine's thread: all KV it has issued so far may be read by later writes."""

    def before_overwrite(self) -> None:
        """Engine's thread: what it issues from now on may overwrite pages that were written from;
        order it behind the copies in flight."""

    def close(self) -> None: ...


class PassedFence:
    """The fence of a writer whose copies are complete when `write` returns."""

    def done(self) -> bool:
        return True

    def wait(self) -> None:
        return
