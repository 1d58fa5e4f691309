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
    """Over `pool`, a contiguous tensor shaped `layout.shape`, on any device."""

    def __init__(self, pool: torch.Tensor, layout: KVLayout) -> None:
        self._device = pool.device
        self._size = gcd(layout.layer_block_bytes // 2, 8)
        words = pool.view(-1).view(_WORDS[self._size])
        self._words = words.view(layout.num_layers, layout.num_blocks, -1)
        width = self._words.shape[2]
        ends = np.array([0, width // 2 - 1, width // 2, width - 1])
        layers = np.arange(layout.num_layers)[:, None] * (layout.num_blocks * width)
        self._offsets = (layers + ends).reshape(-1, 1)
        self._weights: torch.Tensor | None = None

    def sampled(self, blocks: Sequence[int]) -> U64:
        """Four words a (layer, block): `[num_layers, 4, len(blocks)]`, flat."""
        # Added up here: a hand-over waits for this, and a launch takes longer than the addition.
        places = self._offsets + np.array(blocks, dtype=np.int64) * self._words.shape[2]
        index = torch.from_numpy(places).to(self._device)
        return self._unsigned(self._words.view(-1).take(index))

    def summed(self, blocks: Sequence[int]) -> U64:
        """The weighted sum of each (layer, block), wrapping: `[num_layers, len(blocks)]`, flat."""
        if self._weights is None:
            weights = page_weights(self._words.shape[2]).view(np.int64)
            self._weights = torch.from_numpy(weights.copy()).to(self._device)
        index = torch.tensor(blocks, dtype=torch.int64).to(self._device)
        mask = (1 << 8 * self._size) - 1
        rows = []
        for layer in self._words:
            words = layer[index].to(torch.int64)
            if self._size < 8:
                words &= mask
            rows.append(words.mul_(self._weights).sum(dim=1))
        return self._unsigned(torch.stack(rows), size=8)

    def _unsigned(self, values: torch.Tensor, size: int | None = None) -> U64:
        array = values.cpu().numpy().view(f"u{size or self._size}")
        unsigned: U64 = array.astype(np.uint64, copy=False).ravel()
        return unsigned
