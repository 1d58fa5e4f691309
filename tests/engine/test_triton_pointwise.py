"""Norm, activation and RoPE + KV write in Triton, against torch."""

import pytest
import torch
from triton_harness import DEVICE, EPS, equal_but_for_rounding, randn, relative_error

from pdrelay.engine.kernels.triton.activation import silu_mul
from pdrelay.engine.kernels.triton.norm import add_rms_norm
from pdrelay.engine.kernels.triton.rope import rope_write_kv
from pdrelay.engine.layers import HeadNorms, TorchOps

TORCH = TorchOps()
BOTH_DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])


@BOTH_DTYPES
@pytest.mark.parametrize("width", [64, 96, 1000])
@pytest.mark.parametrize("with_x", [True, False])
def test_add_rms_norm(width, with_x, dtype):
    x = randn(3, width, dtype=dtype) if with_x else None
    residuals = [randn(3, width, dtype=dtype, seed=1) for _ in range(2)]
    weight = randn(width, dtype=dtype, seed=2)
    actual = add_rms_norm(x, residuals[0], weight, EPS)
    wanted = TORCH.add_rms_norm(x, residuals[1], weight, EPS)
    if dtype == torch.bfloat16:
        assert equal_but_for_rounding(*residuals)
        # Another order of the sum may tip a rounding, which the weight's product may double.
        wanted = TORCH.add_rms_norm(None, residuals[0], weight, EPS)
        assert equal_but_for_rounding(actual, wanted, steps=2)
    else:
        assert torch.equal(*residuals)
        torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-6)


def test_add_rms_norm_of_strided_rows_into_out():
    wide, behind = (randn(4, 256, dtype=torch.float32, seed=s) for s in (0, 1))
    x, residual = wide[:, :128], behind[:, 64:192]
    around = behind.clone()
    weight, out = randn(128, dtype=torch.float32, seed=2), torch.full_like(wide, torch.nan)[:, :128]
    twin = residual.clone()
    assert add_rms_norm(x, residual, weight, EPS, out) is out
    torch.testing.assert_close(out, TORCH.add_rms_norm(x, twin, weight, EPS), rtol=1e-5, atol=1e-6)
    assert torch.equal(residual, twin)
    assert torch.equal(behind[:, :64], around[:, :64])
    assert torch.equal(behind[:, 192:], around[:, 192:])


@BOTH_DTYPES
@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # numpy's, as meant: 1 / inf
@pytest.mark.parametrize("width", [32, 1000, 1536])
def test_silu_mul(width, dtype):
    gate_up = randn(3, 2 * width, dtype=dtype) * 4
    gate_up[0, :6] = torch.tensor([0.0, -0.0, 200.0, -200.0, 88.0, -88.0])
    gate_up[0, width : width + 6] = 1.0
    actual, wanted = silu_mul(gate_up), TORCH.silu_mul(gate_up.clone())
    if dtype == torch.bfloat16:
        assert equal_but_for_rounding(actual, wanted, steps=2)
    else:
        torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-6)


