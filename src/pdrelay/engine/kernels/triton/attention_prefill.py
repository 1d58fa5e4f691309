"""Causal attention of a prompt's chunk to the pages of its prefix and its own (FlashAttention-2:
Dao, 2023). For chunks behind a prefix; fresh prompts have faster paths in torch.

Bits: a query's result depends on its own keys and on `rows`, not on the chunk's length; only if
its place within a tile of `rows` queries differs may the order of its sums.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pdrelay.engine.kernels.triton.dot import dot
from pdrelay.engine.kernels.triton.launch import interpreting, is_power_of_2
from pdrelay.engine.kernels.triton.pages import key_offsets

_LOG2_E = 1.4426950408889634
_TILE = 64  # keys of one step


def paged_prefill(
    q: torch.Tensor,
    kv_layer: torch.Tensor,
    block_table: torch.Tensor,
    context_len: int,
    scale: float,
    out: torch.Tensor | None = None,
    *,
    rows: int = 128,
    stages: int = 3,
    warps: int = 8,
) -> torch.Tensor:
    """[T, Hq * D] of `q` [T, Hq * D] (rows may be strided), the tokens at context_len .. + T.

    `kv_layer`: [num_blocks, 2, block_size, Hkv, D], the chunk's own K and V written; `block_table`:
    int32 [W], covers prefix and chunk. Query i sees context_len + i + 1 keys.
    """
    num_rows = q.shape[0]
    block_size, num_kv_heads, head_dim = kv_layer.shape[2:]
    num_heads = q.shape[1] // head_dim
    assert q.stride(1) == 1 and kv_layer.is_contiguous() and is_power_of_2(head_dim)
    assert is_power_of_2(block_size) and block_table.dtype == torch.int32
    assert block_table.is_contiguous() and context_len >= 0
    assert block_table.numel() * block_size >= context_len + num_rows
    if out is None:
        out = torch.empty((num_rows, num_heads * head_dim), dtype=q.dtype, device=q.device)
    if num_rows == 0:
        return out
    rows = max(16, min(rows, triton.next_power_of_2(num_rows)))
    # The longest tiles first: the last of them would else run alone.
    _prefill[(num_heads, triton.cdiv(num_rows, rows))](
        q,
        kv_layer,
        block_table,
        out,
        num_rows,
        context_len,
        q.stride(0),
        out.stride(0),
        scale * _LOG2_E,
        GROUP=num_heads // num_kv_heads,
        WIDTH=num_kv_heads * head_dim,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        ROWS=rows,
        TILE=_TILE,
        STAGES=stages,
        UPCAST=interpreting(),
        num_warps=warps if rows >= 128 else 4,
    )
    return out


@triton.jit(do_not_specialize=["num_rows", "context_len"])
def _prefill(
    q_ptr: tl.tensor,
    kv_ptr: tl.tensor,
    table_ptr: tl.tensor,
    out_ptr: tl.tensor,
    num_rows: int,
    context_len: int,
    q_stride: int,
    out_stride: int,
    scale_log2: float,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    STAGES: tl.constexpr,
    UPCAST: tl.constexpr,
) -> None:
    """One program: ROWS queries of one head."""
    head = tl.program_id(0)
    first_row = (tl.num_programs(1) - 1 - tl.program_id(1)) * ROWS
    rows = first_row + tl.arange(0, ROWS)
    columns = tl.arange(0, HEAD_DIM)
    real = (rows < num_rows)[:, None] & (columns < HEAD_DIM)[None, :]
    q_at = q_ptr + rows.to(tl.int64)[:, None] * q_stride + head * HEAD_DIM + columns[None, :]
    q = tl.load(q_at, mask=real, other=0.0)
    head_ptr = kv_ptr + (head // GROUP) * HEAD_DIM
    maximum = tl.full([ROWS], -1.0e30, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, HEAD_DIM], tl.float32)
    # Tiles before `seen` are visible to every query; behind `end` there is none to see.
    seen = (context_len + first_row + 1) // TILE * TILE
    end = context_len + tl.minimum(first_row + ROWS, num_rows)
    for start in tl.range(0, seen, TILE, num_stages=STAGES):
        maximum, total, acc = _attend(
            q, head_ptr, table_ptr, start, end, context_len + rows, scale_log2, maximum, total, acc,
            WIDTH, HEAD_DIM, BLOCK_SIZE, ROWS, TILE, False, UPCAST,
        )  # fmt: skip
    for start in tl.range(seen, end, TILE, num_stages=STAGES):
        maximum, total, acc = _attend(
            q, head_ptr, table_ptr, start, end, context_len + rows, scale_log2, maximum, total, acc,
            WIDTH, HEAD_DIM, BLOCK_SIZE, ROWS, TILE, True, UPCAST,
        )  # fmt: skip
    out_at = out_ptr + rows.to(tl.int64)[:, None] * out_stride + head * HEAD_DIM + columns[None, :]
    tl.store(out_at, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=real)


@triton.jit
def _attend(
    q: tl.tensor,
    head_ptr: tl.tensor,
    table_ptr: tl.tensor,
    start: tl.tensor,
    end: tl.tensor,
    positions: tl.tensor,
    scale_log2: float,
    maximum: tl.tensor,
    total: tl.tensor,
    acc: tl.tensor,
    WIDTH: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    MASKED: tl.constexpr,
    UPCAST: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """The running softmax with one tile of keys more."""
    keys = start + tl.arange(0, TILE)
    columns = tl.arange(0, HEAD_DIM)
    valid = keys < end
    offsets = key_offsets(table_ptr, start, valid, WIDTH, BLOCK_SIZE, TILE)
    at = head_ptr + offsets[:, None] + columns[None, :]
    if MASKED:
        # Beyond the end lie the page's earlier owners: not even NaN may count.
        k = tl.load(at, mask=valid[:, None], other=0.0)
        v = tl.load(at + BLOCK_SIZE * WIDTH, mask=valid[:, None], other=0.0)
    else:
        k = tl.load(at)
        v = tl.load(at + BLOCK_SIZE * WIDTH)
    scores = dot(q, tl.trans(k), tl.zeros([ROWS, TILE], tl.float32), UPCAST) * scale_log2
    if MASKED:
        visible = (keys[None, :] <= positions[:, None]) & valid[None, :]
        scores = tl.where(visible, scores, -1.0e30)
    highest = tl.maximum(maximum, tl.max(scores, 1))
    weights = tl.exp2(scores - highest[:, None])
    shrink = tl.exp2(maximum - highest)
    total = total * shrink + tl.sum(weights, 1)
    acc = dot(weights.to(v.dtype), v, acc * shrink[:, None], UPCAST)
    return highest, total, acc
