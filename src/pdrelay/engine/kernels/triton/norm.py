"""Residual addition and RMSNorm in one kernel."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pdrelay.engine.kernels.triton.launch import num_warps, pdl_flags


def add_rms_norm(
    x: torch.Tensor | None,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    out: torch.Tensor | None = None,
    *,
    residual_out: torch.Tensor | None = None,
    pdl: bool = False,
) -> torch.Tensor:
    """Add x to `residual` [T, H] in place (or into `residual_out`, which then must not overlap it),
    then RMSNorm (Zhang & Sennrich, 2019) of the sum.

    The sum is rounded to the tensors' dtype first, as torch rounds it; the norm is computed from
    the rounded sum in float32 and rounded before and after `weight` [H]. A row's bits depend on
    nothing but the row.
    """
    num_rows, width = residual.shape
    assert residual.stride(1) == 1 and (x is None or x.stride(1) == 1)
    if out is None:
        out = torch.empty((num_rows, width), dtype=residual.dtype, device=residual.device)
    if num_rows == 0:
        return out
    block = triton.next_power_of_2(width)
    _add_rms_norm[(num_rows,)](
        residual if x is None else x,
        residual,
        residual if residual_out is None else residual_out,
        weight,
        out,
        0 if x is None else x.stride(0),
        residual.stride(0),
        residual.stride(0) if residual_out is None else residual_out.stride(0),
        out.stride(0),
        eps,
        WIDTH=width,
        BLOCK=block,
        WITH_X=x is not None,
        STORE=x is not None or residual_out is not None,
        num_warps=num_warps(block, residual.element_size()),
        **pdl_flags(pdl),
    )
    return out


@triton.jit
def _add_rms_norm(
    x_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    residual_out_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    out_ptr: tl.tensor,
    x_stride: int,
    residual_stride: int,
    residual_out_stride: int,
    out_stride: int,
    eps: float,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    WITH_X: tl.constexpr,
    STORE: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0)
    if PDL:
        tl.extra.cuda.gdc_wait()
    total = tl.load(residual_ptr + row * residual_stride + columns, mask=inside, other=0.0)
    if WITH_X:
        x = tl.load(x_ptr + row * x_stride + columns, mask=inside, other=0.0)
        total = (total.to(tl.float32) + x.to(tl.float32)).to(total.dtype)
    if STORE:
        residual_out_at = residual_out_ptr + row * residual_out_stride + columns
        tl.store(residual_out_at, total, mask=inside)
    wide = total.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / WIDTH + eps)
    normed = (wide * scale).to(total.dtype).to(tl.float32) * weight.to(tl.float32)
    tl.store(out_ptr + row * out_stride + columns, normed.to(total.dtype), mask=inside)
