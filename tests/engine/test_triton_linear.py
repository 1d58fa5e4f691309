"""Linear layers of few rows in Triton, against float64."""

import pytest
import torch
from triton_harness import EPS, ON_GPU, equal_but_for_rounding, randn, relative_error

from pdrelay.engine.kernels.triton.linear_small import (
    LinearTuning,
    beats_cublas,
    default_tuning,
    gate_up_beats_cublas,
    gate_up_silu,
    linear_small,
    norm_gate_up_silu,
    norm_linear,
)

VECTOR = LinearTuning("vector", 4, 256, warps=1)
DOT = LinearTuning("dot", 16, 64, warps=4, stages=3)
RUNS = [(1, VECTOR), (1, DOT), (3, DOT), (8, DOT)]
SHAPES = [
    (32, 256),
    (24, 96),
    (17, 600),
]  # N, K: whole tiles; one part tile; several, the last part


@pytest.mark.parametrize(("num_rows", "tuning"), RUNS)
@pytest.mark.parametrize(("out_features", "in_features"), SHAPES)
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_linear_small(num_rows, tuning, out_features, in_features, with_bias, dtype):
    x = randn(num_rows, in_features, dtype=dtype)
    weight = randn(out_features, in_features, dtype=dtype, seed=1)
    bias = randn(out_features, dtype=dtype, seed=2) if with_bias else None
    out = torch.full((num_rows, out_features), torch.nan, dtype=dtype, device=x.device)
    assert linear_small(x, weight, bias, out, tuning=tuning) is out
    wanted = x.double() @ weight.double().T + (0.0 if bias is None else bias.double())
    assert relative_error(out, wanted) < (5e-3 if dtype == torch.bfloat16 else 1e-6)


@pytest.mark.parametrize(("num_rows", "tuning"), RUNS)
@pytest.mark.parametrize(("width", "in_features"), SHAPES)
def test_gate_up_silu(num_rows, tuning, width, in_features):
    x = randn(num_rows, in_features)
    weight = randn(2 * width, in_features, seed=1, std=in_features**-0.5)
    actual = gate_up_silu(x, weight, tuning=tuning)
    gate, up = (x.double() @ weight.double().T).chunk(2, dim=-1)
    assert actual.shape == (num_rows, width)
    assert relative_error(actual, torch.nn.functional.silu(gate) * up) < 5e-3


def normed(x, residual, weight):
    """The rounded sum, and its RMSNorm in float64."""
    total = residual if x is None else (residual + x)
    wide = total.double()
    scale = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + EPS)
    return total, wide * scale * weight.double()


@pytest.mark.parametrize(("num_rows", "tuning"), RUNS)
@pytest.mark.parametrize(("width", "in_features"), SHAPES)
@pytest.mark.parametrize("with_x", [True, False])
def test_norm_prologue(num_rows, tuning, width, in_features, with_x):
    x = randn(num_rows, in_features) if with_x else None
    residual = randn(num_rows, in_features, seed=1) * 3
    norm_weight = randn(in_features, seed=2)
    weight = randn(2 * width, in_features, seed=3, std=in_features**-0.5)
    bias = randn(2 * width, seed=4)
    before = residual.clone()
    total, h = normed(x, residual, norm_weight)
    product = h @ weight.double().T

    # The interpreter cuts bits off: the errors of sum and norm all point the same way.
    limit = 1e-2 if ON_GPU else 3e-2

    def check(call, wanted, *last):
        residual_out = torch.full_like(residual, torch.nan)
        actual = call(x, residual, norm_weight, EPS, weight, *last, residual_out, tuning=tuning)
        assert equal_but_for_rounding(residual_out, total)
        assert torch.equal(residual, before)
        assert relative_error(actual, wanted) < limit

    check(norm_linear, product + bias.double(), bias)
    gate, up = product.chunk(2, dim=-1)
    check(norm_gate_up_silu, torch.nn.functional.silu(gate) * up)


def test_residual_out_must_be_another_buffer():
    x, residual = randn(1, 64), randn(1, 64, seed=1)
    weight = randn(16, 64, seed=2)
    for taken in (x, residual):
        with pytest.raises(AssertionError, match="residual_out"):
            norm_linear(x, residual, weight[0].clone(), EPS, weight, None, taken)


def test_a_row_has_the_same_bits_in_any_batch():
    x, weight = randn(8, 96), randn(40, 96, seed=1)
    together = linear_small(x, weight, tuning=DOT)
    for row in range(8):
        alone = linear_small(x[row : row + 1], weight, tuning=DOT)
        assert torch.equal(together[row : row + 1], alone)


@pytest.mark.parametrize("num_rows", [1, 2, 8, 24, 64])
@pytest.mark.parametrize(
    ("out_features", "in_features"), [(6144, 4096), (1024, 64), (8, 14336), (64, 2560)]
)
def test_default_tuning_is_one_the_kernels_take(num_rows, out_features, in_features):
    tuning = default_tuning(num_rows, out_features, in_features)
    assert tuning.kernel == ("vector" if num_rows == 1 else "dot")
    for size in (tuning.features, tuning.columns, tuning.warps):
        assert size & (size - 1) == 0
    paired = default_tuning(num_rows, out_features, in_features, paired=True)
    for kind, lines in ((tuning, tuning.features), (paired, 2 * paired.features)):
        if kind.kernel == "dot":
            rows = max(16, 1 << (num_rows - 1).bit_length())
            assert kind.stages >= 2 and kind.stages * (rows + lines) * kind.columns * 2 <= 227 << 10
    if num_rows == 1 and in_features >= 256:
        assert in_features % tuning.columns == 0


def test_default_tuning_computes():
    for num_rows in (1, 4, 17, 40):
        x, weight = randn(num_rows, 256), randn(32, 256, seed=1)
        wanted = x.double() @ weight.double().T
        assert relative_error(linear_small(x, weight), wanted) < 5e-3
        gate, up = wanted.chunk(2, dim=-1)
        silu = torch.nn.functional.silu(gate) * up
        assert relative_error(gate_up_silu(x, weight), silu) < 5e-3


def test_the_8b_shapes_that_take_the_dot_kernel():
    """By `benchmarks/gpu_kernels.py` and whole steps: o, gate_up and down, not qkv or lm_head."""
    for out_features in (4096, 28672):
        assert beats_cublas(8, out_features, 132)
    assert not beats_cublas(8, 6144, 132) and beats_cublas(1, 6144, 132)
    assert not beats_cublas(2, 128256, 132) and beats_cublas(1, 128256, 132)
    assert gate_up_beats_cublas(64, 14336, 132) and gate_up_beats_cublas(2, 14336 // 2, 132)
    assert not gate_up_beats_cublas(8, 12288, 132) and gate_up_beats_cublas(1, 12288, 132)
