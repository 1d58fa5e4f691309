"""What a forward pass needs to know about its batch besides token ids and positions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch

from pdrelay.engine.kernels.decode_cut import DecodeCut
from pdrelay.engine.remote_store import RemoteStore


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
    to, the new one included. On CUDA a length of 0 marks a padding row, and `cut` says how rows'
    keys are cut.
    """

    start: int
    block_tables: torch.Tensor
    seq_lens: torch.Tensor
    cut: DecodeCut = field(default_factory=DecodeCut)

    @property
    def num_rows(self) -> int:
        return self.seq_lens.shape[0]


@dataclass
class ForwardContext:
    """One step's batch: decodes first, then prefill chunks.

    `kv_pool`: [num_layers, num_blocks, 2, block_size, num_kv_heads, head_dim], this rank's pages.
    `slot_mapping`: int64 [T], block * block_size + offset of each row's token; on CUDA -1 marks a
    padding row, whose K and V go nowhere.
    `after_layer(l)` is called once layer l's K and V of all rows are in the pool, or queued.
    `remote`: a peer's pages that get the same K and V (CUDA only).
    `tables`: the prefill segments' block tables, int32, where they are on the device already.
    """

    kv_pool: torch.Tensor
    slot_mapping: torch.Tensor
    prefills: Sequence[PrefillSegment] = ()
    decode: DecodeSegment | None = None
    after_layer: Callable[[int], None] | None = None
    remote: RemoteStore | None = None
    tables: Sequence[torch.Tensor] | None = None

    @property
    def block_size(self) -> int:
        return self.kv_pool.shape[3]

    @property
    def has_fresh_prompt(self) -> bool:
        return any(segment.context_len == 0 for segment in self.prefills)

    @cached_property
    def prefill_tables(self) -> Sequence[torch.Tensor]:
        """Block tables of the prefill segments, int32, on the CPU unless given; once a step."""
        if self.tables is not None:
            return self.tables
        return [torch.tensor(s.block_table, dtype=torch.int32) for s in self.prefills]
