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
    """Over `pool`, a contiguous tensor shaped `layout.shape`, on any device. For one thread."""

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
        self._index = self._pinned(layout.num_blocks, torch.int64)
        self._values = self._pinned(0, torch.int64)

    def sampled(self, blocks: Sequence[int]) -> U64:
        """Four words a (layer, block): `[num_layers, 4, len(blocks)]`, flat."""
        return self._unsigned(self._ends.index_select(3, self._uploaded(blocks)))

    def summed(self, blocks: Sequence[int]) -> U64:
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
        return self._unsigned(torch.stack(rows), size=8)

    def _uploaded(self, blocks: Sequence[int]) -> torch.Tensor:
        """The blocks on the device, until the next call: what reads them was waited for by then."""
        if len(blocks) > len(self._index):
            self._index = self._pinned(len(blocks), torch.int64)
        index = self._index[: len(blocks)]
        index.numpy()[:] = blocks
        return index.to(self._device, non_blocking=True)

    def _unsigned(self, values: torch.Tensor, size: int | None = None) -> U64:
        """The values on the host, flat; waits for them."""
        if values.device.type != "cpu":
            values = self._downloaded(values)
        array = values.numpy().view(f"u{size or self._size}")
        unsigned: U64 = array.astype(np.uint64).ravel()
        return unsigned

    def _downloaded(self, values: torch.Tensor) -> torch.Tensor:
        num_bytes = values.numel() * values.element_size()
        if num_bytes > self._values.numel() * 8:
            self._values = self._pinned(1 << (num_bytes // 8).bit_length(), torch.int64)
        host = self._values.view(values.dtype)[: values.numel()]
        host.copy_(values.view(-1), non_blocking=True)
        torch.cuda.current_stream(self._device).synchronize()
        return host

    def _pinned(self, count: int, dtype: torch.dtype) -> torch.Tensor:
        """Copies to and from it are enqueued, where pageable memory is waited for."""
        return torch.empty(count, dtype=dtype, pin_memory=self._device.type == "cuda")
