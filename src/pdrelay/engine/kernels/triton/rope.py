"""RoPE, the optional norm of each head, and the write of K and V into the pages, in one kernel."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from pdrelay.engine.kernels.triton.launch import is_power_of_2, num_warps, pdl_flags

_MAX_HEADS = 8  # heads of one program
_MAX_TOKENS = 4  # tokens of one program in a long batch
_LONG_BATCH = 256


def rope_write_kv(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    rope_table: torch.Tensor,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    eps: float,
    kv_layer: torch.Tensor,
    remote_layer: torch.Tensor | None = None,
    remote_slots: torch.Tensor | None = None,
    *,
    keep_keys: bool = False,
    pdl: bool = False,
) -> torch.Tensor:
    """Norm (if given) and rotate q and k of `qkv` [T, (Hq + 2 * Hkv) * D]; store k and v.

    `positions`, `slots`: int64 [T]; slot = block * block_size + offset, -1 writes nothing.
    `rope_table`: float32 [max_position, D], D/2 cosines, then D/2 sines. `q_norm`, `k_norm`: [D],
    both or none. `kv_layer`: [num_blocks, 2, block_size, Hkv, D], contiguous. `remote_layer`: a
    layer of another process's pool, mapped here; it gets the same K and V at `remote_slots`.
    Returns q, rotated in place: the view [T, Hq * D] of qkv; k too with `keep_keys`, for attention
    that reads a fresh prompt's keys there.
    """
    num_rows, width = qkv.shape
    block_size, num_kv_heads, head_dim = kv_layer.shape[2:]
    num_heads = width // head_dim - 2 * num_kv_heads
    assert is_power_of_2(head_dim) and qkv.stride(1) == 1 and kv_layer.is_contiguous()
    assert positions.dtype == slots.dtype == torch.int64
    assert (q_norm is None) == (k_norm is None)
    assert (remote_layer is None) == (remote_slots is None)
    if remote_layer is not None and remote_slots is not None:
        assert remote_layer.is_contiguous() and remote_layer.shape[1:] == kv_layer.shape[1:]
        assert remote_layer.dtype == kv_layer.dtype and remote_slots.dtype == torch.int64
    q = qkv[:, : num_heads * head_dim]
    if num_rows == 0:
        return q
    # Each program's heads are all queries, all keys or all values.
    heads = math.gcd(math.gcd(num_heads, num_kv_heads), _MAX_HEADS)
    tokens = _MAX_TOKENS if num_rows >= _LONG_BATCH else 1
    grid = (triton.cdiv(num_rows, tokens), (num_heads + 2 * num_kv_heads) // heads)
    _rope_write_kv[grid](
        qkv,
        positions,
        slots,
        rope_table,
        rope_table if q_norm is None else q_norm,
        rope_table if k_norm is None else k_norm,
        eps,
        kv_layer,
        kv_layer if remote_layer is None else remote_layer,
        slots if remote_slots is None else remote_slots,
        num_rows,
        qkv.stride(0),
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        HEADS=heads,
        TOKENS=tokens,
        WITH_NORM=q_norm is not None,
        REMOTE=remote_layer is not None,
        KEEP_KEYS=keep_keys,
        num_warps=num_warps(tokens * heads * head_dim // 2, qkv.element_size(), most=8),
        **pdl_flags(pdl),
    )
    return q


@triton.jit(do_not_specialize=["num_rows"])
def _rope_write_kv(
    qkv_ptr: tl.tensor,
    positions_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    table_ptr: tl.tensor,
    q_norm_ptr: tl.tensor,
    k_norm_ptr: tl.tensor,
    eps: float,
    kv_ptr: tl.tensor,
    # Another process's pages. A typed argument on purpose: through a pointer that was itself
    # loaded from memory, Triton would store 2 bytes at a time.
    remote_ptr: tl.tensor,
    remote_slots_ptr: tl.tensor,
    num_rows: int,
    qkv_stride: int,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    TOKENS: tl.constexpr,
    WITH_NORM: tl.constexpr,
    REMOTE: tl.constexpr,
    KEEP_KEYS: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    HALF: tl.constexpr = HEAD_DIM // 2
    first_head = tl.program_id(1) * HEADS
    rows = tl.arange(0, TOKENS * HEADS)  # (token, head) pairs
    token = tl.program_id(0) * TOKENS + rows // HEADS
    head = first_head + rows % HEADS
    real = token < num_rows
    columns = tl.arange(0, HALF)
    inside = real[:, None] & (columns < HALF)[None, :]
    at = qkv_ptr + token.to(tl.int64)[:, None] * qkv_stride
    at += head[:, None] * HEAD_DIM + columns[None, :]
    low = tl.load(at, mask=inside, other=0.0)
    high = tl.load(at + HALF, mask=inside, other=0.0)
    if first_head < NUM_HEADS + NUM_KV_HEADS:
        if WITH_NORM:
            norm_ptr = q_norm_ptr if first_head < NUM_HEADS else k_norm_ptr
            wide_low, wide_high = low.to(tl.float32), high.to(tl.float32)
            squares = tl.sum(wide_low * wide_low + wide_high * wide_high, 1) / HEAD_DIM
            scale = tl.rsqrt(squares + eps)[:, None]
            low_weight = tl.load(norm_ptr + columns).to(tl.float32)[None, :]
            high_weight = tl.load(norm_ptr + HALF + columns).to(tl.float32)[None, :]
            low = ((wide_low * scale).to(low.dtype).to(tl.float32) * low_weight).to(low.dtype)
            high = ((wide_high * scale).to(high.dtype).to(tl.float32) * high_weight).to(high.dtype)
        position = tl.load(positions_ptr + token, mask=real, other=0)
        angle = table_ptr + position[:, None] * HEAD_DIM + columns[None, :]
        cos, sin = tl.load(angle), tl.load(angle + HALF)
        a, b = low.to(tl.float32), high.to(tl.float32)
        low = (a * cos - b * sin).to(low.dtype)
        high = (b * cos + a * sin).to(high.dtype)
    if first_head < NUM_HEADS + NUM_KV_HEADS * KEEP_KEYS:
        tl.store(at, low, mask=inside)
        tl.store(at + HALF, high, mask=inside)
    if first_head >= NUM_HEADS:
        # 0: keys, 1: values.
        plane = (first_head - NUM_HEADS) // NUM_KV_HEADS
        kv_head = head - NUM_HEADS - plane * NUM_KV_HEADS
        slot = tl.load(slots_ptr + token, mask=real, other=-1)
        _store(kv_ptr, slot, plane, kv_head, low, high, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE)
        if REMOTE:
            far = tl.load(remote_slots_ptr + token, mask=real, other=-1)
            _store(remote_ptr, far, plane, kv_head, low, high, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE)


@triton.jit
def _store(
    pages_ptr: tl.tensor,
    slot: tl.tensor,
    plane: int,
    kv_head: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
) -> None:
    """Rows `low`, `high` [R, D/2] to the pages' slots; negative slots are left out."""
    HALF: tl.constexpr = HEAD_DIM // 2
    columns = tl.arange(0, HALF)
    wanted = (slot >= 0)[:, None] & (columns < HALF)[None, :]
    line = (slot // BLOCK_SIZE * 2 + plane) * BLOCK_SIZE + slot % BLOCK_SIZE
    at = pages_ptr + (line * NUM_KV_HEADS + kv_head)[:, None] * HEAD_DIM + columns[None, :]
    tl.store(at, low.to(pages_ptr.dtype.element_ty), mask=wanted)
    tl.store(at + HALF, high.to(pages_ptr.dtype.element_ty), mask=wanted)
