"""A read-only stream over device memory: what decode's weights could be read at, at best."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK = 4096
_LOADS = 8  # of a block each, in flight together


def read_stream(data: torch.Tensor, out: torch.Tensor) -> None:
    """Read int32 `data`, a multiple of 32,768 elements, once; `out` float32 [1] stays as it is."""
    assert data.numel() % (_BLOCK * _LOADS) == 0
    _read[(data.numel() // (_BLOCK * _LOADS),)](data, out, BLOCK=_BLOCK, LOADS=_LOADS, num_warps=8)


@triton.jit
def _read(data_ptr: tl.tensor, out_ptr: tl.tensor, BLOCK: tl.constexpr, LOADS: tl.constexpr):  # noqa: ANN202
    start = tl.program_id(0).to(tl.int64) * BLOCK * LOADS
    total = tl.zeros([BLOCK], tl.int32)
    for i in tl.static_range(LOADS):
        total ^= tl.load(data_ptr + start + i * BLOCK + tl.arange(0, BLOCK))
    if tl.max(total, 0) == 0x7FFFFFF1:  # of no data that there is: keeps the loads alive
        tl.store(out_ptr, 1.0)
