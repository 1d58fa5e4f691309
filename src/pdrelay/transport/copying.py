"""Checks and copies of pages that the transports share."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from pdrelay.core.kv_layout import KVLayout, contiguous_runs
from pdrelay.errors import TransportError
from pdrelay.transport.base import Descriptor

Pages = npt.NDArray[np.uint8]  # [num_layers, num_blocks, layer_block_bytes]

S = TypeVar("S", bound=msgspec.Struct)


def check_blocks(blocks: Sequence[int], layout: KVLayout, whose: str) -> None:
    """Raise TransportError unless all `blocks` are blocks of `layout`."""
    if blocks and (min(blocks) < 0 or max(blocks) >= layout.num_blocks):
        raise TransportError(
            f"{whose} blocks {min(blocks)}..{max(blocks)} lie outside its pool of "
            f"{layout.num_blocks}: the peer and this instance disagree, restart them"
        )


def check_layer(layer: int, layout: KVLayout) -> None:
    if not 0 <= layer < layout.num_layers:
        raise TransportError(f"layer {layer} of {layout.num_layers} does not exist")


def check_slots(src_blocks: Sequence[int], dst_blocks: Sequence[int]) -> None:
    if len(src_blocks) != len(dst_blocks):
        raise TransportError(f"{len(src_blocks)} blocks cannot go to {len(dst_blocks)} slots")


def check_compatible(mine: KVLayout, theirs: KVLayout) -> None:
    """Raise TransportError unless pages can be copied between the two layouts byte for byte."""
    if not mine.compatible(theirs):
        raise TransportError(
            f"KV layouts differ ({mine} here, {theirs} there): start both instances with the same "
            "model, dtype and block size"
        )


def check_commit(num_pages: int, expected: int) -> str | None:
    """What is wrong with a commit of `num_pages` where `expected` pages are due, if anything."""
    if num_pages == expected:
        return None
    return f"the producer committed {num_pages} pages where {expected} are due"


def decode_descriptor(descriptor: Descriptor, kind: type[S]) -> S:
    """Decode what a consumer sent. Raises TransportError; its fds stay the caller's."""
    try:
        return msgspec.msgpack.decode(descriptor.data, type=kind)
    except msgspec.MsgspecError as error:
        raise TransportError(
            f"the consumer's descriptor does not fit this transport ({error}): start both "
            "instances with the same --transport and version"
        ) from error


def close_fds(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)


def copy_layer(
    src: Pages, dst: Pages, layer: int, src_blocks: Sequence[int], dst_blocks: Sequence[int]
) -> int:
    """Copy one layer of blocks, one copy a run that is contiguous on both sides.

    Returns the number of copies. numpy gives up the GIL while it copies.
    """
    src_layer, dst_layer = src[layer], dst[layer]
    pieces = 0
    for a, b, n in contiguous_runs(src_blocks, dst_blocks):
        dst_layer[b : b + n] = src_layer[a : a + n]
        pieces += 1
    return pieces


def differing(
    a: Pages, b: Pages, layer: int, a_blocks: Sequence[int], b_blocks: Sequence[int]
) -> list[int]:
    """Positions `i` where one layer of block `a_blocks[i]` is not that of `b_blocks[i]`."""
    found: list[int] = []
    done = 0
    for x, y, n in contiguous_runs(a_blocks, b_blocks):
        unequal = (a[layer, x : x + n] != b[layer, y : y + n]).any(axis=1)
        found.extend((np.flatnonzero(unequal) + done).tolist())
        done += n
    return found
