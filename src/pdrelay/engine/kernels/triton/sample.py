"""Greedy choice on the device, without waiting for it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pdrelay.engine.kernels.triton.launch import pdl_flags

_PART = 4096


class ArgmaxWorkspace:
    """Each part's best of up to `max_batch` rows; launches on one stream may share it."""

    def __init__(self, max_batch: int, vocab_size: int, device: torch.device | str) -> None:
        cells = max_batch * triton.cdiv(vocab_size, _PART)
        self.value = torch.empty(cells, dtype=torch.float32, device=device)
        self.index = torch.empty(cells, dtype=torch.int32, device=device)


def argmax_rows(
    logits: torch.Tensor,
    out: torch.Tensor | None = None,
    workspace: ArgmaxWorkspace | None = None,
    *,
    pdl: bool = False,
) -> torch.Tensor:
    """The lowest id of each row's greatest logit: [B, V] bfloat16 or float32 -> int64 [B].

    NaN is never chosen before a number.
    """
    batch, vocab_size = logits.shape
    assert logits.stride(1) == 1 and vocab_size > 0
    if out is None:
        out = torch.empty(batch, dtype=torch.int64, device=logits.device)
    if batch == 0:
        return out
    parts = triton.cdiv(vocab_size, _PART)
    if workspace is None:
        workspace = ArgmaxWorkspace(batch, vocab_size, logits.device)
    assert workspace.value.numel() >= batch * parts
    best, flags = (workspace.value, workspace.index), pdl_flags(pdl)
    _best_of_parts[(parts, batch)](
        logits, *best, vocab_size, logits.stride(0), PART=_PART, num_warps=8, **flags
    )
    _best_of_row[(batch,)](
        *best, out, parts, PARTS=triton.next_power_of_2(parts), num_warps=1, **flags
    )
    return out


@triton.jit
def _best_of_parts(
    logits_ptr: tl.tensor,
    value_ptr: tl.tensor,
    index_ptr: tl.tensor,
    vocab_size: int,
    stride: int,
    PART: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """One program: PART logits of one row."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    part, row = tl.program_id(0), tl.program_id(1)
    ids = part * PART + tl.arange(0, PART)
    row_ptr = logits_ptr + row.to(tl.int64) * stride
    values = tl.load(row_ptr + ids, mask=ids < vocab_size, other=-float("inf")).to(tl.float32)
    values = tl.where(values == values, values, -float("inf"))
    best = tl.max(values, 0)
    cell = row * tl.num_programs(0) + part
    tl.store(value_ptr + cell, best)
    tl.store(index_ptr + cell, tl.min(tl.where(values == best, ids, 2147483647), 0))


@triton.jit
def _best_of_row(
    value_ptr: tl.tensor,
    index_ptr: tl.tensor,
    out_ptr: tl.tensor,
    num_parts: int,
    PARTS: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """One program: one row."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0)
    parts = tl.arange(0, PARTS)
    inside = parts < num_parts
    values = tl.load(value_ptr + row * num_parts + parts, mask=inside, other=-float("inf"))
    ids = tl.load(index_ptr + row * num_parts + parts, mask=inside, other=2147483647)
    best = tl.max(values, 0)
    token = tl.min(tl.where(values == best, ids, 2147483647), 0)
    tl.store(out_ptr + row, token.to(tl.int64))
