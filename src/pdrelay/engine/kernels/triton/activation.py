"""SiLU of the gate times the up projection."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pdrelay.engine.kernels.triton.launch import num_warps, pdl_flags

_BLOCK = 1024


def silu_mul(
    gate_up: torch.Tensor, out: torch.Tensor | None = None, *, pdl: bool = False
) -> torch.Tensor:
    """[T, 2 * I] -> silu(first half) * second half, [T, I]; rounded after each, as torch does."""
    num_rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    assert gate_up.stride(1) == 1
    if out is None:
        out = torch.empty((num_rows, width), dtype=gate_up.dtype, device=gate_up.device)
    if num_rows == 0:
        return out
    _silu_mul[(num_rows, triton.cdiv(width, _BLOCK))](
        gate_up,
        out,
        gate_up.stride(0),
        out.stride(0),
        WIDTH=width,
        BLOCK=_BLOCK,
        num_warps=num_warps(_BLOCK, gate_up.element_size()),
        **pdl_flags(pdl),
    )
    return out


@triton.jit
def _silu_mul(
    gate_up_ptr: tl.tensor,
    out_ptr: tl.tensor,
    gate_up_stride: int,
    out_stride: int,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < WIDTH
    gate_at = gate_up_ptr + row * gate_up_stride + columns
    gate = tl.load(gate_at, mask=inside, other=0.0)
    up = tl.load(gate_at + WIDTH, mask=inside, other=0.0)
    wide = gate.to(tl.float32)
    activated = (wide / (1.0 + tl.exp(-wide))).to(gate.dtype)
    product = activated.to(tl.float32) * up.to(tl.float32)
    tl.store(out_ptr + row * out_stride + columns, product.to(gate.dtype), mask=inside)
