"""Where keys lie in a layer of the KV pool, [num_blocks, 2, block_size, num_kv_heads, head_dim]."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def table_entry(
    table_ptr: tl.tensor,
    position: tl.tensor,
    BLOCK_SIZE: tl.constexpr,
    INTERPRET: tl.constexpr,
) -> tl.tensor:
    """The block of `position`, int32, by a load that Triton's pipeliner does not see.

    A load that it sees becomes a level of the pipeline of its own, in front of the loads at
    addresses made of it, and takes half of the stages.
    """
    at = table_ptr + position // BLOCK_SIZE
    if INTERPRET:
        return tl.load(at)
    return tl.inline_asm_elementwise(
        "ld.global.b32 $0, [$1];", "=r,l", [at.to(tl.int64)], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def tile_offsets(
    block: tl.tensor,
    start: tl.tensor,
    WIDTH: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
) -> tl.tensor:
    """`key_offsets` of a tile that lies in one block, BLOCK_SIZE >= TILE."""
    line = block.to(tl.int64) * (2 * BLOCK_SIZE) + start % BLOCK_SIZE
    return line * WIDTH + tl.arange(0, TILE) * WIDTH


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
    if BLOCK_SIZE >= TILE:
        block = tl.load(table_ptr + start // BLOCK_SIZE)
        return tile_offsets(block, start, WIDTH, BLOCK_SIZE, TILE)
    position = start + tl.arange(0, TILE)
    block = tl.load(table_ptr + position // BLOCK_SIZE, mask=valid, other=0).to(tl.int64)
    return (block * (2 * BLOCK_SIZE) + position % BLOCK_SIZE) * WIDTH
