"""Decode attention over pages: one query token a row, split over the keys (Flash-Decoding: Dao et
al., 2023), the query heads of a KV head packed into one tile.

A tile's loads depend on its entry of the block table. Where a tile lies in one block, the entry is
read a tile ahead and outside Triton's pipeline, so that all its stages but one hold K and V on
their way (`pages.table_entry`). Smaller blocks: a vector of entries, pipelined like K and V.

Bits: a row's result depends on its own query, keys, length, `num_splits` and, where `extra_parts`
cut rows finer, on the part length that they name; on nothing else: not on the batch's size, the
row's place in it or the order in which programs finish. Another `num_splits`, `fused` on or off,
another `depth` or `warps`: another order of sums, and last bits that may differ.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pdrelay.engine.kernels.decode_cut import DecodeCut
from pdrelay.engine.kernels.triton.decode_parts import HEADER, wanted_parts
from pdrelay.engine.kernels.triton.dot import dot
from pdrelay.engine.kernels.triton.launch import (
    WARP,
    interpreting,
    is_power_of_2,
    num_sms,
    pdl_flags,
)
from pdrelay.engine.kernels.triton.pages import key_offsets, table_entry, tile_offsets
from pdrelay.engine.kernels.triton.split_rule import (
    MAX_SPLITS,
    TILE,
    crowds,
    pipeline_depth,
    split_rule,
)

__all__ = ["MAX_SPLITS", "DecodeWorkspace", "paged_decode", "split_rule"]

_LOG2_E = 1.4426950408889634
_MIN_DOT_ROWS = 16
_REGISTERS = 128  # of 255 a thread
_EXTRA_CHUNK = 8  # parts that are combined at once where rows may have up to MAX_SPLITS


class DecodeWorkspace:
    """Partial results of up to `max_batch` rows in `max_splits` parts.

    One launch at a time may use it: launches on one stream may share it, those of two streams not.
    """

    def __init__(
        self,
        max_batch: int,
        num_heads: int,
        head_dim: int,
        device: torch.device | str,
        max_splits: int = MAX_SPLITS,
    ) -> None:
        cells = max_batch * num_heads * max_splits
        self.capacity = cells
        self.head_dim = head_dim
        self.out = torch.empty(cells * head_dim, dtype=torch.float32, device=device)
        self.maximum = torch.empty(cells, dtype=torch.float32, device=device)
        self.total = torch.empty(cells, dtype=torch.float32, device=device)
        # Arrived parts of a (row, KV head); whoever completes one sets it back to 0.
        self.arrived = torch.zeros(max_batch * num_heads, dtype=torch.int32, device=device)


def paged_decode(
    q: torch.Tensor,
    kv_layer: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    out: torch.Tensor | None = None,
    workspace: DecodeWorkspace | None = None,
    cut: DecodeCut | None = None,
    *,
    fused: bool = True,
    depth: int | None = None,
    warps: int = 4,
    pdl: bool = False,
) -> torch.Tensor:
    """[B, Hq * D] of `q` [B, Hq * D] (rows may be strided) over each row's first seq_lens[b] keys.

    `kv_layer`: [num_blocks, 2, block_size, Hkv, D]; `block_tables`: int32 [B, W]; `seq_lens`:
    int32 [B], the new token included; 0 marks a padding row, which gets zeros. `scale` multiplies
    q·k. `cut`: by `split_rule` of the longest sequence the tables can hold unless given; its
    `extra_parts`, those of these lengths and `num_splits`, need `fused`.
    `fused`: the last part of a row to finish combines them; else a second kernel does. `depth`:
    tiles of K and V on their way, by `pipeline_depth` unless given. With `pdl` one kernel without
    it lies between this and what wrote the tables, the lengths and the extra parts (`launch.py`).
    """
    batch = q.shape[0]
    block_size, num_kv_heads, head_dim = kv_layer.shape[2:]
    num_heads = q.shape[1] // head_dim
    group = num_heads // num_kv_heads
    assert q.stride(1) == 1 and kv_layer.is_contiguous() and is_power_of_2(head_dim)
    assert is_power_of_2(block_size)
    assert block_tables.dtype == seq_lens.dtype == torch.int32 and block_tables.stride(1) == 1
    if out is None:
        out = torch.empty((batch, num_heads * head_dim), dtype=q.dtype, device=q.device)
    assert out.is_contiguous()
    if batch == 0:
        return out
    if cut is None:
        longest = block_tables.shape[1] * block_size
        cut = DecodeCut(split_rule(batch, num_kv_heads, longest, num_sms(q.device)))
    num_splits, extras = cut.num_splits, cut.extra_parts
    assert is_power_of_2(num_splits)
    sms = num_sms(q.device)
    crowded = crowds(batch * num_kv_heads * num_splits, sms)
    if depth is None:
        tile_bytes = 2 * TILE * head_dim * kv_layer.element_size()
        depth = pipeline_depth(batch, num_kv_heads, num_splits, sms, tile_bytes, block_size)
    slots = 0 if extras is None else extras.numel() - HEADER
    assert fused or not slots
    pitch = MAX_SPLITS if slots else num_splits
    if workspace is None and pitch > 1:
        workspace = DecodeWorkspace(batch, num_heads, head_dim, q.device, pitch)
    if workspace is None:
        partial = (out, out, out, out)
    else:
        assert batch * num_heads * pitch <= workspace.capacity
        assert workspace.head_dim == head_dim
        partial = (workspace.out, workspace.maximum, workspace.total, workspace.arrived)
    chunk = min(pitch, _EXTRA_CHUNK) if slots else num_splits
    _decode[(num_kv_heads, batch * num_splits + slots)](
        q,
        kv_layer,
        block_tables,
        seq_lens,
        seq_lens if extras is None else extras,
        out,
        *partial,
        batch,
        q.stride(0),
        block_tables.stride(0),
        scale * _LOG2_E,
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        GROUP=group,
        ROWS=max(_MIN_DOT_ROWS, triton.next_power_of_2(group)),
        TILE=TILE,
        SPLITS=num_splits,
        EXTRA=slots > 0,
        PITCH=pitch,
        CHUNK=chunk,
        HEADER=HEADER,
        FUSED=fused,
        STAGES=_stages(depth, block_size, crowded),
        HEADS_AT_ONCE=_heads_at_once(group, chunk * head_dim, warps),
        INTERPRET=interpreting(),
        num_warps=warps,
        **pdl_flags(pdl),
    )
    if num_splits > 1 and not fused:
        _combine[(num_heads, batch)](
            *partial[:3],
            seq_lens,
            out,
            NUM_HEADS=num_heads,
            HEAD_DIM=head_dim,
            TILE=TILE,
            SPLITS=num_splits,
            num_warps=2,
            **pdl_flags(pdl),
        )
    return out


def _stages(depth: int, block_size: int, crowded: bool) -> int:
    """What Triton counts. A vector of entries is a level of the pipeline of its own, `depth` tiles
    ahead of K and V; in a crowd of programs less."""
    assert depth >= 0
    if block_size >= TILE:
        return depth + 1
    return max(1, 2 * depth + (0 if crowded else 1))


def _heads_at_once(group: int, floats_per_head: int, warps: int) -> int:
    """Heads whose partial results fit into half of the threads' registers; a power of two."""
    fit = max(1, warps * WARP * _REGISTERS // floats_per_head)
    all_heads: int = triton.next_power_of_2(group)
    return min(all_heads, 1 << (fit.bit_length() - 1))


@triton.jit(do_not_specialize=["batch", "table_stride"])
def _decode(
    q_ptr: tl.tensor,
    kv_ptr: tl.tensor,
    tables_ptr: tl.tensor,
    lens_ptr: tl.tensor,
    extras_ptr: tl.tensor,
    out_ptr: tl.tensor,
    partial_ptr: tl.tensor,
    maximum_ptr: tl.tensor,
    total_ptr: tl.tensor,
    arrived_ptr: tl.tensor,
    batch: int,
    q_stride: int,
    table_stride: int,
    scale_log2: float,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    SPLITS: tl.constexpr,
    EXTRA: tl.constexpr,
    PITCH: tl.constexpr,
    CHUNK: tl.constexpr,
    HEADER: tl.constexpr,
    FUSED: tl.constexpr,
    STAGES: tl.constexpr,
    HEADS_AT_ONCE: tl.constexpr,
    INTERPRET: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """One program: the queries of one KV head of one row, one part of its keys."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    kv_head = tl.program_id(0)
    slot = tl.program_id(1)
    row = slot % batch
    split = slot // batch
    if EXTRA:
        place = slot - batch * SPLITS
        named = (place >= 0) & (place < tl.load(extras_ptr + 1))
        if place >= 0:  # beyond what is named lies anything
            entry = tl.load(extras_ptr + HEADER + place)
            row = tl.where(named, entry // PITCH, 0)
            split = tl.where(named, entry % PITCH, PITCH)
    length = tl.load(lens_ptr + row)
    tiles = tl.cdiv(length, TILE)
    if EXTRA:
        part = tl.cdiv(tiles, wanted_parts(tiles, tl.load(extras_ptr), SPLITS, PITCH))
    else:
        part = tl.cdiv(tiles, SPLITS)
    first = split * part
    last = tl.minimum(first + part, tiles)
    table = tables_ptr + row.to(tl.int64) * table_stride
    block = 0
    if BLOCK_SIZE >= TILE:  # noqa: SIM102 - known when compiled, unlike the next
        if first < last:
            block = table_entry(table, first * TILE, BLOCK_SIZE, INTERPRET)
    if PDL:  # so far a step's inputs: no kernel with PDL writes those
        tl.extra.cuda.gdc_wait()

    queries = tl.arange(0, ROWS)
    columns = tl.arange(0, HEAD_DIM)
    keys = tl.arange(0, TILE)
    used = (queries < GROUP)[:, None] & (columns < HEAD_DIM)[None, :]
    out_line = row.to(tl.int64) * NUM_HEADS + kv_head * GROUP + queries
    out_at = out_ptr + out_line[:, None] * HEAD_DIM + columns[None, :]
    if tiles == 0 and split == 0:
        tl.store(out_at, tl.zeros([ROWS, HEAD_DIM], out_ptr.dtype.element_ty), mask=used)
    if first < last:
        q_at = q_ptr + row.to(tl.int64) * q_stride + kv_head * GROUP * HEAD_DIM
        q = tl.load(q_at + queries[:, None] * HEAD_DIM + columns[None, :], mask=used, other=0.0)
        maximum = tl.full([ROWS], -1.0e30, tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        acc = tl.zeros([ROWS, HEAD_DIM], tl.float32)
        head_ptr = kv_ptr + kv_head * HEAD_DIM
        for i in tl.range(first, last, num_stages=STAGES):
            start = i * TILE
            valid = start + keys < length
            if BLOCK_SIZE >= TILE:
                here = block
                following = tl.minimum(i + 1, last - 1) * TILE
                block = table_entry(table, following, BLOCK_SIZE, INTERPRET)
                offsets = tile_offsets(here, start, NUM_KV_HEADS * HEAD_DIM, BLOCK_SIZE, TILE)
            else:
                offsets = key_offsets(
                    table, start, valid, NUM_KV_HEADS * HEAD_DIM, BLOCK_SIZE, TILE
                )
            at = head_ptr + offsets[:, None] + columns[None, :]
            # Beyond the length lie the page's earlier owners: not even NaN may count.
            k = tl.load(at, mask=valid[:, None], other=0.0)
            v_at = at + BLOCK_SIZE * NUM_KV_HEADS * HEAD_DIM
            v = tl.load(v_at, mask=valid[:, None], other=0.0)
            scores = dot(q, tl.trans(k), tl.zeros([ROWS, TILE], tl.float32), INTERPRET) * scale_log2
            scores = tl.where(valid[None, :], scores, -1.0e30)
            highest = tl.maximum(maximum, tl.max(scores, 1))
            weights = tl.exp2(scores - highest[:, None])
            shrink = tl.exp2(maximum - highest)
            total = total * shrink + tl.sum(weights, 1)
            acc = dot(weights.to(v.dtype), v, acc * shrink[:, None], INTERPRET)
            maximum = highest
        parts = tl.cdiv(tiles, part)
        if PITCH == 1:  # noqa: SIM114 - known when compiled, unlike the next
            tl.store(out_at, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=used)
        elif EXTRA and parts == 1:
            tl.store(out_at, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=used)
        else:
            cell = out_line * PITCH + split
            tl.store(partial_ptr + cell[:, None] * HEAD_DIM + columns[None, :], acc, mask=used)
            tl.store(maximum_ptr + cell, maximum, mask=queries < GROUP)
            tl.store(total_ptr + cell, total, mask=queries < GROUP)
            if FUSED:
                # All threads' stores before the one thread's release, its acquire before all
                # threads' loads: the parts were written by programs on other SMs.
                tl.debug_barrier()
                counter = arrived_ptr + row * NUM_KV_HEADS + kv_head
                before = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")
                if before == parts - 1:
                    tl.debug_barrier()
                    tl.store(counter, 0)
                    base = row.to(tl.int64) * NUM_HEADS + kv_head * GROUP
                    for g in tl.static_range(0, GROUP, HEADS_AT_ONCE):
                        _combine_heads(
                            partial_ptr,
                            maximum_ptr,
                            total_ptr,
                            out_ptr,
                            base + g,
                            GROUP - g,
                            parts,
                            HEAD_DIM,
                            PITCH,
                            CHUNK,
                            HEADS_AT_ONCE,
                        )


@triton.jit
def _combine(
    partial_ptr: tl.tensor,
    maximum_ptr: tl.tensor,
    total_ptr: tl.tensor,
    lens_ptr: tl.tensor,
    out_ptr: tl.tensor,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TILE: tl.constexpr,
    SPLITS: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """One program: one head of one row."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(1).to(tl.int64)
    tiles = tl.cdiv(tl.load(lens_ptr + row), TILE)
    if tiles > 0:
        parts = tl.cdiv(tiles, tl.cdiv(tiles, SPLITS))
        line = row * NUM_HEADS + tl.program_id(0)
        _combine_heads(
            partial_ptr,
            maximum_ptr,
            total_ptr,
            out_ptr,
            line,
            1,
            parts,
            HEAD_DIM,
            SPLITS,
            SPLITS,
            1,
        )


@triton.jit
def _combine_heads(
    partial_ptr: tl.tensor,
    maximum_ptr: tl.tensor,
    total_ptr: tl.tensor,
    out_ptr: tl.tensor,
    first_line: tl.tensor,
    num_lines: int,
    parts: tl.tensor,
    HEAD_DIM: tl.constexpr,
    PITCH: tl.constexpr,
    CHUNK: tl.constexpr,
    LINES: tl.constexpr,
) -> None:
    """Lines of `out` from their first `parts` partial results each, the loads of CHUNK at once.

    .cg: past the L1, which does not see what other SMs wrote.
    """
    lines = tl.arange(0, LINES)
    splits = tl.arange(0, PITCH)
    columns = tl.arange(0, HEAD_DIM)
    real = lines < num_lines
    cell = (first_line + lines)[:, None] * PITCH + splits[None, :]
    there = real[:, None] & (splits < parts)[None, :]
    maximum = tl.load(maximum_ptr + cell, mask=there, other=-1.0e30, cache_modifier=".cg")
    total = tl.load(total_ptr + cell, mask=there, other=0.0, cache_modifier=".cg")
    highest = tl.max(maximum, 1)
    # At least 1 in a real line; lines that only fill up the tile have nothing to divide.
    norm = tl.maximum(tl.sum(tl.exp2(maximum - highest[:, None]) * total, 1), 1.0e-30)
    if CHUNK == PITCH:
        summed = _weighted(partial_ptr, cell, there, maximum, highest, columns, HEAD_DIM)
    else:
        summed = tl.zeros([LINES, HEAD_DIM], tl.float32)
        for start in range(0, parts, CHUNK):
            some = start + tl.arange(0, CHUNK)
            at = (first_line + lines)[:, None] * PITCH + some[None, :]
            inside = real[:, None] & (some < parts)[None, :]
            high = tl.load(maximum_ptr + at, mask=inside, other=-1.0e30, cache_modifier=".cg")
            summed += _weighted(partial_ptr, at, inside, high, highest, columns, HEAD_DIM)
    at = out_ptr + (first_line + lines)[:, None] * HEAD_DIM + columns[None, :]
    used = real[:, None] & (columns < HEAD_DIM)[None, :]
    tl.store(at, (summed / norm[:, None]).to(out_ptr.dtype.element_ty), mask=used)


@triton.jit
def _weighted(
    partial_ptr: tl.tensor,
    cell: tl.tensor,
    there: tl.tensor,
    maximum: tl.tensor,
    highest: tl.tensor,
    columns: tl.tensor,
    HEAD_DIM: tl.constexpr,
) -> tl.tensor:
    """[lines, HEAD_DIM]: the sum of the partial results in `cell` [lines, parts], by weight."""
    partial = tl.load(
        partial_ptr + cell[:, :, None] * HEAD_DIM + columns[None, None, :],
        mask=there[:, :, None] & (columns < HEAD_DIM)[None, None, :],
        other=0.0,
        cache_modifier=".cg",
    )
    return tl.sum(partial * tl.exp2(maximum - highest[:, None])[:, :, None], 1)
