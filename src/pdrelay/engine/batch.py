"""A step's input as plain arrays: what every rank of an instance computes on."""

from __future__ import annotations

import msgspec
import numpy as np

from pdrelay.core.scheduler import Chunk, StepPlan


class PrefillSegment(msgspec.Struct, frozen=True, array_like=True):
    """Rows `start .. start + length` of the flat batch, behind `context_len` cached tokens."""

    start: int
    length: int
    context_len: int
    block_table: list[int]


class BatchInput(msgspec.Struct, frozen=True, array_like=True, tag="batch"):
    """Flat batch, decodes first. Arrays travel as raw little-endian bytes.

    `token_ids`, `positions`, `slot_mapping`: int64 [T]. `decode_block_tables`: int32
    [num_decodes, max_blocks], zero-padded. `decode_seq_lens`: int32 [num_decodes], the tokens
    attended to, the new one included. `logits_rows`: rows of the flat batch to project.
    """

    token_ids: bytes
    positions: bytes
    slot_mapping: bytes
    num_decodes: int
    decode_block_tables: bytes
    decode_seq_lens: bytes
    prefills: list[PrefillSegment]
    logits_rows: list[int]


def wants_prompt_logprobs(chunk: Chunk) -> bool:
    """Whether this chunk's logits score prompt tokens: not in a recomputation."""
    request = chunk.request
    return (
        request.params.prompt_logprobs is not None
        and request.num_output_tokens == 0
        and chunk.start < request.num_prompt_tokens
    )


def build_batch(plan: StepPlan, block_size: int) -> BatchInput:
    """Lay out a plan. Decode chunks come first in it; slot = block * block_size + offset."""
    decodes = [c for c in plan.chunks if c.is_decode]
    token_ids: list[np.ndarray] = []
    positions: list[np.ndarray] = []
    slots: list[np.ndarray] = []
    prefills: list[PrefillSegment] = []
    rows: list[int] = []
    offset = 0
    for chunk in plan.chunks:
        assert not chunk.token_pending, "this runner reads every step before it plans the next"
        request, start, length = chunk.request, chunk.start, chunk.length
        token_ids.append(np.asarray(request.token_ids[start : start + length], dtype=np.int64))
        position = np.arange(start, start + length, dtype=np.int64)
        table = np.asarray(request.block_table, dtype=np.int64)
        positions.append(position)
        slots.append(table[position // block_size] * block_size + position % block_size)
        if not chunk.is_decode:
            used = -(-(start + length) // block_size)
            prefills.append(PrefillSegment(offset, length, start, request.block_table[:used]))
        if wants_prompt_logprobs(chunk):
            rows.extend(range(offset, offset + length))
        elif chunk.samples:
            rows.append(offset + length - 1)
        offset += length
    seq_lens = np.asarray([c.start + 1 for c in decodes], dtype=np.int32)
    width = int(-(-seq_lens.max() // block_size)) if decodes else 0
    tables = np.zeros((len(decodes), width), dtype=np.int32)
    for i, chunk in enumerate(decodes):
        table_head = chunk.request.block_table[:width]
        tables[i, : len(table_head)] = table_head
    return BatchInput(
        token_ids=np.concatenate(token_ids).tobytes(),
        positions=np.concatenate(positions).tobytes(),
        slot_mapping=np.concatenate(slots).tobytes(),
        num_decodes=len(decodes),
        decode_block_tables=tables.tobytes(),
        decode_seq_lens=seq_lens.tobytes(),
        prefills=prefills,
        logits_rows=rows,
    )
