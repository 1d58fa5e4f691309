"""What a checksum reads of pages on a device, with few launches and one small copy to the host.

The same numbers as `transport/checksum.py` takes from host pages, so that either end of a transfer
may be anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd

import numpy as np
import torch

from pdrelay.core.kv_layout import KVLayout
from pdrelay.transport.checksum import U64, page_weights

_WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}


class PageSums:
    """Over `pool`, a contiguous tensor shaped `layout.shape`, on any device. For one thread, on its
    current stream."""

    def __init__(self, pool: torch.Tensor, layout: KVLayout) -> None:
        self._device = pool.device
        self._size = gcd(layout.layer_block_bytes // 2, 8)
        words = pool.view(-1).view(_WORDS[self._size])
        self._words = words.view(layout.num_layers, layout.num_blocks, -1)
        width = self._words.shape[2]
        half = width // 2
        # First and last word of K and of V: [num_layers, 2, 2, num_blocks].
        self._ends = words.as_strided(
            (layout.num_layers, 2, 2, layout.num_blocks),
            (layout.num_blocks * width, half, half - 1, width),
        )
        self._weights: torch.Tensor | None = None

    def sampled(self, blocks: Sequence[int]) -> DeviceWords:
        """Four words a (layer, block): `[num_layers, 4, len(blocks)]`, flat."""
        return self._to_host(self._ends.index_select(3, self._uploaded(blocks)), self._size)

    def summed(self, blocks: Sequence[int]) -> DeviceWords:
        """The weighted sum of each (layer, block), wrapping: `[num_layers, len(blocks)]`, flat."""
        if self._weights is None:
            weights = page_weights(self._words.shape[2]).view(np.int64)
            self._weights = torch.from_numpy(weights.copy()).to(self._device)
        index = self._uploaded(blocks)
        mask = (1 << 8 * self._size) - 1
        rows = []
        for layer in self._words:
            words = layer[index].to(torch.int64)
            if self._size < 8:
                words &= mask
            rows.append(words.mul_(self._weights).sum(dim=1))
        return self._to_host(torch.stack(rows), 8)

    def _uploaded(self, blocks: Sequence[int]) -> torch.Tensor:
        index = self._pinned(len(blocks), torch.int64)
        index.numpy()[:] = blocks
        return index.to(self._device, non_blocking=True)

    def _to_host(self, values: torch.Tensor, size: int) -> DeviceWords:
        host = self._pinned(values.numel(), values.dtype)
        host.copy_(values.view(-1), non_blocking=True)
        event = None
        if self._device.type == "cuda":
            event = torch.cuda.Event()
            event.record()
        return DeviceWords(host, event, size)

    def _pinned(self, count: int, dtype: torch.dtype) -> torch.Tensor:
        """Copies to and from it are enqueued, where pageable memory is waited for. Torch keeps such
        memory for the next call, but not before the copies on this one are over."""
        return torch.empty(count, dtype=dtype, pin_memory=self._device.type == "cuda")


class DeviceWords:
    """`host`, complete with `event`: unsigned words of `size` bytes."""

    def __init__(self, host: torch.Tensor, event: torch.cuda.Event | None, size: int) -> None:
        self._host = host
        self._event = event
        self._size = size

    def done(self) -> bool:
        return self._event is None or self._event.query()

    def wait(self) -> U64:
        if self._event is not None:
            self._event.synchronize()
        words: U64 = self._host.numpy().view(f"u{self._size}").astype(np.uint64)
        return words
