"""What a forward pass needs to know about its batch besides token ids and positions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch


@dataclass(frozen=True)
class PrefillSegment:
    """Rows `start .. start + length` of the flat batch: one chunk of one prompt.

    `context_len` tokens of the prompt are in the pool already; the chunk's own follow them.
    `block_table` covers both.
    """

    start: int
    length: int
    context_len: int
    block_table: Sequence[int]


@dataclass(frozen=True)
class DecodeSegment:
    """Rows `start .. start + B`, one token of one request each.

    `block_tables`: int32 [B, max_blocks], contiguous. `seq_lens`: int32 [B], the tokens attended
    to, the new one included.
    """

    start: int
    block_tables: torch.Tensor
    seq_lens: torch.Tensor

    @property
    def num_rows(self) -> int:
        return self.seq_lens.shape[0]


@dataclass
class ForwardContext:
    """One step's batch: decodes first, then prefill chunks.

    `kv_pool`: [num_layers, num_blocks, 2, block_size, num_kv_heads, head_dim], this rank's pages.
    `slot_mapping`: int64 [T], block * block_size + offset of each row's token.
    `after_layer(l)` is called once layer l's K and V of all rows are in the pool.
    """

    kv_pool: torch.Tensor
    slot_mapping: torch.Tensor
    prefills: Sequence[PrefillSegment] = ()
    decode: DecodeSegment | None = None
    after_layer: Callable[[int], None] | None = None

    @property
    def block_size(self) -> int:
        return self.kv_pool.shape[3]

    @cached_property
    def prefill_tables(self) -> list[torch.Tensor]:
        """Block tables of the prefill segments, int32 on the CPU, made once a step."""
        return [torch.tensor(s.block_table, dtype=torch.int32) for s in self.prefills]
