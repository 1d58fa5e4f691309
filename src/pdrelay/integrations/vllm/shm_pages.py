"""KV pages in shared memory: the producer maps the consumer's and copies into them."""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from pdrelay.core.kv_layout import contiguous_runs
from pdrelay.errors import TransportError
from pdrelay.integrations.vllm.page_layout import PageLayout, Plane
from pdrelay.integrations.vllm.pages import Move, PassedFence, StandingOffer

Bytes = npt.NDArray[np.uint8]


def plane_view(region: Bytes, plane: Plane, num_blocks: int) -> Bytes:
    """`[num_blocks, num_bytes]` over one plane of `region`, flat bytes."""
    shape, strides = (num_blocks, plane.num_bytes), (plane.block_stride, 1)
    return np.ndarray(shape, np.uint8, region.data, plane.offset, strides)


def layer_views(layout: PageLayout, regions: Sequence[Bytes]) -> list[list[Bytes]]:
    """Per layer, per plane: `[num_blocks, num_bytes]`."""
    return [
        [plane_view(regions[layer.region], plane, layout.num_blocks) for plane in layer.planes]
        for layer in layout.layers
    ]


class SharedMemoryPages:
    """Pages of a rank on CPU. `regions[i]` are the bytes of region i; on a consumer `fd` holds all
    of them one after the other, each at a multiple of the page size (`region_starts`)."""

    transport = "shm"
    batch_bytes = 0

    def __init__(
        self,
        layout: PageLayout,
        regions: Sequence[Bytes],
        *,
        fd: int | None = None,
        region_starts: Sequence[int] = (),
    ) -> None:
        self.layout = layout
        self._views = layer_views(layout, regions)
        self._fd = fd
        self._region_starts = region_starts

    def offer(self) -> StandingOffer:
        assert self._fd is not None, "only a consumer's pages are shared"
        handles = [str(start).encode() for start in self._region_starts]
        return StandingOffer(handles, (self._fd,))

    def open(
        self, layout: PageLayout, handles: list[bytes], fds: Sequence[int]
    ) -> SharedMemoryWriter:
        try:
            starts = [int(handle) for handle in handles]
            return SharedMemoryWriter(self._views, layout, starts, fds)
        except (ValueError, OSError) as error:
            raise TransportError(f"the consumer's memory cannot be mapped: {error}") from error
        finally:
            for fd in fds:
                os.close(fd)

    def kv_written(self) -> None:
        """Nothing to do: the CPU has written it."""

    def before_overwrite(self) -> None:
        """Nothing to do: `write` copies before it returns."""

    def close(self) -> None:
        self._views = []
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


class SharedMemoryWriter:
    """A mapping of one consumer's pages. numpy gives up the interpreter's lock while it copies."""

    def __init__(
        self,
        sources: list[list[Bytes]],
        layout: PageLayout,
        starts: Sequence[int],
        fds: Sequence[int],
    ) -> None:
        """Map the one descriptor in `fds`. Raises OSError, ValueError."""
        if len(fds) != 1 or len(starts) != len(layout.region_bytes):
            raise ValueError("one file descriptor and one start a region are due")
        size = os.fstat(fds[0]).st_size
        for start, num_bytes in zip(starts, layout.region_bytes, strict=True):
            if start < 0 or start + num_bytes > size:
                raise ValueError(f"a region of {num_bytes} bytes lies outside {size}")
        flags = mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)
        self._map = mmap.mmap(fds[0], size, flags=flags)
        flat = np.frombuffer(self._map, dtype=np.uint8)
        regions = [
            flat[start : start + num_bytes]
            for start, num_bytes in zip(starts, layout.region_bytes, strict=True)
        ]
        self._sources = sources
        self._targets = layer_views(layout, regions)

    def write(self, moves: Sequence[Move]) -> int:
        pieces = 0
        for move in moves:
            runs = list(contiguous_runs(move.src_blocks, move.dst_blocks))
            views = zip(self._sources[move.layer], self._targets[move.layer], strict=True)
            for source, target in views:
                for a, b, n in runs:
                    target[b : b + n] = source[a : a + n]
                pieces += len(runs)
        return pieces

    def fence(self) -> PassedFence:
        return PassedFence()

    def close(self) -> None:
        """Drop the views; the mapping goes with the last of them."""
        self._targets = []
        del self._map
