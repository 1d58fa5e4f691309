"""Paged split-KV decode attention in Triton, against attention written out in float64."""

import pytest
import torch
from triton_harness import DEVICE, ON_GPU, randn, relative_error

from pdrelay.engine.kernels.decode_cut import DecodeCut
from pdrelay.engine.kernels.gpu import TritonKernels
from pdrelay.engine.kernels.triton import attention_decode, decode_parts
from pdrelay.engine.kernels.triton.attention_decode import (
    DecodeWorkspace,
    paged_decode,
    split_rule,
)
from pdrelay.engine.kernels.triton.decode_parts import HEADER, extra_parts
from pdrelay.engine.kernels.triton.launch import num_sms
from pdrelay.engine.kernels.triton.split_rule import (
    MAX_SPLITS,
    crowds,
    fills_waves,
    most_extra_parts,
    pipeline_depth,
)

SHAPES = [(8, 2, 64, 16), (4, 4, 16, 64), (5, 1, 32, 128), (16, 2, 32, 64), (6, 2, 16, 128)]


def make_batch(seq_lens, num_kv_heads, head_dim, block_size, dtype=torch.bfloat16):
    """A pool whose unused places are NaN, block tables in random order, and the dense K and V."""
    width = max(1, -(-max(seq_lens) // block_size)) + 1
    num_blocks = len(seq_lens) * width
    pool = torch.full(
        (num_blocks, 2, block_size, num_kv_heads, head_dim), torch.nan, dtype=dtype, device=DEVICE
    )
    tables = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(1))
    tables = tables.view(len(seq_lens), width).to(DEVICE, torch.int32)
    dense = []
    for row, length in enumerate(seq_lens):
        kv = randn(2, length, num_kv_heads, head_dim, dtype=dtype, seed=10 + row)
        for position in range(length):
            block = tables[row, position // block_size]
            pool[block, :, position % block_size] = kv[:, position]
        used = -(-length // block_size)
        tables[row, used:] = 2**30  # no block: must not be read
        dense.append(kv)
    return pool, tables, torch.tensor(seq_lens, dtype=torch.int32, device=DEVICE), dense


def reference(q, dense, num_heads, head_dim, scale):
    rows = []
    for query, kv in zip(q, dense, strict=True):
        k, v = (t.double().repeat_interleave(num_heads // kv.shape[2], dim=1) for t in kv)
        scores = torch.einsum("hd,khd->hk", query.double().view(num_heads, head_dim), k) * scale
        weights = scores.softmax(dim=-1) if kv.shape[1] else scores
        rows.append(torch.einsum("hk,khd->hd", weights, v).flatten())
    return torch.stack(rows)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("num_splits", [1, 4])
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim", "block_size"), SHAPES)
def test_paged_decode(num_heads, num_kv_heads, head_dim, block_size, num_splits, fused):
    seq_lens = [1, 0, 64, 330]
    pool, tables, lens, dense = make_batch(seq_lens, num_kv_heads, head_dim, block_size)
    q = randn(len(seq_lens), num_heads * head_dim + 96)[:, : num_heads * head_dim]
    workspace = DecodeWorkspace(8, num_heads, head_dim, DEVICE, 8)
    scale = head_dim**-0.5
    for _ in range(2):  # the workspace is as good the second time
        out = torch.full((len(seq_lens), num_heads * head_dim), torch.nan).to(q)
        cut = DecodeCut(num_splits)
        actual = paged_decode(q, pool, tables, lens, scale, out, workspace, cut, fused=fused)
        assert actual is out
        wanted = reference(q, dense, num_heads, head_dim, scale)
        assert not actual[1].any()
        assert relative_error(actual, wanted) < 1e-2


def test_float32_is_exact_to_its_own_precision():
    pool, tables, lens, dense = make_batch([7, 150], 2, 32, 16, torch.float32)
    q = randn(2, 4 * 32, dtype=torch.float32)
    actual = paged_decode(q, pool, tables, lens, 0.2, cut=DecodeCut(4))
    assert relative_error(actual, reference(q, dense, 4, 32, 0.2)) < 1e-5


@pytest.mark.parametrize("block_size", [16, 64, 128])
def test_a_row_has_the_same_bits_in_any_batch(block_size):
    seq_lens = [330, 3, 77, 64]
    pool, tables, lens, _ = make_batch(seq_lens, 2, 32, block_size)
    q = randn(4, 8 * 32)
    together = paged_decode(q, pool, tables, lens, 0.2, cut=DecodeCut(4))
    for row in range(4):
        part = slice(row, row + 1)
        alone = paged_decode(q[part], pool, tables[part], lens[part], 0.2, cut=DecodeCut(4))
        assert torch.equal(together[part], alone)


def test_a_row_has_the_same_bits_in_pages_of_any_size():
    seq_lens, cut, outs = [330, 3, 0, 64], DecodeCut(2), []
    q = randn(4, 8 * 32)
    for block_size in (16, 64, 128):
        pool, tables, lens, _ = make_batch(seq_lens, 2, 32, block_size)
        outs.append(paged_decode(q, pool, tables, lens, 0.2, cut=cut, depth=3))
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])


@pytest.mark.skipif(ON_GPU, reason="looks into the interpreter")
@pytest.mark.parametrize("num_splits", [1, 2])
@pytest.mark.parametrize("block_size", [64, 128])
def test_entries_read_ahead_are_the_parts_own(block_size, num_splits, monkeypatch):
    """None behind a part's last tile: behind the last row's last entry the table may end."""
    seq_lens = [330, 0, 64, 129]
    pool, tables, lens, _ = make_batch(seq_lens, 1, 16, block_size)
    seen = []

    def entry(table, position, block, interpret):
        row = (int(table.handle.data[0]) - tables.data_ptr()) // (4 * tables.stride(0))
        seen.append((row, int(position.handle.data[0])))
        return read(table, position, block, interpret)

    read = attention_decode.table_entry
    monkeypatch.setattr(attention_decode, "table_entry", entry)
    paged_decode(randn(4, 2 * 16), pool, tables, lens, 0.2, cut=DecodeCut(num_splits))
    wanted = []
    for row, length in enumerate(seq_lens):
        tiles = -(-length // 64)
        part = max(1, -(-tiles // num_splits))
        for first in range(0, tiles, part):
            last = min(first + part, tiles) - 1
            wanted += [(row, 64 * i) for i in (*range(first, last + 1), last)]
    assert sorted(seen) == sorted(wanted)


@pytest.mark.skipif(not ON_GPU, reason="the interpreter has no pipeline")
@pytest.mark.parametrize("block_size", [16, 64, 128])
def test_no_depth_reads_what_it_must_not(block_size):
    seq_lens = [1, 0, 64, 700, 129]
    pool, tables, lens, dense = make_batch(seq_lens, 2, 64, block_size)
    q = randn(5, 8 * 64)
    wanted = reference(q, dense, 8, 64, 0.125)
    for depth in (1, 2, 3, 6):
        out = paged_decode(q, pool, tables, lens, 0.125, cut=DecodeCut(2), depth=depth)
        assert not out[1].any()
        assert relative_error(out, wanted) < 1e-2


@pytest.mark.skipif(not ON_GPU, reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("block_size", [16, 64])
def test_a_graph_stays_valid_while_lengths_change(block_size):
    pool, tables, lens, dense = make_batch([300, 200], 2, 64, block_size)
    q, workspace = randn(2, 8 * 64), DecodeWorkspace(2, 8, 64, DEVICE)
    out = paged_decode(q, pool, tables, lens, 0.125, None, workspace, DecodeCut(8))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        paged_decode(q, pool, tables, lens, 0.125, out, workspace, DecodeCut(8))
    for lengths in ([1, 200], [0, 64], [300, 129]):
        lens.copy_(torch.tensor(lengths))
        graph.replay()
        torch.cuda.synchronize()
        cut = [kv[:, :n] for kv, n in zip(dense, lengths, strict=True)]
        assert relative_error(out, reference(q, cut, 8, 64, 0.125)) < 1e-2


@pytest.mark.parametrize("batch", [1, 3, 8, 64, 256])
@pytest.mark.parametrize("num_kv_heads", [1, 4, 8])
@pytest.mark.parametrize("max_seq_len", [1, 64, 65, 4096, 131072])
def test_split_rule(batch, num_kv_heads, max_seq_len):
    splits = split_rule(batch, num_kv_heads, max_seq_len, 132)
    assert splits in (1, 2, 4, 8, 16, 32)
    assert splits <= max(1, -(-max_seq_len // 64))
    programs = batch * num_kv_heads * splits
    assert programs <= 2 * 132 or splits == 1
    assert splits == split_rule(batch, num_kv_heads, max_seq_len, 132)
    # As many as fit: twice as many would be too many programs, too many parts, or no tile each.
    assert 2 * programs > 2 * 132 or splits == 32 or 2 * splits > -(-max_seq_len // 64)


def test_split_rule_of_the_8b_shape():
    assert split_rule(1, 8, 8192, 132) == 32
    assert split_rule(1, 8, 512, 132) == 8
    assert split_rule(32, 8, 8192, 132) == 1


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("head_dim", [16, 64, 128, 256])
def test_the_pipeline_fits_shared_memory(head_dim, itemsize):
    tile_bytes = 2 * 64 * head_dim * itemsize
    for batch, num_splits in ((1, 32), (8, 4), (16, 2), (24, 1), (32, 1), (96, 1)):
        depth = pipeline_depth(batch, 8, num_splits, 132, tile_bytes, 64)
        assert 1 <= depth <= 3
        assert depth == 1 or 2 * depth * tile_bytes <= 227 << 10  # two programs an SM


def test_pipeline_depth_of_the_8b_shape():
    """The fastest of those measured with even rows, but for a percent."""
    assert not crowds(48 * 8, 132) and crowds(64 * 8, 132)
    tile_bytes = 2 * 64 * 128 * 2
    wanted = {1: 1, 2: 3, 4: 3, 8: 3, 16: 3, 24: 2, 32: 3, 48: 2, 64: 1, 96: 2, 128: 1}
    found = {
        batch: pipeline_depth(
            batch, 8, split_rule(batch, 8, 16384, 132), 132, tile_bytes, block_size=64
        )
        for batch in wanted
    }
    assert found == wanted


def test_pipeline_depth_of_other_tiles():
    """Half the head width: less depth would free no room. Huge tiles: there is room for one."""
    narrow, huge = 2 * 64 * 64 * 2, 2 * 64 * 512 * 4
    for batch, num_splits in ((1, 32), (16, 2), (32, 1), (64, 1)):
        assert pipeline_depth(batch, 8, num_splits, 132, narrow, 64) == 3
        assert pipeline_depth(batch, 8, num_splits, 132, huge, 64) == 1


def test_pipeline_depth_where_pages_are_smaller_than_a_tile():
    tile_bytes = 2 * 64 * 128 * 2
    depths = [pipeline_depth(32 // n, 8, n, 132, tile_bytes, 16) for n in (1, 2, 4)]
    assert depths == [3, 3, 1]
    assert pipeline_depth(64, 8, 1, 132, tile_bytes, 16) == 1


def test_waves():
    assert fills_waves(128, 132) and fills_waves(264, 132) and fills_waves(4008, 132)
    assert not fills_waves(133, 132) and not fills_waves(192, 132) and not fills_waves(100, 132)


def plain_extra_parts(seq_lens, num_splits, num_kv_heads, num_sms, shares=2):
    """(most tiles of a part, [(row, part)]), written out."""
    least = 16 if num_splits == 1 else 8
    tiles = [-(-length // 64) for length in seq_lens]
    limit = max(least, -(-sum(tiles) * num_kv_heads // (shares * num_sms)))
    named = []
    for row, count in enumerate(tiles):
        wanted = max(num_splits, min(MAX_SPLITS, -(-count // limit)))
        part = max(1, -(-count // wanted))
        named += [(row, index) for index in range(num_splits, -(-count // part))]
    return limit, named


UNEVEN = [
    ([8192, *[600] * 15, 0, 0], 1),
    ([8192, *[600] * 15, 0, 0], 2),
    ([600] * 16, 1),
    ([8192] * 24, 1),
    ([1, 131072, 0, 5000, 4999], 4),
    ([0] * 4, 1),
    ([100_000] * 3, 8),
]


@pytest.mark.parametrize("num_kv_heads", [1, 8])
@pytest.mark.parametrize(("seq_lens", "num_splits"), UNEVEN)
def test_rows_too_long_get_extra_parts(seq_lens, num_splits, num_kv_heads):
    lens = torch.tensor(seq_lens, dtype=torch.int32, device=DEVICE)
    words = extra_parts(lens, num_splits, num_kv_heads, 132).tolist()
    limit, named = plain_extra_parts(seq_lens, num_splits, num_kv_heads, 132)
    assert words[:HEADER] == [limit, len(named)]
    assert len(named) <= len(words) - HEADER == most_extra_parts(num_kv_heads, 132)
    assert [divmod(w, MAX_SPLITS) for w in words[HEADER : HEADER + len(named)]] == named


def test_most_extra_parts_are_never_too_few():
    generator = torch.Generator().manual_seed(3)
    for case in range(300):
        batch = int(torch.randint(1, 65, (), generator=generator))
        longest = 64 << (case % 9)
        lens = torch.randint(0, longest, (batch,), generator=generator).tolist()
        for num_kv_heads in (1, 4, 8, 32):
            named = plain_extra_parts(lens, 1 + case % 2, num_kv_heads, 132)[1]
            assert len(named) <= most_extra_parts(num_kv_heads, 132)


@pytest.mark.parametrize("num_splits", [1, 2])
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim", "block_size"), SHAPES)
@pytest.mark.parametrize("seq_lens", [[1, 0, 700, 130, 64], [0, 700, 64]])
def test_decode_with_extra_parts(
    seq_lens, num_heads, num_kv_heads, head_dim, block_size, num_splits
):
    """Few SMs and short parts, so that lengths which the interpreter can do are cut."""
    pool, tables, lens, dense = make_batch(seq_lens, num_kv_heads, head_dim, block_size)
    q = randn(len(seq_lens), num_heads * head_dim)
    workspace = DecodeWorkspace(8, num_heads, head_dim, DEVICE)
    scale = head_dim**-0.5
    extras = extra_parts(lens, num_splits, num_kv_heads, 16, least=1)
    assert extras[1] > 0
    cut = DecodeCut(num_splits, extras)
    for rubbish in (-1, 2**31 - 1):  # behind what is named; and the workspace serves twice
        extras[HEADER + int(extras[1]) :] = rubbish
        out = torch.full((len(seq_lens), num_heads * head_dim), torch.nan).to(q)
        paged_decode(q, pool, tables, lens, scale, out, workspace, cut)
        assert not out[seq_lens.index(0)].any()
        assert relative_error(out, reference(q, dense, num_heads, head_dim, scale)) < 1e-2


@pytest.mark.parametrize("block_size", [16, 64])
def test_extra_parts_change_no_bit_of_rows_that_are_not_cut(block_size):
    pool, tables, lens, _ = make_batch([60, 900, 64, 0], 2, 32, block_size)
    q = randn(4, 8 * 32)
    extras = extra_parts(lens, 1, 2, 16, least=2)
    assert extras[1] > 0
    cut = paged_decode(q, pool, tables, lens, 0.2, None, None, DecodeCut(1, extras))
    whole = paged_decode(q, pool, tables, lens, 0.2, cut=DecodeCut(1))
    for row in (0, 2, 3):
        assert torch.equal(cut[row], whole[row])


def test_parts_are_named_without_programmatic_launch():
    """Else the decode kernel, which reads them before it waits, could come too early."""
    assert "PDL" not in decode_parts._name_parts.arg_names


def test_the_engine_cuts_by_bucket_and_lengths():
    kernels = TritonKernels(DEVICE)
    lens = torch.tensor([8192, *[600] * 23], dtype=torch.int32, device=DEVICE)
    most = kernels.decode_cut(lens[:1], 1, 8, 8192)
    assert (most.num_splits, most.extra_parts) == (MAX_SPLITS, None)  # none left to name
    for bucket in (24, 64):
        cut = kernels.decode_cut(lens, bucket, 8, 8192)
        assert cut.num_splits == split_rule(bucket, 8, 8192, num_sms(DEVICE)) == 1
        wanted = extra_parts(lens, 1, 8, num_sms(DEVICE))
        named = HEADER + int(wanted[1])
        assert named > HEADER and torch.equal(cut.extra_parts[:named], wanted[:named])


@pytest.mark.skipif(not ON_GPU, reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("pdl", [False, True])
def test_a_graph_cuts_by_the_lengths_of_its_replay(pdl):
    pool, tables, lens, dense = make_batch([6000, 200, 300], 2, 64, 64)
    q, workspace = randn(3, 8 * 64), DecodeWorkspace(4, 8, 64, DEVICE)

    def step():
        extras = extra_parts(lens, 1, 2, 8, least=4)
        cut = DecodeCut(1, extras)
        q.mul_(1)  # the kernel without PDL in front of the first with it
        for _ in range(3):  # the last ones may begin before the first is over
            out = paged_decode(q, pool, tables, lens, 0.125, None, workspace, cut, pdl=pdl)
        return out, extras

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, extras = step()
    for lengths in ([6000, 200, 300], [6000, 0, 1], [64, 200, 256]):
        lens.copy_(torch.tensor(lengths))
        graph.replay()
        torch.cuda.synchronize()
        assert (extras[1] > 0) == (lengths[0] == 6000)
        cut = [kv[:, :n] for kv, n in zip(dense, lengths, strict=True)]
        assert relative_error(out, reference(q, cut, 8, 64, 0.125)) < 1e-2
