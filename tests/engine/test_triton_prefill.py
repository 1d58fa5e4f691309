"""Paged causal prefill attention in Triton, against attention written out in float64."""

import pytest
import torch
from triton_harness import DEVICE, randn, relative_error

from pdrelay.engine.kernels.triton.attention_prefill import paged_prefill


def make_prompt(length, num_kv_heads, head_dim, block_size, dtype):
    """Pages in random order whose unused places are NaN, and the dense K and V."""
    width = -(-length // block_size)
    pool = torch.full((width + 3, 2, block_size, num_kv_heads, head_dim), torch.nan)
    table = torch.randperm(width + 3, generator=torch.Generator().manual_seed(1))[:width]
    kv = randn(2, length, num_kv_heads, head_dim, dtype=dtype, seed=2)
    for position in range(length):
        pool[table[position // block_size], :, position % block_size] = (
            kv[:, position].float().cpu()
        )
    return pool.to(DEVICE, dtype), table.to(DEVICE, torch.int32), kv


def reference(q, kv, context_len, num_heads, scale):
    k, v = (t.double().repeat_interleave(num_heads // kv.shape[2], dim=1) for t in kv)
    query = q.double().view(q.shape[0], num_heads, -1)
    scores = torch.einsum("thd,khd->htk", query, k) * scale
    positions = context_len + torch.arange(q.shape[0], device=q.device)
    hidden = torch.arange(k.shape[0], device=q.device)[None, :] > positions[:, None]
    weights = scores.masked_fill(hidden, -torch.inf).softmax(dim=-1)
    return torch.einsum("htk,khd->thd", weights, v).flatten(1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("num_rows", "context_len"), [(1, 0), (5, 0), (40, 0), (1, 63), (17, 64), (70, 130), (33, 31)]
)
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim", "block_size"),
    [(4, 2, 32, 16), (3, 1, 16, 64), (4, 4, 64, 128)],
)
def test_paged_prefill(num_rows, context_len, num_heads, num_kv_heads, head_dim, block_size, dtype):
    pool, table, kv = make_prompt(context_len + num_rows, num_kv_heads, head_dim, block_size, dtype)
    q = randn(num_rows, num_heads * head_dim + 64, dtype=dtype)[:, : num_heads * head_dim]
    scale = head_dim**-0.5
    actual = paged_prefill(q, pool, table, context_len, scale, rows=32)
    wanted = reference(q, kv, context_len, num_heads, scale)
    assert relative_error(actual, wanted) < (1e-2 if dtype == torch.bfloat16 else 1e-5)


def test_chunks_join_to_the_whole():
    pool, table, kv = make_prompt(100, 2, 32, 16, torch.float32)
    q = randn(100, 4 * 32, dtype=torch.float32)
    parts = [paged_prefill(q[a:b], pool, table, a, 0.2) for a, b in ((0, 37), (37, 38), (38, 100))]
    assert relative_error(torch.cat(parts), reference(q, kv, 0, 4, 0.2)) < 1e-5
