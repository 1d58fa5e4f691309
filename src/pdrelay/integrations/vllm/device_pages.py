"""KV pages on an accelerator: the producer opens the consumer's memory and copies on a side stream.

The copies of a layer wait on the device for the kernels that wrote it, so that neither the engine's
thread nor its stream waits for them. Where the device can, one kernel copies all that is due.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
import numpy.typing as npt

from pdrelay.core.kv_layout import contiguous_runs
from pdrelay.errors import TransportError
from pdrelay.integrations.vllm.page_grid import page_grid
from pdrelay.integrations.vllm.page_layout import LayerLayout, PageLayout
from pdrelay.integrations.vllm.pages import Fence, Move, PassedFence, StandingOffer, alike
from pdrelay.transport.device import BlockPairs, Copy, Device, Event, PageMove, Run

Blocks = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Region:
    """One region of the layout: at `address`, which is `offset` into an allocation of
    `allocation_bytes` that `handle` names."""

    address: int
    handle: bytes
    allocation_bytes: int
    offset: int


class SharedRegion(msgspec.Struct, frozen=True):
    """A Region as a consumer tells it."""

    handle: bytes
    allocation_bytes: int
    offset: int


class DeviceKVPages:
    """`bind_thread` makes the device current on the calling thread, `on_compute_stream` tells the
    device which stream the engine launches on now; neither does anything on a fake."""

    transport = "cuda_ipc"
    # 65 µs of NVLink, by which the last submission may end later. One costs the engine's thread far
    # more than its share of that where the host, which launches kernels, bounds a short prefill.
    # Less than what a copy takes a whole idle device for (`CudaDevice`): more kernels come behind.
    batch_bytes = 24 << 20

    def __init__(
        self,
        layout: PageLayout,
        device: Device,
        regions: Sequence[Region],
        *,
        bind_thread: Callable[[], None] = lambda: None,
        on_compute_stream: Callable[[], None] = lambda: None,
    ) -> None:
        self.layout = layout
        self.device = device
        self.addresses = [region.address for region in regions]
        self.grid = page_grid(layout, self.addresses)
        if self.grid is not None:
            device.prepare_page_copies(self.grid.pool)
        self.bind_thread = bind_thread
        self._regions = regions
        self._on_compute_stream = on_compute_stream
        self.written: Event | None = None  # behind the KV that may be read
        self.last_copy: Copy | None = None  # the side stream is in order: behind all others

    def offer(self) -> StandingOffer:
        shared = [
            SharedRegion(region.handle, region.allocation_bytes, region.offset)
            for region in self._regions
        ]
        return StandingOffer([msgspec.msgpack.encode(region) for region in shared])

    def open(self, layout: PageLayout, handles: list[bytes], fds: Sequence[int]) -> DeviceWriter:
        if fds:
            raise TransportError("device memory needs no file descriptors")
        try:
            regions = [msgspec.msgpack.decode(handle, type=SharedRegion) for handle in handles]
        except msgspec.MsgspecError as error:
            raise TransportError(f"the consumer's memory handles are damaged: {error}") from error
        self.bind_thread()
        return DeviceWriter(self, layout, regions)

    def kv_written(self) -> None:
        self._on_compute_stream()
        self.written = self.device.launched()

    def before_overwrite(self) -> None:
        """Rare (a preempted or aborted prefill), and at most as long as the copies in flight."""
        if self.last_copy is not None and not self.last_copy.done():
            self.last_copy.wait()

    def close(self) -> None:
        self.device.close()


class DeviceWriter:
    def __init__(
        self, pages: DeviceKVPages, layout: PageLayout, regions: Sequence[SharedRegion]
    ) -> None:
        """Raises TransportError."""
        self._pages = pages
        self._target = layout
        self._mapped: dict[bytes, int] = {}  # a handle may name several regions
        self._last_copy: Copy | None = None
        self._last_move: Move | None = None
        self._last_sorted: tuple[Blocks, Blocks] = (np.empty(0, np.int32), np.empty(0, np.int32))
        if len(regions) != len(layout.region_bytes):
            raise TransportError("one memory handle a region is due")
        for region, num_bytes in zip(regions, layout.region_bytes, strict=True):
            if region.offset < 0 or region.offset + num_bytes > region.allocation_bytes:
                raise TransportError("a region lies outside its allocation")
        try:
            self._addresses = [self._map(region) + region.offset for region in regions]
        except TransportError:
            self.close()
            raise
        self._grid = page_grid(layout, self._addresses)

    def _map(self, region: SharedRegion) -> int:
        address = self._mapped.get(region.handle)
        if address is None:
            address = self._pages.device.open_peer(region.handle, region.allocation_bytes)
            self._mapped[region.handle] = address
        return address

    def write(self, moves: Sequence[Move]) -> int:
        num_pieces = 0
        if moves:
            self._pages.bind_thread()
            self._last_copy, num_pieces = self._copy_pages(moves) or self._copy_runs(moves)
            self._pages.last_copy = self._last_copy
        return num_pieces

    def _copy_pages(self, moves: Sequence[Move]) -> tuple[Copy, int] | None:
        """All as pages, where both sides' lie in a grid."""
        mine, theirs, pages = self._pages.grid, self._grid, self._pages
        if mine is None or theirs is None:
            return None
        src, dst = [], []
        for layers, move in alike(moves):
            src_blocks, dst_blocks = self._sorted(move)
            which = _as_slice(layers)
            src.append(mine.pages(which, src_blocks))
            dst.append(theirs.pages(which, dst_blocks))
        pairs = BlockPairs(_joined(src), _joined(dst))
        move_all = [PageMove(0, pairs)]
        copy = pages.device.copy_pages(mine.pool, theirs.pool, move_all, pages.written)
        return copy, pairs.num_runs

    def _copy_runs(self, moves: Sequence[Move]) -> tuple[Copy, int]:
        pages = self._pages
        runs: list[Run] = []
        for layers, move in alike(moves):
            src_blocks, dst_blocks = self._sorted(move)
            block_runs = list(contiguous_runs(src_blocks.tolist(), dst_blocks.tolist()))
            for layer in layers:
                source, target = pages.layout.layers[layer], self._target.layers[layer]
                source_at, target_at = (
                    pages.addresses[source.region],
                    self._addresses[target.region],
                )
                runs += layer_runs(source, source_at, target, target_at, block_runs)
        return pages.device.copy(runs, pages.written), len(runs)

    def _sorted(self, move: Move) -> tuple[Blocks, Blocks]:
        """The move's blocks in the order of the source's: vLLM hands out freed blocks backwards,
        and where both sides do, they are one run. Found once for the layers of a chunk."""
        if not move.same_chunk(self._last_move):
            self._last_move = move
            src = np.array(move.src_blocks, np.int32)
            order = np.argsort(src)
            self._last_sorted = (src[order], np.array(move.dst_blocks, np.int32)[order])
        return self._last_sorted

    def fence(self) -> Fence:
        return self._last_copy or PassedFence()

    def close(self) -> None:
        if self._mapped:
            self._pages.bind_thread()
        for address in self._mapped.values():
            self._pages.device.close_peer(address)
        self._mapped.clear()


def _as_slice(layers: list[int]) -> slice | list[int]:
    """What arrays are indexed with faster, where layers follow each other."""
    first, stop = layers[0], layers[0] + len(layers)
    return slice(first, stop) if layers == list(range(first, stop)) else layers


def _joined(parts: list[Blocks]) -> Blocks:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def layer_runs(
    source: LayerLayout,
    source_at: int,
    target: LayerLayout,
    target_at: int,
    block_runs: Sequence[tuple[int, int, int]],
) -> list[Run]:
    """One layer of blocks in as few contiguous copies as there are. `*_at`: region addresses,
    `block_runs`: what `contiguous_runs` finds.

    Consecutive blocks make one copy only where a plane's blocks touch on both sides.
    """
    runs = []
    for a, b in zip(source.planes, target.planes, strict=True):
        size = a.num_bytes
        touching = a.block_stride == b.block_stride == size
        for src, dst, n in block_runs:
            from_, to = source_at + a.offset, target_at + b.offset
            if touching:
                runs.append(Run(to + dst * size, from_ + src * size, n * size))
                continue
            runs.extend(
                Run(to + (dst + i) * b.block_stride, from_ + (src + i) * a.block_stride, size)
                for i in range(n)
            )
    return runs
