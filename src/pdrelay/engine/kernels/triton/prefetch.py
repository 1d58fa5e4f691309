"""Memory to L2 ahead of its use, without registers or waiting."""

from __future__ import annotations

import triton
import triton.language as tl

_PIECE = tl.constexpr(1024)  # bytes one thread asks for: a multiple of 16
_PIECES = tl.constexpr(128)


@triton.jit
def prefetch(start: tl.tensor, COUNT: tl.constexpr) -> None:
    """Ask the L2 for COUNT elements from `start` (16-byte aligned); the last part of less than a
    KiB is left out. sm_90's bulk prefetch; not for the interpreter.
    """
    SIZE: tl.constexpr = start.dtype.element_ty.primitive_bitwidth // 8
    NUM: tl.constexpr = COUNT * SIZE // _PIECE
    piece = tl.arange(0, _PIECES)
    for first in tl.static_range(0, NUM, _PIECES):
        # Threads past the end ask for the last piece once more.
        offset = tl.minimum(first + piece, NUM - 1).to(tl.int64) * _PIECE
        tl.inline_asm_elementwise(
            "cp.async.bulk.prefetch.L2.global [$1], 1024; mov.u32 $0, 0;",
            "=r,l",
            [start.to(tl.int64) + offset],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