def rope_inputs(num_rows, num_heads, num_kv_heads, head_dim, dtype, with_norms):
    qkv = randn(num_rows, (num_heads + 2 * num_kv_heads) * head_dim, dtype=dtype)
    table = torch.randn(50, head_dim, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    positions = torch.arange(num_rows, device=DEVICE) * 7 % 50
    norms = None
    if with_norms:
        weights = [randn(head_dim, dtype=dtype, seed=s).abs() + 0.5 for s in (4, 5)]
        norms = HeadNorms(*weights, EPS)
    return qkv, positions, table, norms


def call(qkv, positions, slots, table, norms, kv_layer, *remote):
    q_norm, k_norm = (norms.q, norms.k) if norms else (None, None)
    return rope_write_kv(qkv, positions, slots, table, q_norm, k_norm, EPS, kv_layer, *remote)


@BOTH_DTYPES
@pytest.mark.parametrize("with_norms", [True, False])
@pytest.mark.parametrize(
    ("num_rows", "num_heads", "num_kv_heads", "head_dim", "block_size"),
    [(1, 4, 1, 64, 16), (5, 8, 8, 32, 16), (3, 10, 2, 16, 32), (3, 16, 8, 128, 64)],
)
def test_rope_write_kv(num_rows, num_heads, num_kv_heads, head_dim, block_size, dtype, with_norms):
    qkv, positions, table, norms = rope_inputs(
        num_rows, num_heads, num_kv_heads, head_dim, dtype, with_norms
    )
    shape = (6, 2, block_size, num_kv_heads, head_dim)
    pages, wanted_pages = (torch.full(shape, 9.0, dtype=dtype, device=DEVICE) for _ in range(2))
    slots = torch.randperm(6 * block_size, generator=torch.Generator().manual_seed(6))
    slots = slots[:num_rows].to(DEVICE)
    wanted = TORCH.rope_write_kv(qkv.clone(), positions, slots, table, norms, wanted_pages)
    values = qkv[:, (num_heads + num_kv_heads) * head_dim :].clone()
    actual = call(qkv, positions, slots, table, norms, pages)
    assert actual.data_ptr() == qkv.data_ptr() and actual.shape == wanted.shape
    assert torch.equal(pages[:, 1], wanted_pages[:, 1])
    assert torch.equal(qkv[:, (num_heads + num_kv_heads) * head_dim :], values)
    limit = 1e-2 if dtype == torch.bfloat16 else 1e-6
    assert relative_error(actual, wanted) < limit
    assert relative_error(pages[:, 0], wanted_pages[:, 0]) < limit


def test_negative_slots_write_nothing_and_the_remote_pool_has_its_own_slots():
    qkv, positions, table, _ = rope_inputs(6, 4, 2, 32, torch.bfloat16, with_norms=False)
    table[:, :16], table[:, 16:] = 1.0, 0.0  # no rotation
    local = torch.zeros(3, 2, 16, 2, 32, dtype=torch.bfloat16, device=DEVICE)
    remote = torch.zeros(5, 2, 16, 2, 32, dtype=torch.bfloat16, device=DEVICE)
    slots = torch.tensor([0, -1, 17, 40, -1, 3], device=DEVICE)
    remote_slots = torch.tensor([79, 2, -1, 33, -1, 64], device=DEVICE)
    q = call(qkv, positions, slots, table, None, local, remote, remote_slots)
    assert q.shape == (6, 128)
    for pages, of_row in ((local, slots.tolist()), (remote, remote_slots.tolist())):
        flat = pages.transpose(1, 2).reshape(-1, 2, 64)  # [slot, K or V, Hkv * D]
        rows = {slot: row for row, slot in enumerate(of_row) if slot >= 0}
        for slot, cell in enumerate(flat):
            if slot in rows:
                assert torch.equal(cell.flatten(), qkv[rows[slot], 128:]), slot
            else:
                assert not cell.any(), slot


def test_a_row_has_the_same_bits_in_a_long_batch():
    qkv, positions, table, norms = rope_inputs(257, 2, 1, 16, torch.bfloat16, with_norms=True)
    alone = qkv[100:101].clone()
    pages, page = (
        torch.zeros(20, 2, 16, 1, 16, dtype=torch.bfloat16, device=DEVICE) for _ in range(2)
    )
    slots = torch.arange(257, device=DEVICE)
    q = call(qkv, positions, slots, table, norms, pages)
    q_alone = call(alone, positions[100:101], slots[100:101], table, norms, page)
    assert torch.equal(q[100:101], q_alone)
    assert torch.equal(pages[6, :, 4], page[6, :, 4])


@pytest.mark.parametrize("with_norms", [True, False])
def test_keys_are_rotated_in_place_when_asked(with_norms):
    qkv, positions, table, norms = rope_inputs(5, 4, 2, 32, torch.bfloat16, with_norms)
    plain = qkv.clone()
    slots = torch.arange(5, device=DEVICE)
    pages, page = (
        torch.zeros(1, 2, 16, 2, 32, dtype=torch.bfloat16, device=DEVICE) for _ in range(2)
    )
    q_norm, k_norm = (norms.q, norms.k) if norms else (None, None)
    arguments = (positions, slots, table, q_norm, k_norm, EPS)
    rope_write_kv(qkv, *arguments, pages, keep_keys=True)
    call(plain, positions, slots, table, norms, page)
    assert torch.equal(pages, page)
    assert torch.equal(qkv[:, :128], plain[:, :128]) and torch.equal(qkv[:, 192:], plain[:, 192:])
    assert torch.equal(qkv[:, 128:192], pages[0, 0, :5].flatten(1))
    assert not torch.equal(plain[:, 128:192], qkv[:, 128:192])
