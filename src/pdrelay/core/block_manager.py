"""Blocks of one KV pool: who holds them, and which hold reusable prefixes.

Every block is in exactly one state, and the counts add up to `num_blocks`:

    free         holds nothing
    cached       held by nobody, its content is known by key and may be reused or evicted
    used         held by at least one request
    in_transfer  held, and pages are being read for or written by a transfer
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class BlockCounts:
    free: int
    cached: int
    used: int
    in_transfer: int


class BlockManager:
    """Reference-counted blocks with a prefix cache; least recently released is evicted first."""

    def __init__(self, num_blocks: int, *, enable_prefix_caching: bool = True) -> None:
        assert num_blocks > 0
        self.num_blocks = num_blocks
        self.enable_prefix_caching = enable_prefix_caching
        # A heap of ids, so that allocations are consecutive runs where possible: fewer pieces.
        self._free = list(range(num_blocks))
        self._evictable: OrderedDict[int, None] = OrderedDict()
        self._refs = [0] * num_blocks
        self._transfer_refs = [0] * num_blocks
        self._key_of: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}
        self._num_in_transfer = 0

    @property
    def num_available(self) -> int:
        """Blocks that `allocate` could give now."""
        return len(self._free) + len(self._evictable)

    def counts(self) -> BlockCounts:
        held = self.num_blocks - self.num_available
        return BlockCounts(
            free=len(self._free),
            cached=len(self._evictable),
            used=held - self._num_in_transfer,
            in_transfer=self._num_in_transfer,
        )

    def allocate(self, count: int) -> list[int] | None:
        """`count` blocks with one reference each, or None when there are not enough."""
        if count > self.num_available:
            return None
        blocks = []
        for _ in range(count):
            if self._free:
                block = heapq.heappop(self._free)
            else:
                block, _ = self._evictable.popitem(last=False)
                self._forget_key(block)
            assert self._refs[block] == 0
            self._refs[block] = 1
            blocks.append(block)
        return blocks

    def match(self, keys: Sequence[bytes]) -> list[int]:
        """Blocks that hold the longest known prefix of `keys`. Takes no reference."""
        if not self.enable_prefix_caching:
            return []
        blocks = []
        for key in keys:
            block = self._block_of.get(key)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def acquire(self, blocks: Iterable[int]) -> None:
        """Take one more reference on each matched block."""
        for block in blocks:
            if self._refs[block] == 0:
                del self._evictable[block]
            self._refs[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Give back one reference on each. The tail becomes evictable before the head."""
        for block in reversed(blocks):
            assert self._refs[block] > 0, f"block {block} released twice"
            self._refs[block] -= 1
            if self._refs[block] == 0:
                assert self._transfer_refs[block] == 0, f"block {block} freed in transfer"
                if self._key_of[block] is None:
                    heapq.heappush(self._free, block)
                else:
                    self._evictable[block] = None

    def set_key(self, block: int, key: bytes) -> None:
        """Publish a full, computed block under its content key. The first block of a key wins."""
        assert self._refs[block] > 0
        if not self.enable_prefix_caching or key in self._block_of:
            return
        assert self._key_of[block] is None
        self._key_of[block] = key
        self._block_of[key] = block

    def begin_transfer(self, blocks: Iterable[int]) -> None:
        for block in blocks:
            assert self._refs[block] > 0
            self._num_in_transfer += self._transfer_refs[block] == 0
            self._transfer_refs[block] += 1

    def end_transfer(self, blocks: Iterable[int]) -> None:
        for block in blocks:
            assert self._transfer_refs[block] > 0
            self._transfer_refs[block] -= 1
            self._num_in_transfer -= self._transfer_refs[block] == 0

    def _forget_key(self, block: int) -> None:
        key = self._key_of[block]
        if key is not None:
            del self._block_of[key]
            self._key_of[block] = None

    def check_integrity(self, holders: Iterable[Sequence[int]]) -> None:
        """Assert that references are exactly what `holders` (all block tables) hold."""
        expected = [0] * self.num_blocks
        for table in holders:
            for block in table:
                expected[block] += 1
        assert expected == self._refs, "reference counts do not match the block tables"
        free = set(self._free)
        assert len(free) == len(self._free), "a block is free twice"
        for block in range(self.num_blocks):
            idle = self._refs[block] == 0
            assert idle == (block in free or block in self._evictable)
            assert not (block in free and block in self._evictable)
            assert not (block in free and self._key_of[block] is not None)
            assert not (idle and self._transfer_refs[block])
        assert all(self._key_of[b] == k for k, b in self._block_of.items())
        assert self._num_in_transfer == sum(1 for refs in self._transfer_refs if refs)
        counts = self.counts()
        total = counts.free + counts.cached + counts.used + counts.in_transfer
        assert total == self.num_blocks and min(counts.used, counts.in_transfer) >= 0
