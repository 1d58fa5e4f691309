"""Pages by way of one piece of device memory: what a library sends and receives in one go."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import msgspec
import numpy as np

from pdrelay.integrations.vllm.page_grid import page_grid
from pdrelay.integrations.vllm.page_layout import PageLayout
from pdrelay.transport.device import BlockPairs, Copy, Device, Event, PageMove, PagePool, Run
from pdrelay.transport.nccl_wire import STAGING_BYTES, Natural


class Part(msgspec.Struct, frozen=True, array_like=True):
    """One layer of `blocks`."""

    layer: Natural
    blocks: list[Natural]


def staging_bytes(layout: PageLayout) -> int:
    """As much as is sent in one go. Both ends' layouts have the same blocks, and so the same."""
    return max(STAGING_BYTES, *(layer.block_bytes for layer in layout.layers))


class Staging:
    """Staging memory beside the pages at `addresses`, one a region of `layout`, and a stream.

    In it the parts follow each other, in a part its planes, in a plane its blocks. For the thread
    that makes it, with a device of its own. Raises TransportError without memory.
    """

    def __init__(
        self, layout: PageLayout, addresses: Sequence[int], make_device: Callable[[], Device]
    ) -> None:
        self._layout = layout
        self._addresses = addresses
        self._grid = page_grid(layout, addresses)
        with contextlib.ExitStack() as stack:
            self._device = device = make_device()
            stack.callback(device.close)
            device.make_current()
            self.stream = device.stream()
            stack.callback(self.stream.close)
            self.address = device.allocate(staging_bytes(layout))
            stack.callback(device.free, self.address)
            if self._grid is not None:
                device.prepare_page_copies(self._grid.pool)
            self._stack = stack.pop_all()

    def num_bytes(self, parts: Sequence[Part]) -> int:
        layers = self._layout.layers
        return sum(len(part.blocks) * layers[part.layer].block_bytes for part in parts)

    def gather(self, parts: Sequence[Part], after: Event | None) -> Copy:
        """From pages to staging memory, behind `after`."""
        return self._copy(parts, after, gather=True)

    def scatter(self, parts: Sequence[Part]) -> Copy:
        """From staging memory to pages."""
        return self._copy(parts, None, gather=False)

    def close(self) -> None:
        """Nothing launched may still touch the memory."""
        self._stack.close()

    def _copy(self, parts: Sequence[Part], after: Event | None, *, gather: bool) -> Copy:
        if self._grid is None:
            return self._device.copy(self._runs(parts, gather=gather), after)
        pages = np.concatenate(
            [self._grid.pages(part.layer, np.array(part.blocks, np.int32)) for part in parts]
        )
        staged = np.arange(len(pages), dtype=np.int32)
        pool = PagePool(self._grid.pool.layout.one_layer(len(pages)), self.address)
        if gather:
            move = PageMove(0, BlockPairs(pages, staged))
            return self._device.copy_pages(self._grid.pool, pool, [move], after)
        move = PageMove(0, BlockPairs(staged, pages))
        return self._device.copy_pages(pool, self._grid.pool, [move], after)

    def _runs(self, parts: Sequence[Part], *, gather: bool) -> list[Run]:
        runs, at = [], self.address
        for page, num_bytes in self._pieces(parts):
            runs.append(Run(at, page, num_bytes) if gather else Run(page, at, num_bytes))
            at += num_bytes
        return runs

    def _pieces(self, parts: Sequence[Part]) -> Iterator[tuple[int, int]]:
        """Address and bytes of every page, in the order of the staging memory."""
        for part in parts:
            layer = self._layout.layers[part.layer]
            base = self._addresses[layer.region]
            for plane in layer.planes:
                for block in part.blocks:
                    yield base + plane.offset + block * plane.block_stride, plane.num_bytes
