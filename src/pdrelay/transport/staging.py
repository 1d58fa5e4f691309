"""Pages of a device through pinned host memory, for transports that move bytes of the host.

Used from a transport's own threads, which may wait for the device. The buffers are small and used
over again: a whole mirror of a GPU's pool would be most of the host's memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from pdrelay.core.kv_layout import contiguous_runs
from pdrelay.transport.device import Copy, DevicePages, Event, PinnedMemory, Run, page_runs
from pdrelay.transport.pages import SharedPages

BUFFER_BYTES = 4 << 20  # a copy of this size runs at the link's rate (80 µs over PCIe 5)


class Part(Protocol):
    """Some blocks of one layer: where their bytes are to be put, or lie."""

    views: list[memoryview]  # in block order

    def finish(self) -> None:
        """The views are filled: bring them to the pages."""


class PageAccess(Protocol):
    """Reads and writes pages in parts. One thread at a time; a part is void with the next one."""

    def read(self, layer: int, blocks: Sequence[int], after: Event | None) -> Iterator[Part]:
        """Parts that hold the pages, behind `after`."""

    def write(self, layer: int, blocks: Sequence[int]) -> Iterator[Part]:
        """Parts to fill."""

    def close(self) -> None: ...


class _InPlace:
    def __init__(self, views: list[memoryview]) -> None:
        self.views = views

    def finish(self) -> None:
        pass


class HostAccess:
    """The pages themselves, without a copy: one part, one view a run of consecutive blocks."""

    def __init__(self, pages: SharedPages) -> None:
        self._layout = pages.layout
        self._bytes = memoryview(pages.buffer)

    def _of(self, layer: int, blocks: Sequence[int]) -> Iterator[Part]:
        views: list[memoryview] = []
        for block, _, length in contiguous_runs(blocks, blocks):
            start = self._layout.offset(layer, block)
            views.append(self._bytes[start : start + length * self._layout.layer_block_bytes])
        yield _InPlace(views)

    def read(self, layer: int, blocks: Sequence[int], after: Event | None) -> Iterator[Part]:
        return self._of(layer, blocks)

    def write(self, layer: int, blocks: Sequence[int]) -> Iterator[Part]:
        return self._of(layer, blocks)

    def close(self) -> None:
        self._bytes.release()


class _Staged:
    """Blocks in one half of the buffer. `copy` brings them there, or is made by `finish`."""

    def __init__(self, access: StagedAccess, half: int, layer: int, blocks: Sequence[int]) -> None:
        self._access = access
        self._layer = layer
        self._blocks = blocks
        self._half = half
        self.copy: Copy | None = None
        size = len(blocks) * access.layout.layer_block_bytes
        self.array = access.half(half)[:size]
        self.views = [self.array.data]

    def runs(self, *, to_host: bool) -> list[Run]:
        layout, pages = self._access.layout, self._access.pages
        count = len(self._blocks)
        host = self._access.address(self._half)
        runs = page_runs(
            layout, pages.address, self._access.flat, host, 0, self._blocks, range(count)
        )
        offset = layout.offset(self._layer, 0)
        if to_host:
            return [Run(run.dst, run.src + offset, run.num_bytes) for run in runs]
        return [Run(run.src + offset, run.dst, run.num_bytes) for run in runs]

    def finish(self) -> None:
        copy = self._access.pages.device.copy(self.runs(to_host=False), None)
        copy.wait()


class StagedAccess:
    """Pages of a device through a pinned buffer of two halves: one is copied while the other is
    sent."""

    def __init__(self, pages: DevicePages, buffer_bytes: int = BUFFER_BYTES) -> None:
        self.pages = pages
        self.layout = pages.layout
        self.blocks_a_part = max(1, buffer_bytes // self.layout.layer_block_bytes)
        self._half_bytes = self.blocks_a_part * self.layout.layer_block_bytes
        # One layer of `blocks_a_part` blocks, one after the other.
        self.flat = self.layout.one_layer(self.blocks_a_part)
        self._buffer: PinnedMemory | None = None

    def _pinned(self) -> PinnedMemory:
        if self._buffer is None:
            self._buffer = self.pages.device.pinned(2 * self._half_bytes)
        return self._buffer

    def half(self, index: int) -> npt.NDArray[np.uint8]:
        return self._pinned().array[index * self._half_bytes : (index + 1) * self._half_bytes]

    def address(self, index: int) -> int:
        return self._pinned().address + index * self._half_bytes

    def _parts(self, layer: int, blocks: Sequence[int]) -> Iterator[_Staged]:
        for number, start in enumerate(range(0, len(blocks), self.blocks_a_part)):
            yield _Staged(self, number % 2, layer, blocks[start : start + self.blocks_a_part])

    def read(self, layer: int, blocks: Sequence[int], after: Event | None) -> Iterator[Part]:
        current: _Staged | None = None
        for part in self._parts(layer, blocks):
            part.copy = self.pages.device.copy(part.runs(to_host=True), after)
            if current is not None:
                yield self._arrived(current)
            current = part
        if current is not None:
            yield self._arrived(current)

    @staticmethod
    def _arrived(part: _Staged) -> Part:
        assert part.copy is not None
        part.copy.wait()
        return part

    def write(self, layer: int, blocks: Sequence[int]) -> Iterator[Part]:
        return self._parts(layer, blocks)

    def close(self) -> None:
        if self._buffer is not None:
            self._buffer.close()
            self._buffer = None


def page_access(pages: SharedPages | DevicePages) -> PageAccess:
    return HostAccess(pages) if isinstance(pages, SharedPages) else StagedAccess(pages)
