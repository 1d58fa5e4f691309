"""Pages for tests: copies land when the test says so, and read their source only then."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from pdrelay.errors import TransportError
from pdrelay.integrations.vllm.page_layout import LayerLayout, PageLayout, Plane
from pdrelay.integrations.vllm.pages import Move, StandingOffer

PAGE_BYTES = 8


def fake_layout(num_layers: int, num_blocks: int, block_size: int) -> PageLayout:
    """One plane of PAGE_BYTES a layer and block, layers one after the other."""
    layers = tuple(
        LayerLayout(
            f"layers.{i}", 0, "fake", (Plane(i * num_blocks * PAGE_BYTES, PAGE_BYTES, PAGE_BYTES),)
        )
        for i in range(num_layers)
    )
    return PageLayout(num_blocks, block_size, (num_layers * num_blocks * PAGE_BYTES,), layers)


@dataclass
class FakeWorld:
    """The memory that all fake pages of a test share, and the device that copies in it."""

    pages: dict[bytes, FakePages] = field(default_factory=dict)
    queue: list[Copy] = field(default_factory=list)
    num_landed: int = 0
    eager: bool = True  # copies land when they are written

    def land(self, count: int | None = None) -> None:
        """Let `count` copies land (all, if None)."""
        stop = len(self.queue) if count is None else min(count, len(self.queue))
        for copy in self.queue[:stop]:
            copy.run()
        del self.queue[:stop]
        self.num_landed += stop


@dataclass(frozen=True)
class Copy:
    source: FakePages
    target: FakePages
    layer: int
    src_blocks: list[int]
    dst_blocks: list[int]

    def run(self) -> None:
        for src, dst in zip(self.src_blocks, self.dst_blocks, strict=True):
            assert dst not in self.target.forbidden, f"block {dst} was stored into after its end"
            self.target.array[self.layer, dst] = self.source.array[self.layer, src]


class FakePages:
    """`array`: `[num_layers, num_blocks]` int64, one value a page. `forbidden`: blocks that the
    owner has taken back, into which nothing may be stored."""

    transport = "fake"
    batch_bytes = 0

    def __init__(self, world: FakeWorld, layout: PageLayout) -> None:
        self.layout = layout
        self.array: npt.NDArray[np.int64] = np.zeros(
            (len(layout.layers), layout.num_blocks), np.int64
        )
        self.forbidden: set[int] = set()
        self.broken = False  # stores raise TransportError
        self._world = world
        self._handle = str(len(world.pages)).encode()
        world.pages[self._handle] = self

    def offer(self) -> StandingOffer:
        return StandingOffer([self._handle])

    def open(self, layout: PageLayout, handles: list[bytes], fds: Sequence[int]) -> FakeWriter:
        target = self._world.pages.get(handles[0]) if handles else None
        if target is None:
            raise TransportError("no such fake pages")
        return FakeWriter(self._world, self, target)

    def kv_written(self) -> None:
        return

    def before_overwrite(self) -> None:
        self._world.land()

    def close(self) -> None:
        return


class FakeWriter:
    def __init__(self, world: FakeWorld, source: FakePages, target: FakePages) -> None:
        self._world, self._source, self._target = world, source, target
        self.closed = False

    def write(self, moves: Sequence[Move]) -> int:
        assert not self.closed
        if self._target.broken:
            raise TransportError("the fake pages are broken")
        for move in moves:
            src, dst = list(move.src_blocks), list(move.dst_blocks)
            self._world.queue.append(Copy(self._source, self._target, move.layer, src, dst))
        if self._world.eager:
            self._world.land()
        return len(moves)

    def fence(self) -> FakeFence:
        return FakeFence(self._world, self._world.num_landed + len(self._world.queue))

    def close(self) -> None:
        self.closed = True


@dataclass(frozen=True)
class FakeFence:
    world: FakeWorld
    position: int

    def done(self) -> bool:
        return self.world.num_landed >= self.position

    def wait(self) -> None:
        self.world.land()
