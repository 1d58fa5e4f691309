"""vLLM's KV cache, a tensor a layer, as the pages of one pool, which is how a device copies pages.

All pieces of a layout are equally long as a rule, and allocations aligned to more than that: then
each piece is a whole number of pages away from the lowest address, and the "pool" is the address
range from there on. What lies between the tensors is not touched.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from pdrelay.core.kv_layout import KVLayout
from pdrelay.integrations.vllm.page_layout import PageLayout
from pdrelay.transport.device import PagePool

I32: TypeAlias = npt.NDArray[np.int32]

_MAX_PAGES = 1 << 31  # devices number pages in int32
_WORD_BYTES = 4  # kernels copy these, or twice as much


@dataclass(frozen=True)
class PageGrid:
    """`firsts`, `strides`: int32 [layers, planes, 1], the page of block 0 and pages from block to
    block; `stride`: these where all are equal."""

    pool: PagePool
    firsts: I32
    strides: I32
    stride: np.int32 | None

    def pages(self, layers: int | slice | Sequence[int], blocks: I32) -> I32:
        """Pages of `blocks`, int32 [n]: int32 [layers * planes * n], layer by layer and there plane
        by plane."""
        pages: I32 = self.strides[layers] * blocks if self.stride is None else blocks * self.stride
        return (self.firsts[layers] + pages).reshape(-1)


def page_grid(layout: PageLayout, addresses: Sequence[int]) -> PageGrid | None:
    """The grid of `layout` with region i at `addresses[i]`; None where its pieces lie in none."""
    sizes = {plane.num_bytes for layer in layout.layers for plane in layer.planes}
    if len(sizes) != 1:
        return None
    page_bytes = sizes.pop()
    if page_bytes % _WORD_BYTES:
        return None
    base = min(addresses)
    span = max(a + n for a, n in zip(addresses, layout.region_bytes, strict=True)) - base
    if span // page_bytes >= _MAX_PAGES:
        return None
    origins: list[list[tuple[int, int]]] = []
    for layer in layout.layers:
        start = addresses[layer.region] - base
        planes = [(start + plane.offset, plane.block_stride) for plane in layer.planes]
        if any(number % page_bytes for plane in planes for number in plane):
            return None
        origins.append([(at // page_bytes, step // page_bytes) for at, step in planes])
    if len({len(planes) for planes in origins}) != 1:
        return None
    pool = PagePool(_pool_layout(page_bytes, span // page_bytes), base)
    numbers = np.array(origins, np.int32)
    firsts, strides = numbers[..., :1].copy(), numbers[..., 1:].copy()
    stride = strides[0, 0, 0] if (strides == strides[0, 0, 0]).all() else None
    return PageGrid(pool, firsts, strides, stride)


def _pool_layout(page_bytes: int, num_pages: int) -> KVLayout:
    """Only its sizes matter: one layer of `num_pages` pages of `page_bytes`."""
    return KVLayout(
        num_layers=1,
        num_blocks=num_pages,
        block_size=1,
        num_kv_heads=1,
        head_dim=page_bytes // 4,
        dtype="bfloat16",
    )
