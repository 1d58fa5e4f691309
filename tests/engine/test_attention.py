"""Every backend against attention written out."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pdrelay.engine.attention import (
    AttentionShape,
    DecodeSegment,
    ForwardContext,
    PrefillSegment,
)
from pdrelay.engine.attention.cpu import CpuAttention
from pdrelay.engine.attention.reference import ReferenceAttention
from pdrelay.engine.attention.sdpa import SdpaAttention
from pdrelay.engine.backend import select_backend
from pdrelay.engine.kernels import load_kernels
from pdrelay.engine.layers import KernelOps, TorchOps

torch.set_num_threads(1)


def make_batch(shape, decode_lens, prefills, block_size, seed, dtype=torch.float32):
    """Random q and pages. `prefills`: (length, context_len). Unused slots hold large rubbish."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    totals = [*decode_lens, *(length + context for length, context in prefills)]
    needed = [-(-total // block_size) for total in totals]
    blocks = rng.sample(range(sum(needed) + 3), sum(needed))
    kv = torch.full((sum(needed) + 3, 2, block_size, shape.num_kv_heads, shape.head_dim), 1e4)
    tables = []
    for total, count in zip(totals, needed, strict=True):
        tables.append([blocks.pop() for _ in range(count)])
        for p in range(total):
            page = kv[tables[-1][p // block_size], :, p % block_size]
            page.copy_(torch.randn(page.shape, generator=generator))
    segments, start = [], len(decode_lens)
    for (length, context), table in zip(prefills, tables[len(decode_lens) :], strict=True):
        segments.append(PrefillSegment(start, length, context, table))
        start += length
    decode = None
    if decode_lens:
        width = max(needed[: len(decode_lens)])
        padded = [t + [0] * (width - len(t)) for t in tables[: len(decode_lens)]]
        decode = DecodeSegment(
            0, torch.tensor(padded, dtype=torch.int32), torch.tensor(decode_lens, dtype=torch.int32)
        )
    context = ForwardContext(kv[None].to(dtype), torch.empty(0), segments, decode)
    # A slice of wider rows, as the model's fused q, k, v.
    width = shape.num_heads * shape.head_dim
    rows = torch.randn(start, width + 40, generator=generator) * 2
    return rows.to(dtype)[:, :width], context


def backend(name, shape):
    if name == "sdpa":
        return SdpaAttention(shape)
    kernels = load_kernels()
    assert kernels is not None
    return CpuAttention(shape, kernels)


@pytest.mark.parametrize("name", ["cpu", "sdpa"])
@settings(max_examples=15, deadline=None)
@given(
    heads=st.sampled_from([(1, 1), (2, 1), (4, 2), (7, 1), (6, 6)]),
    head_dim=st.sampled_from([16, 32, 48, 64, 80]),
    block_size=st.sampled_from([1, 3, 16]),
    decode_lens=st.lists(st.integers(1, 140), max_size=3),
    prefills=st.lists(st.tuples(st.integers(1, 40), st.integers(0, 140)), max_size=2),
    seed=st.integers(0, 1000),
)
def test_against_the_reference(name, heads, head_dim, block_size, decode_lens, prefills, seed):
    if not decode_lens and not prefills:
        return
    shape = AttentionShape(*heads, head_dim)
    q, context = make_batch(shape, decode_lens, prefills, block_size, seed)
    actual = backend(name, shape)(q, context.kv_pool[0], context)
    wanted = ReferenceAttention(shape)(q, context.kv_pool[0], context)
    torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["cpu", "sdpa"])
def test_long_chunk_behind_a_long_prefix(name):
    shape = AttentionShape(4, 2, 32)
    q, context = make_batch(shape, [513], [(300, 700)], 16, seed=0)
    actual = backend(name, shape)(q, context.kv_pool[0], context)
    wanted = SdpaAttention(shape)._masked  # a third way: one dense masked softmax
    segment = context.prefills[0]
    k, v = SdpaAttention(shape)._gather(context.kv_pool[0], context.prefill_tables[0], 1000)
    dense = wanted(q[1:].reshape(300, 4, 32), k, v, segment.context_len)
    torch.testing.assert_close(actual[1:], dense, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", [1e-4, 30.0, 300.0])
def test_extreme_scores(scale):
    """Scores far beyond the range of exp, and all alike."""
    shape = AttentionShape(2, 1, 32)
    q, context = make_batch(shape, [140], [(150, 0)], 16, seed=1)
    q = q * scale
    actual = backend("cpu", shape)(q, context.kv_pool[0], context)
    wanted = ReferenceAttention(shape)(q, context.kv_pool[0], context)
    assert actual.isfinite().all()
    rounding = max(1.0, scale) * 1e-5  # of the scores, which exp passes on
    torch.testing.assert_close(actual, wanted, rtol=0, atol=rounding)


def test_rubbish_behind_the_last_token_is_never_read_as_a_number():
    shape = AttentionShape(2, 2, 32)
    for filler in (float("nan"), float("inf")):
        q, context = make_batch(shape, [5], [(9, 3)], 16, seed=2)
        wanted = ReferenceAttention(shape)(q, context.kv_pool[0], context)
        pool = context.kv_pool.masked_fill(context.kv_pool == 1e4, filler)
        assert not pool.isfinite().all()
        torch.testing.assert_close(backend("cpu", shape)(q, pool[0], context), wanted)


def test_bfloat16():
    shape = AttentionShape(4, 2, 32)
    q, context = make_batch(shape, [40, 3], [(20, 30), (17, 0)], 16, seed=3, dtype=torch.bfloat16)
    actual = SdpaAttention(shape)(q, context.kv_pool[0], context)
    wanted = ReferenceAttention(shape)(q, context.kv_pool[0], context)
    torch.testing.assert_close(actual.float(), wanted.float(), rtol=0.02, atol=0.02)


def test_selection():
    def pick(head_dim, dtype, use_kernels=True):
        shape = AttentionShape(2, 1, head_dim)
        backend = select_backend(shape, dtype, torch.device("cpu"), use_kernels)
        return type(backend.attention), type(backend.ops)

    assert load_kernels() is not None
    assert pick(32, torch.float32) == (CpuAttention, KernelOps)
    assert pick(18, torch.float32) == (SdpaAttention, KernelOps)  # no whole vectors
    assert pick(512, torch.float32) == (SdpaAttention, KernelOps)
    assert pick(32, torch.bfloat16) == (SdpaAttention, TorchOps)
    assert pick(32, torch.float32, False) == (SdpaAttention, TorchOps)
