"""Where each layer of each block lies in a rank's KV pool.

The pool is one allocation, `[num_layers, num_blocks, 2, block_size, num_kv_heads, head_dim]`
(K, then V). Layer-major, so that what a layer-wise hand-over sends, one layer of a run of
consecutive blocks, is one contiguous piece; K and V of a block stay together, so that it is one
piece and not two.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


class KVLayout(msgspec.Struct, frozen=True, kw_only=True):
    """Shape of one rank's KV pool. `num_kv_heads` counts this rank's heads only."""

    num_layers: int
    num_blocks: int
    block_size: int  # tokens a block
    num_kv_heads: int
    head_dim: int
    dtype: str  # a key of DTYPE_BYTES

    @property
    def shape(self) -> tuple[int, int, int, int, int, int]:
        return (
            self.num_layers,
            self.num_blocks,
            2,
            self.block_size,
            self.num_kv_heads,
            self.head_dim,
        )

    @property
    def layer_block_bytes(self) -> int:
        """Bytes of one layer of one block (K and V)."""
        itemsize = DTYPE_BYTES[self.dtype]
        return 2 * self.block_size * self.num_kv_heads * self.head_dim * itemsize

    @property
    def block_bytes(self) -> int:
        return self.num_layers * self.layer_block_bytes

    @property
    def bytes_per_token(self) -> int:
        return self.block_bytes // self.block_size

    @property
    def total_bytes(self) -> int:
        return self.num_blocks * self.block_bytes

    def offset(self, layer: int, block: int) -> int:
        """Byte offset of one layer of one block from the start of the pool."""
        return (layer * self.num_blocks + block) * self.layer_block_bytes

    def one_layer(self, num_blocks: int) -> KVLayout:
        """Such pages, as one layer of `num_blocks`."""
        return msgspec.structs.replace(self, num_layers=1, num_blocks=num_blocks)

    def compatible(self, other: KVLayout) -> bool:
        """Whether pages can be copied between the two pools byte for byte."""
        mine = (self.num_layers, self.block_size, self.num_kv_heads, self.head_dim, self.dtype)
        return mine == (
            other.num_layers,
            other.block_size,
            other.num_kv_heads,
            other.head_dim,
            other.dtype,
        )


def contiguous_runs(
    src_blocks: Sequence[int], dst_blocks: Sequence[int]
) -> Iterator[tuple[int, int, int]]:
    """Merge block pairs into `(src, dst, length)` runs that are consecutive on both sides."""
    assert len(src_blocks) == len(dst_blocks)
    start = 0
    for i in range(1, len(src_blocks) + 1):
        if (
            i < len(src_blocks)
            and src_blocks[i] == src_blocks[i - 1] + 1
            and dst_blocks[i] == dst_blocks[i - 1] + 1
        ):
            continue
        if i > start:
            yield src_blocks[start], dst_blocks[start], i - start
        start = i
