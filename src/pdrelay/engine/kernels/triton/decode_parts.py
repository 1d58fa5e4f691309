"""Which rows of a decode batch are cut finer than the rest: no program may be the last by far.

The decode kernel's grid has `num_splits` programs a row and KV head, by batch bucket
(`split_rule`). With rows of like lengths that fills the GPU evenly. One row of 8,192 tokens among
16 of 900 does not: its programs run on when all others have ended (a step of 8.5 ms instead of 4.9;
Llama-3.1-8B shape, H200, docs/LOG.md 2026-11-24). Here a kernel looks at the lengths once a step,
on the device so that CUDA graphs stay valid, and names the parts that rows too long get beyond
`num_splits`. The grid has slots for them: as many as there can be, since a row is cut only where
its parts are longer than a fixed share of what each SM has to read.

Launched without PDL: the decode kernel reads the parts before it waits (`launch.py`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pdrelay.engine.kernels.triton.split_rule import (
    MAX_SPLITS,
    SHARES_PER_SM,
    TILE,
    least_part,
    most_extra_parts,
)

HEADER = 2  # words before the entries: tiles that a part may have, and how many entries there are


def extra_parts(
    seq_lens: torch.Tensor,
    num_splits: int,
    num_kv_heads: int,
    num_sms: int,
    *,
    least: int | None = None,
    shares: int = SHARES_PER_SM,
) -> torch.Tensor:
    """int32 [HEADER + slots] for `paged_decode` of these `seq_lens`, int32 [B], 0 for padding rows.

    Entry: row * MAX_SPLITS + part, part >= `num_splits`. `least` tiles a part: by `least_part`
    unless given. One launch on the current stream.
    """
    assert seq_lens.dtype == torch.int32 and seq_lens.is_contiguous()
    assert shares <= SHARES_PER_SM
    slots = most_extra_parts(num_kv_heads, num_sms)
    words = torch.empty(HEADER + slots, dtype=torch.int32, device=seq_lens.device)
    batch = seq_lens.shape[0]
    _name_parts[(1,)](
        seq_lens,
        words,
        batch,
        num_kv_heads,
        shares * num_sms,
        LEAST=least_part(num_splits) if least is None else least,
        TILE=TILE,
        SPLITS=num_splits,
        MAX_SPLITS=MAX_SPLITS,
        HEADER=HEADER,
        ROWS=triton.next_power_of_2(batch),
        num_warps=4,
    )
    return words


@triton.jit
def wanted_parts(
    tiles: tl.tensor, limit: tl.tensor, SPLITS: tl.constexpr, MAX_SPLITS: tl.constexpr
) -> tl.tensor:
    """How many parts a row of so many tiles is cut into, if it has as many tiles."""
    return tl.maximum(SPLITS, tl.minimum(MAX_SPLITS, tl.cdiv(tiles, limit)))


@triton.jit(do_not_specialize=["batch", "num_kv_heads", "shares"])
def _name_parts(
    lens_ptr: tl.tensor,
    words_ptr: tl.tensor,
    batch: int,
    num_kv_heads: int,
    shares: int,
    LEAST: tl.constexpr,
    TILE: tl.constexpr,
    SPLITS: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    HEADER: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    rows = tl.arange(0, ROWS)
    tiles = tl.cdiv(tl.load(lens_ptr + rows, mask=rows < batch, other=0), TILE)
    share = tl.cdiv(tl.sum(tiles, 0) * num_kv_heads, shares)
    limit = tl.maximum(share, LEAST)
    part = tl.maximum(tl.cdiv(tiles, wanted_parts(tiles, limit, SPLITS, MAX_SPLITS)), 1)
    extras = tl.maximum(tl.cdiv(tiles, part) - SPLITS, 0)
    first = tl.cumsum(extras, 0) - extras
    columns = tl.arange(0, MAX_SPLITS)
    entry = rows[:, None] * MAX_SPLITS + SPLITS + columns[None, :]
    at = words_ptr + HEADER + first[:, None] + columns[None, :]
    tl.store(at, entry, mask=columns[None, :] < extras[:, None])
    tl.store(words_ptr, limit)
    tl.store(words_ptr + 1, tl.sum(extras, 0))
