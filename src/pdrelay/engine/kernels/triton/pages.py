"""Where keys lie in a layer of the KV pool, [num_blocks, 2, block_size, num_kv_heads, head_dim]."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def key_offsets(
    table_ptr: tl.tensor,
    start: tl.tensor,
    valid: tl.tensor,
    WIDTH: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
) -> tl.tensor:
    """Elements from the layer's start to K of the positions start .. start + TILE, int64 [TILE];
    V lies BLOCK_SIZE * WIDTH further on. WIDTH: num_kv_heads * head_dim. `start` is a multiple of
    TILE; entries of the block table for positions that are not `valid` are not read, except that
    the first position must be.
    """
    keys = tl.arange(0, TILE)
    if BLOCK_SIZE >= TILE:
        block = tl.load(table_ptr + start // BLOCK_SIZE).to(tl.int64)
        line = block * (2 * BLOCK_SIZE) + start % BLOCK_SIZE
        return line * WIDTH + keys * WIDTH
    position = start + keys
    block = tl.load(table_ptr + position // BLOCK_SIZE, mask=valid, other=0).to(tl.int64)
    return (block * (2 * BLOCK_SIZE) + position % BLOCK_SIZE) * WIDTH
