"""Linear layers of at most MAX_ROWS rows, where reading the weights is all the work.

Two kernels over [N, K] weights, each program owning some output features and all of K, so that no
sum crosses programs: bits depend on the row and the tuning alone, not on which rows are beside it.
- vector: one row. Weights go from memory to registers, multiply-adds to the plain cores. It can
  add the residual and take the RMSNorm on the way: the scale of the norm is a factor of the whole
  row, so that it multiplies the sums, and every program sums the squares as it goes.
- dot: any number of rows, on the tensor cores, weights staged through shared memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from pdrelay.engine.kernels.triton.dot import dot
from pdrelay.engine.kernels.triton.launch import interpreting, pdl_flags
from pdrelay.engine.kernels.triton.norm import add_rms_norm
from pdrelay.engine.kernels.triton.prefetch import prefetch
from pdrelay.engine.kernels.triton.split_rule import fills_waves

MAX_ROWS = 64
_DOT_ROWS = 16  # the least a tensor core takes
_DOT_COLUMNS = 256
_MOST_STAGES = 6
_PAIRED_FEATURES = 64  # outputs of a program that reads gate and up
_SHARED_BYTES = 200 << 10  # of 227 KiB an SM has for one program
_FEWEST_COLUMNS, _MOST_COLUMNS = 256, 2048


@dataclass(frozen=True)
class LinearTuning:
    """`features` outputs a program, `columns` of K a step (powers of two). `stages`: depth of the
    dot kernel's pipeline. `prefetch`: under PDL, the vector kernel asks the L2 for its weights
    before it waits for the kernel ahead.
    """

    kernel: str  # "vector" or "dot"
    features: int
    columns: int
    warps: int
    stages: int = 1
    prefetch: bool = False


def default_tuning(
    num_rows: int, out_features: int, in_features: int, paired: bool = False
) -> LinearTuning:
    """By shape alone. `paired`: an output needs two rows of weights, gate's and up's."""
    if num_rows > 1 and paired:
        if num_rows <= _DOT_ROWS:
            return LinearTuning("dot", _PAIRED_FEATURES, 256, warps=8, stages=3)
        return LinearTuning("dot", _PAIRED_FEATURES, 128, warps=4, stages=4)
    if num_rows > 1:
        features = 32 if out_features >= 32 * 128 else 16
        # So deep that an SM holds one program: under PDL, programs that come while the kernel ahead
        # runs out would gather on the SMs that are free first, and leave the others idle.
        lines = _dot_rows_of(num_rows) + features
        stages = min(_MOST_STAGES, _SHARED_BYTES // (lines * _DOT_COLUMNS * 2))
        return LinearTuning("dot", features, _DOT_COLUMNS, warps=4, stages=stages)
    # The greatest power of two that divides K: its low bit.
    columns = min(_MOST_COLUMNS, in_features & -in_features)
    if columns < _FEWEST_COLUMNS:
        columns = min(_MOST_COLUMNS, triton.next_power_of_2(in_features))
    features = 2 if paired else 4
    return LinearTuning("vector", features, columns, warps=max(1, min(8, columns // 256)))


def _dot_rows_of(num_rows: int) -> int:
    rows: int = triton.next_power_of_2(num_rows)
    return max(_DOT_ROWS, rows)


_MOST_FEATURES = 1 << 16


def beats_cublas(num_rows: int, out_features: int, num_sms: int) -> bool:
    """One row: always. More: where the dot kernel's programs, one an SM, fill their waves, but for
    the vocabulary's (a step of 16 rows of the 8B shape: 4.91 ms with it, 4.83 without; H200,
    docs/LOG.md 2026-11-30)."""
    if num_rows == 1:
        return True
    if out_features > _MOST_FEATURES:
        return False
    features = default_tuning(num_rows, out_features, _FEWEST_COLUMNS).features
    return fills_waves(triton.cdiv(out_features, features), num_sms)


def gate_up_beats_cublas(num_rows: int, out_features: int, num_sms: int) -> bool:
    """Whether gate_up_silu is faster than cuBLAS and an activation kernel, of 1 to MAX_ROWS rows.

    With 0.85 of the waves filled it was, by 4 to 7 us of 65 at 8, 32 and 64 rows (H200, the 8B
    shape, `benchmarks/gpu_kernels.py`).
    """
    if num_rows == 1:
        return True
    return fills_waves(triton.cdiv(out_features, _PAIRED_FEATURES), num_sms, least=0.8)


def linear_small(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    *,
    tuning: LinearTuning | None = None,
    pdl: bool = False,
) -> torch.Tensor:
    """[M, K] @ [N, K].T + [N] -> [M, N], summed in float32; M at most MAX_ROWS."""
    return _launch(x, None, None, 0.0, weight, bias, None, out, tuning, pdl, silu=False)


def gate_up_silu(
    x: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor | None = None,
    *,
    tuning: LinearTuning | None = None,
    pdl: bool = False,
) -> torch.Tensor:
    """silu(gate) * up -> [M, I], where (gate, up) = [M, K] @ `weight` [2 * I, K].T, unrounded."""
    return _launch(x, None, None, 0.0, weight, None, None, out, tuning, pdl, silu=True)


def norm_linear(
    x: torch.Tensor | None,
    residual: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual_out: torch.Tensor,
    out: torch.Tensor | None = None,
    *,
    tuning: LinearTuning | None = None,
    pdl: bool = False,
) -> torch.Tensor:
    """linear_small of RMSNorm(residual + x).

    The sum, rounded to its dtype, goes to `residual_out` [M, K], which must be neither `residual`
    nor `x`: programs read those for as long as the kernel runs. With more than one row the norm is
    a kernel of its own.
    """
    return _launch(
        x, residual, norm_weight, eps, weight, bias, residual_out, out, tuning, pdl, silu=False
    )


def norm_gate_up_silu(
    x: torch.Tensor | None,
    residual: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    weight: torch.Tensor,
    residual_out: torch.Tensor,
    out: torch.Tensor | None = None,
    *,
    tuning: LinearTuning | None = None,
    pdl: bool = False,
) -> torch.Tensor:
    """gate_up_silu of RMSNorm(residual + x), which goes to `residual_out` as in norm_linear."""
    return _launch(
        x, residual, norm_weight, eps, weight, None, residual_out, out, tuning, pdl, silu=True
    )


def _launch(
    x: torch.Tensor | None,
    residual: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    eps: float,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual_out: torch.Tensor | None,
    out: torch.Tensor | None,
    tuning: LinearTuning | None,
    pdl: bool,
    *,
    silu: bool,
) -> torch.Tensor:
    first = x if residual is None else residual
    assert first is not None and first.stride(1) == 1 and weight.is_contiguous()
    num_rows, in_features = first.shape
    out_features = weight.shape[0] // 2 if silu else weight.shape[0]
    assert num_rows <= MAX_ROWS and weight.shape[1] == in_features
    if out is None:
        out = torch.empty((num_rows, out_features), dtype=first.dtype, device=first.device)
    if num_rows == 0:
        return out
    if tuning is None:
        tuning = default_tuning(num_rows, out_features, in_features, paired=silu)
    if residual is not None:
        assert norm_weight is not None and residual_out is not None
        read = {t.data_ptr() for t in (x, residual) if t is not None}
        assert residual_out.data_ptr() not in read, "residual_out is read while it is written"
        if tuning.kernel == "dot":
            x = add_rms_norm(x, residual, norm_weight, eps, residual_out=residual_out, pdl=pdl)
            residual = None
    if tuning.kernel == "vector":
        assert num_rows == 1, "the vector kernel takes one row"
        _launch_vector(
            x, residual, norm_weight, eps, weight, bias, residual_out, out, tuning, pdl, silu
        )
    else:
        assert x is not None
        _launch_dot(x, weight, bias, out, tuning, pdl, silu)
    return out


def _launch_vector(
    x: torch.Tensor | None,
    residual: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    eps: float,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual_out: torch.Tensor | None,
    out: torch.Tensor,
    tuning: LinearTuning,
    pdl: bool,
    silu: bool,
) -> None:
    out_features, in_features = out.shape[1], weight.shape[1]
    _vector[(triton.cdiv(out_features, tuning.features),)](
        weight if x is None else x,
        weight if residual is None else residual,
        weight if norm_weight is None else norm_weight,
        weight,
        weight if bias is None else bias,
        out,
        out if residual_out is None else residual_out,
        eps,
        OUT_FEATURES=out_features,
        IN_FEATURES=in_features,
        FEATURES=tuning.features,
        COLUMNS=tuning.columns,
        VECTOR=min(8, tuning.columns),
        WITH_X=x is not None,
        NORM=residual is not None,
        WITH_BIAS=bias is not None,
        SILU=silu,
        PREFETCH=tuning.prefetch,
        num_warps=tuning.warps,
        **pdl_flags(pdl),
    )


def _launch_dot(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    tuning: LinearTuning,
    pdl: bool,
    silu: bool,
) -> None:
    num_rows, out_features = out.shape
    _dot_rows[(triton.cdiv(out_features, tuning.features),)](
        x,
        weight,
        weight if bias is None else bias,
        out,
        num_rows,
        x.stride(0),
        out.stride(0),
        OUT_FEATURES=out_features,
        IN_FEATURES=weight.shape[1],
        ROWS=_dot_rows_of(num_rows),
        FEATURES=tuning.features,
        COLUMNS=tuning.columns,
        STAGES=tuning.stages,
        WITH_BIAS=bias is not None,
        SILU=silu,
        UPCAST=interpreting(),
        num_warps=tuning.warps,
        **pdl_flags(pdl),
    )


@triton.jit
def _vector(
    x_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    norm_weight_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    out_ptr: tl.tensor,
    residual_out_ptr: tl.tensor,
    eps: float,
    OUT_FEATURES: tl.constexpr,
    IN_FEATURES: tl.constexpr,
    FEATURES: tl.constexpr,
    COLUMNS: tl.constexpr,
    VECTOR: tl.constexpr,
    WITH_X: tl.constexpr,
    NORM: tl.constexpr,
    WITH_BIAS: tl.constexpr,
    SILU: tl.constexpr,
    PREFETCH: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """One program: FEATURES outputs (with SILU: of gate and of up) of one row."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    CHUNKS: tl.constexpr = (IN_FEATURES + COLUMNS - 1) // COLUMNS
    program = tl.program_id(0)
    features = program * FEATURES + tl.arange(0, FEATURES)
    # Rows past the end repeat the last: loads need no mask, and the store leaves them out.
    row = tl.minimum(features, OUT_FEATURES - 1).to(tl.int64)
    columns = tl.arange(0, COLUMNS)
    at = weight_ptr + row[:, None] * IN_FEATURES + columns[None, :]
    UP: tl.constexpr = OUT_FEATURES * IN_FEATURES
    # Rows in full; a last program that has fewer leaves them to its loads.
    if PDL and PREFETCH and (program + 1) * FEATURES <= OUT_FEATURES:
        start = weight_ptr + program.to(tl.int64) * (FEATURES * IN_FEATURES)
        prefetch(start, FEATURES * IN_FEATURES)
        if SILU:
            prefetch(start + UP, FEATURES * IN_FEATURES)
    weights = _chunk(at, 0, columns, IN_FEATURES, COLUMNS)
    if SILU:
        up_weights = _chunk(at + UP, 0, columns, IN_FEATURES, COLUMNS)
    if PDL:
        tl.extra.cuda.gdc_wait()
    sums = tl.zeros([FEATURES, COLUMNS // VECTOR], tl.float32)
    up_sums = tl.zeros([FEATURES, COLUMNS // VECTOR], tl.float32)
    squares = tl.zeros([COLUMNS], tl.float32)
    for i in tl.static_range(CHUNKS):
        column = i * COLUMNS + columns
        inside = column < IN_FEATURES
        if NORM:
            total = tl.load(residual_ptr + column, mask=inside, other=0.0)
            if WITH_X:
                x = tl.load(x_ptr + column, mask=inside, other=0.0)
                total = (total.to(tl.float32) + x.to(tl.float32)).to(total.dtype)
            # The first program's alone.
            mine = program * IN_FEATURES + column < IN_FEATURES
            tl.store(residual_out_ptr + column, total, mask=mine)
            wide = total.to(tl.float32)
            squares += wide * wide
            norm_weight = tl.load(norm_weight_ptr + column, mask=inside, other=0.0)
            values = wide * norm_weight.to(tl.float32)
        else:
            values = tl.load(x_ptr + column, mask=inside, other=0.0).to(tl.float32)
        if i + 1 < CHUNKS:
            # In flight while this chunk is worked on.
            next_weights = _chunk(at, i + 1, columns, IN_FEATURES, COLUMNS)
            if SILU:
                next_up_weights = _chunk(at + UP, i + 1, columns, IN_FEATURES, COLUMNS)
        sums += _partial(weights, values, FEATURES, COLUMNS, VECTOR)
        if SILU:
            up_sums += _partial(up_weights, values, FEATURES, COLUMNS, VECTOR)
        if i + 1 < CHUNKS:
            weights = next_weights
            if SILU:
                up_weights = next_up_weights
    result = tl.sum(sums, 1)
    if NORM:
        scale = tl.rsqrt(tl.sum(squares, 0) / IN_FEATURES + eps)
        result *= scale
    there = features < OUT_FEATURES
    if WITH_BIAS:
        result += tl.load(bias_ptr + features, mask=there, other=0.0).to(tl.float32)
    if SILU:
        up = tl.sum(up_sums, 1)
        if NORM:
            up *= scale
        result = result / (1.0 + tl.exp(-result)) * up
    tl.store(out_ptr + features, result.to(out_ptr.dtype.element_ty), mask=there)


@triton.jit
def _chunk(
    at: tl.tensor,
    i: tl.constexpr,
    columns: tl.tensor,
    IN_FEATURES: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> tl.tensor:
    """Chunk i of the weights' rows; each is read once in a step: evict_first spares the rest."""
    if (i + 1) * COLUMNS <= IN_FEATURES:
        return tl.load(at + i * COLUMNS, eviction_policy="evict_first")
    inside = (i * COLUMNS + columns < IN_FEATURES)[None, :]
    return tl.load(at + i * COLUMNS, mask=inside, other=0.0, eviction_policy="evict_first")


@triton.jit
def _partial(
    weights: tl.tensor,
    values: tl.tensor,
    FEATURES: tl.constexpr,
    COLUMNS: tl.constexpr,
    VECTOR: tl.constexpr,
) -> tl.tensor:
    """weights * values summed over the VECTOR neighbours that one thread holds."""
    products = weights.to(tl.float32) * values[None, :]
    return tl.sum(tl.reshape(products, [FEATURES, COLUMNS // VECTOR, VECTOR]), 2)


@triton.jit
def _dot_rows(
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    out_ptr: tl.tensor,
    num_rows: int,
    x_stride: int,
    out_stride: int,
    OUT_FEATURES: tl.constexpr,
    IN_FEATURES: tl.constexpr,
    ROWS: tl.constexpr,
    FEATURES: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
    WITH_BIAS: tl.constexpr,
    SILU: tl.constexpr,
    UPCAST: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """One program: FEATURES outputs (with SILU: of gate and of up) of all rows."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    rows = tl.arange(0, ROWS)
    features = tl.program_id(0) * FEATURES + tl.arange(0, FEATURES)
    row = tl.minimum(features, OUT_FEATURES - 1).to(tl.int64)
    columns = tl.arange(0, COLUMNS)
    at = weight_ptr + row[:, None] * IN_FEATURES + columns[None, :]
    UP: tl.constexpr = OUT_FEATURES * IN_FEATURES
    x_at = x_ptr + rows[:, None] * x_stride + columns[None, :]
    sums = tl.zeros([ROWS, FEATURES], tl.float32)
    up_sums = tl.zeros([ROWS, FEATURES], tl.float32)
    if PDL:
        tl.extra.cuda.gdc_wait()
    for i in tl.range(0, IN_FEATURES, COLUMNS, num_stages=STAGES):
        inside = (i + columns < IN_FEATURES)[None, :]
        real = (rows < num_rows)[:, None] & inside
        if IN_FEATURES % COLUMNS == 0:
            x = tl.load(x_at + i, mask=(rows < num_rows)[:, None], other=0.0)
            weights = tl.load(at + i, eviction_policy="evict_first")
        else:
            x = tl.load(x_at + i, mask=real, other=0.0)
            weights = tl.load(at + i, mask=inside, other=0.0, eviction_policy="evict_first")
        sums = dot(x, tl.trans(weights), sums, UPCAST)
        if SILU:
            if IN_FEATURES % COLUMNS == 0:
                up = tl.load(at + UP + i, eviction_policy="evict_first")
            else:
                up = tl.load(at + UP + i, mask=inside, other=0.0, eviction_policy="evict_first")
            up_sums = dot(x, tl.trans(up), up_sums, UPCAST)
    there = features < OUT_FEATURES
    if WITH_BIAS:
        sums += tl.load(bias_ptr + features, mask=there, other=0.0).to(tl.float32)[None, :]
    if SILU:
        sums = sums / (1.0 + tl.exp(-sums)) * up_sums
    out_at = out_ptr + rows[:, None] * out_stride + features[None, :]
    mask = (rows < num_rows)[:, None] & there[None, :]
    tl.store(out_at, sums.to(out_ptr.dtype.element_ty), mask=mask)
