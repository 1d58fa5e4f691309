"""One-shot all-reduce, residual addition and RMSNorm in one kernel, for the rows of a decode step.

The exchange is that of `all_reduce.py`, with one program a row, so that the norm finds its row in
the program's registers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pdrelay.engine.kernels.triton.all_reduce import (
    DTYPES,
    PACKET_BYTES,
    Exchange,
    begin_exchange,
    end_exchange,
)
from pdrelay.engine.kernels.triton.launch import WARP, interpreting, pdl_flags
from pdrelay.engine.kernels.triton.packets import at_lane, lane, packets_at, receive

_MAX_WARPS = 32


def block_of(width: int, dtype: torch.dtype) -> int:
    """Packets of a program, `Exchange.block`, for rows of `width` numbers."""
    packets: int = triton.next_power_of_2(width * dtype.itemsize // PACKET_BYTES)
    return max(WARP, packets)


def reduce_add_rms_norm(
    exchange: Exchange,
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    out: torch.Tensor,
    *,
    phase: str = "both",
) -> None:
    """Add the sum of all ranks' `x` to `residual` in place, then RMSNorm of the residual to `out`.

    x, residual, out: [T, H], contiguous, whole packets a row; weight: [H]; one dtype. Rounds where
    `all_reduce.py` and `norm.add_rms_norm` round. `exchange` is for this alone, with
    `block_of(H)`. `phase`: as in `Exchange`.
    """
    num_rows, width = x.shape
    assert x.is_contiguous() and residual.is_contiguous() and out.is_contiguous()
    assert x.dtype == residual.dtype == weight.dtype == out.dtype
    assert width * x.element_size() % PACKET_BYTES == 0
    assert exchange.block == block_of(width, x.dtype)
    assert 0 < num_rows * exchange.block * PACKET_BYTES <= exchange.max_bytes
    assert phase == "both" or interpreting()
    _exchange_add_rms_norm[(num_rows,)](
        _packets(x),
        _packets(residual),
        _packets(weight),
        _packets(out),
        exchange.inboxes,
        exchange.state,
        exchange.failed,
        exchange.timeout_us,
        eps,
        WIDTH=width * x.element_size() // PACKET_BYTES,
        RANK=exchange.rank,
        WORLD=exchange.world_size,
        DTYPE=DTYPES[x.dtype],
        SEND=phase != "receive",
        RECEIVE=phase != "send",
        SIZE=exchange.block,
        INTERPRET=interpreting(),
        num_warps=min(_MAX_WARPS, exchange.block // WARP),
        **pdl_flags(exchange.pdl),
    )


def _packets(x: torch.Tensor) -> torch.Tensor:
    return x.view(-1).view(torch.int64)


@triton.jit(do_not_specialize=["timeout_us"])
def _exchange_add_rms_norm(
    x_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    out_ptr: tl.tensor,
    inboxes_ptr: tl.tensor,
    state_ptr: tl.tensor,
    failed_ptr: tl.tensor,
    timeout_us: int,
    eps: float,
    WIDTH: tl.constexpr,
    RANK: tl.constexpr,
    WORLD: tl.constexpr,
    DTYPE: tl.constexpr,
    SEND: tl.constexpr,
    RECEIVE: tl.constexpr,
    SIZE: tl.constexpr,
    INTERPRET: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """One program: one row. WIDTH: its packets."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0)
    places = tl.arange(0, SIZE)
    inside = places < WIDTH
    own_inbox = tl.load(inboxes_ptr + RANK)
    weight = tl.load(weight_ptr + places, mask=inside, other=0)
    if PDL:
        tl.extra.cuda.gdc_wait()
    x_at = x_ptr + row * WIDTH + places
    mine, flag, place, lost = begin_exchange(
        x_at, inside, inboxes_ptr, state_ptr, RANK, WORLD, SEND, SIZE, INTERPRET
    )
    if RECEIVE:
        residual = tl.load(residual_ptr + row * WIDTH + places, mask=inside, other=0)
        LANES: tl.constexpr = 64 // DTYPE.primitive_bitwidth
        patience = tl.where(lost != 0, 0, timeout_us).to(tl.int64) * 1000
        late = tl.zeros((SIZE,), tl.int32)
        sum0 = tl.zeros((SIZE,), tl.float32)
        sum1 = tl.zeros((SIZE,), tl.float32)
        sum2 = tl.zeros((SIZE,), tl.float32)
        sum3 = tl.zeros((SIZE,), tl.float32)
        for source in tl.static_range(WORLD):
            if source == RANK:
                value = mine
            else:
                value, silent = receive(
                    packets_at(own_inbox, place + source, SIZE), flag, patience, INTERPRET
                )
                late = late | silent
            sum0 += lane(value, 0, DTYPE)
            sum1 += lane(value, 1, DTYPE)
            if LANES == 4:
                sum2 += lane(value, 2, DTYPE)
                sum3 += lane(value, 3, DTYPE)
        sum0 = _rounded(_rounded(sum0, DTYPE) + lane(residual, 0, DTYPE), DTYPE)
        sum1 = _rounded(_rounded(sum1, DTYPE) + lane(residual, 1, DTYPE), DTYPE)
        total = at_lane(sum0, 0, DTYPE) | at_lane(sum1, 1, DTYPE)
        squares = sum0 * sum0 + sum1 * sum1
        if LANES == 4:
            sum2 = _rounded(_rounded(sum2, DTYPE) + lane(residual, 2, DTYPE), DTYPE)
            sum3 = _rounded(_rounded(sum3, DTYPE) + lane(residual, 3, DTYPE), DTYPE)
            total |= at_lane(sum2, 2, DTYPE) | at_lane(sum3, 3, DTYPE)
            squares += sum2 * sum2 + sum3 * sum3
        tl.store(residual_ptr + row * WIDTH + places, total, mask=inside)
        squares = tl.where(inside, squares, 0.0)
        scale = tl.rsqrt(tl.sum(squares, 0) / (WIDTH * LANES) + eps)
        normed = at_lane(_rounded(sum0 * scale, DTYPE) * lane(weight, 0, DTYPE), 0, DTYPE)
        normed |= at_lane(_rounded(sum1 * scale, DTYPE) * lane(weight, 1, DTYPE), 1, DTYPE)
        if LANES == 4:
            normed |= at_lane(_rounded(sum2 * scale, DTYPE) * lane(weight, 2, DTYPE), 2, DTYPE)
            normed |= at_lane(_rounded(sum3 * scale, DTYPE) * lane(weight, 3, DTYPE), 3, DTYPE)
        tl.store(out_ptr + row * WIDTH + places, normed, mask=inside)
        end_exchange(state_ptr, failed_ptr, flag, late)


@triton.jit
def _rounded(x: tl.tensor, DTYPE: tl.constexpr) -> tl.tensor:
    return x.to(DTYPE).to(tl.float32)
