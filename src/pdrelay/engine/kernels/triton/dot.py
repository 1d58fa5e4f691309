"""tl.dot as every kernel here uses it."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def dot(a: tl.tensor, b: tl.tensor, acc: tl.tensor, UPCAST: tl.constexpr) -> tl.tensor:
    """acc + a @ b in float32. `UPCAST`: for the interpreter, whose dot takes bfloat16 for integers;
    the products of bfloat16 numbers are the same in float32.
    """
    if UPCAST:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(a, b, acc, input_precision="ieee")
