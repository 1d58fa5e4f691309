"""FlashAttention-3 over our pages: the call against attention written out, and the real kernels
where a vLLM that has them is installed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_attention import make_batch

from pdrelay.engine.attention import AttentionShape
from pdrelay.engine.attention.cuda import CudaAttention
from pdrelay.engine.attention.fa3 import Fa3Paged, load_fa3
from pdrelay.engine.attention.reference import ReferenceAttention
from pdrelay.engine.backend import cuda_backend
from pdrelay.engine.kernels.decode_cut import DecodeCut
from pdrelay.engine.kernels.gpu import TorchKernels
from pdrelay.engine.qkv_buffer import QkvBuffer
from pdrelay.errors import LaunchError

CASES = [
    ([1], []),
    ([130], []),
    ([1, 63, 64, 65, 200], []),
    ([], [(40, 64)]),
    ([], [(1, 5), (100, 190)]),
    ([77, 128], [(33, 130), (64, 64)]),
]


def attend_written_out(
    q,
    k,
    v,
    *,
    max_seqlen_q,
    cu_seqlens_q,
    max_seqlen_k,
    seqused_k,
    softmax_scale,
    causal,
    block_table,
    out,
    fa_version,
):
    """What FA3 asks of its arguments and makes of them."""
    assert fa_version == 3 and causal
    block_size = k.shape[1]
    for pages in (k, v):
        assert pages.dim() == 4 and pages.shape == k.shape and pages.stride(3) == 1
        assert pages.data_ptr() % 16 == 0
        assert all(pages.stride(i) * pages.element_size() % 16 == 0 for i in range(3))
    assert cu_seqlens_q.dtype == seqused_k.dtype == block_table.dtype == torch.int32
    assert block_table.stride(1) == 1 and len(cu_seqlens_q) == len(seqused_k) + 1
    for i, num_keys in enumerate(seqused_k.tolist()):
        begin, end = cu_seqlens_q[i : i + 2].tolist()
        length = end - begin
        assert length <= max_seqlen_q and num_keys <= max_seqlen_k
        table = block_table[i][: -(-num_keys // block_size)].long()
        group = q.shape[1] // k.shape[2]
        keys, values = (
            pages[table].flatten(0, 1)[:num_keys].float().repeat_interleave(group, dim=1)
            for pages in (k, v)
        )
        scores = torch.einsum("thd,khd->htk", q[begin:end].float(), keys) * softmax_scale
        visible = torch.ones(length, num_keys, dtype=torch.bool).tril(num_keys - length)
        weights = scores.masked_fill(~visible.to(scores.device), float("-inf")).softmax(dim=-1)
        out[begin:end] = torch.einsum("htk,khd->thd", weights, values).to(out.dtype)


def check(paged, shape, dtype, device, case, tolerance):
    q, context = make_batch(shape, *case, 64, seed=3, dtype=dtype)
    wanted = ReferenceAttention(shape)(q, context.kv_pool[0], context)
    tables = [t.to(device) for t in context.prefill_tables]
    context = replace(context, kv_pool=context.kv_pool.to(device), tables=tables)
    if context.decode is not None:
        object.__setattr__(context.decode, "block_tables", context.decode.block_tables.to(device))
        object.__setattr__(context.decode, "seq_lens", context.decode.seq_lens.to(device))
    width = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim
    attention = CudaAttention(shape, paged, QkvBuffer(width, dtype, device))
    got = attention(q.to(device), context.kv_pool[0], context)
    torch.testing.assert_close(got.cpu().float(), wanted.float(), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("heads", [(4, 2, 16), (8, 2, 32)])
def test_the_call_is_attention(heads, case):
    shape, cpu = AttentionShape(*heads), torch.device("cpu")
    paged = Fa3Paged(shape, cpu, attend_written_out)
    check(paged, shape, torch.float32, cpu, case, 1e-5)


def test_more_rows_than_foreseen():
    shape, cpu = AttentionShape(2, 1, 8), torch.device("cpu")
    check(
        Fa3Paged(shape, cpu, attend_written_out), shape, torch.float32, cpu, ([1] * 1100, []), 1e-5
    )


@pytest.mark.parametrize(
    ("head_dim", "dtype", "cause"),
    [(128, torch.float32, "float32"), (20, torch.bfloat16, "head_dim"), (512, torch.half, "512")],
)
def test_what_it_does_not_take_is_one_line_with_the_way_out(head_dim, dtype, cause):
    with pytest.raises(LaunchError, match=cause) as caught:
        load_fa3(AttentionShape(4, 2, head_dim), dtype, torch.device("cuda"))
    assert "--attention-backend triton" in str(caught.value) and "\n" not in str(caught.value)


def test_without_vllm_it_says_so(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "vllm", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    kernels = TorchKernels()
    with pytest.raises(LaunchError, match="no FlashAttention-3 here"):
        cuda_backend(
            AttentionShape(4, 2, 64), torch.bfloat16, torch.device("cpu"), kernels, attention="fa3"
        )


def test_other_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(LaunchError, match="needs a Hopper GPU"):
        load_fa3(AttentionShape(4, 2, 64), torch.bfloat16, torch.device("cuda"))


def real_fa3(shape, device):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    try:
        return load_fa3(shape, torch.bfloat16, device)
    except LaunchError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("heads", [(8, 2, 128), (8, 4, 64)])
def test_the_real_kernels_against_attention_written_out(heads, case):
    shape, device = AttentionShape(*heads), torch.device("cuda")
    paged = real_fa3(shape, device)
    check(paged, shape, torch.bfloat16, device, case, 2e-2)


def test_the_real_kernels_in_a_graph_follow_lengths_and_tables():
    """Captured with padding rows, replayed with others: as a decode bucket is."""
    shape, device = AttentionShape(8, 2, 128), torch.device("cuda")
    paged = real_fa3(shape, device)
    q, context = make_batch(shape, [200, 64, 1], [], 64, seed=5, dtype=torch.bfloat16)
    wanted = ReferenceAttention(shape)(q, context.kv_pool[0], context)
    kv, queries = context.kv_pool[0].to(device), q.to(device)
    tables = torch.zeros((3, 32), dtype=torch.int32, device=device)
    lens = torch.zeros(3, dtype=torch.int32, device=device)
    out = torch.empty((3, q.shape[1]), dtype=torch.bfloat16, device=device)
    call = (queries, kv, tables, lens, shape.scale, out, DecodeCut())
    paged.paged_decode(*call)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        paged.paged_decode(*call)
    given = context.decode.block_tables
    tables[:, : given.shape[1]] = given.to(device)
    lens.copy_(context.decode.seq_lens)
    graph.replay()
    torch.testing.assert_close(out.cpu().float(), wanted.float(), atol=2e-2, rtol=2e-2)
