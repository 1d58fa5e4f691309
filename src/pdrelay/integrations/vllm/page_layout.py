"""Where one rank's KV pages lie, in terms that hold for every attention backend; no torch.

A layer of a block is one or more *planes*: equally long pieces at a fixed distance from block to
block. A cache `[2, blocks, tokens, heads, dim]` has two planes a layer (K and V), one that keeps K
and V of a block together has one, one with other layers between its heads has one a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import msgspec

from pdrelay.errors import ConfigError

MAX_PLANES = 256


class Plane(msgspec.Struct, frozen=True):
    """Piece of block b: `num_bytes` from `offset + b * block_stride` of the layer's region."""

    offset: int
    block_stride: int
    num_bytes: int


class LayerLayout(msgspec.Struct, frozen=True):
    """One layer's pages in region `region` (one allocation of the instance)."""

    name: str
    region: int
    form: str  # dtype, shape of a block and order of its axes in memory
    planes: tuple[Plane, ...]

    @property
    def block_bytes(self) -> int:
        return sum(plane.num_bytes for plane in self.planes)


class PageLayout(msgspec.Struct, frozen=True):
    """All layers of one rank. `region_bytes[i]` is the size of region i."""

    num_blocks: int
    block_size: int  # tokens a block
    region_bytes: tuple[int, ...]
    layers: tuple[LayerLayout, ...]

    @property
    def block_bytes(self) -> int:
        """Bytes of one block, all layers."""
        return sum(layer.block_bytes for layer in self.layers)


def layer_layout(
    name: str,
    *,
    region: int,
    offset: int,
    dtype: str,
    itemsize: int,
    shape: Sequence[int],
    strides: Sequence[int],
    num_blocks: int,
) -> LayerLayout:
    """The layout of one cache tensor; `offset` and `strides` in elements.

    The block axis is the first of `num_blocks` or a multiple (kernel blocks: several make one
    block), or the second behind an axis of K and V. Raises ConfigError where there is none.
    """
    axis = _block_axis(name, shape, num_blocks)
    kernel_blocks = shape[axis] // num_blocks
    block_stride = strides[axis] * kernel_blocks * itemsize
    inner = [(i, n, strides[i] * itemsize) for i, n in enumerate(shape) if i != axis and n > 1]
    if kernel_blocks > 1:
        inner.append((axis, kernel_blocks, strides[axis] * itemsize))
    inner.sort(key=lambda entry: -entry[2])
    form_shape = ["b" if i == axis else str(n) for i, n in enumerate(shape)]
    order = [str(i) for i, _, _ in inner]
    form = f"{dtype}[{','.join(form_shape)}] order {','.join(order)} kernel blocks {kernel_blocks}"
    num_bytes = itemsize
    while inner and inner[-1][2] == num_bytes:
        num_bytes *= inner.pop()[1]
    outer = [range(0, n * stride, stride) for _, n, stride in inner]
    offsets = [offset * itemsize + sum(steps) for steps in product(*outer)]
    if len(offsets) > MAX_PLANES:
        raise ConfigError(
            f"KV cache of {name} is too scattered to move ({len(offsets)} pieces a block, shape "
            f"{tuple(shape)}, strides {tuple(strides)}): choose another attention backend"
        )
    planes = tuple(Plane(at, block_stride, num_bytes) for at in offsets)
    return LayerLayout(name, region, form, planes)


def _block_axis(name: str, shape: Sequence[int], num_blocks: int) -> int:
    if shape and shape[0] % num_blocks == 0:
        return 0
    if len(shape) > 1 and shape[0] == 2 and shape[1] % num_blocks == 0:
        return 1
    raise ConfigError(
        f"KV cache of {name} has shape {tuple(shape)}, where no axis counts its {num_blocks} "
        "blocks: this attention backend is not supported"
    )


def check_inside(layout: PageLayout) -> None:
    """Raise ConfigError where a page of a peer's layout would lie outside its region."""
    for layer in layout.layers:
        if not 0 <= layer.region < len(layout.region_bytes):
            raise ConfigError(f"the peer's layer {layer.name} lies in no region")
        size = layout.region_bytes[layer.region]
        for plane in layer.planes:
            last = plane.offset + (layout.num_blocks - 1) * plane.block_stride + plane.num_bytes
            if min(plane.offset, plane.num_bytes, plane.block_stride) < 0 or last > size:
                raise ConfigError(f"the peer's layer {layer.name} lies outside its region")


def check_same_pages(mine: PageLayout, theirs: PageLayout) -> None:
    """Raise ConfigError unless pages can be copied between the layouts byte for byte."""
    fix = "start both instances with the same model, dtype, block size and attention backend"
    if mine.block_size != theirs.block_size:
        raise ConfigError(
            f"blocks have {mine.block_size} tokens here, {theirs.block_size} at the peer: {fix}"
        )
    if len(mine.layers) != len(theirs.layers):
        raise ConfigError(
            f"{len(mine.layers)} layers of KV here, {len(theirs.layers)} at the peer: {fix}"
        )
    for a, b in zip(mine.layers, theirs.layers, strict=True):
        sizes = [[plane.num_bytes for plane in layer.planes] for layer in (a, b)]
        if (a.name, a.form) != (b.name, b.form) or sizes[0] != sizes[1]:
            raise ConfigError(
                f"KV of layer {a.name} is {a.form} here, {b.form} ({b.name}) at the peer: {fix}"
            )
