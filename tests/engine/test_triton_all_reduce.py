"""The kernel of the one-shot collectives, rank after rank in the interpreter: all send, then all
receive. What runs at the same time is in test_cuda_tp.py."""

from __future__ import annotations

import pytest
import torch
from triton_harness import (
    EPS,
    ON_GPU,
    equal_but_for_rounding,
    randn,
)  # first: it decides how triton runs

from pdrelay.engine.kernels.triton.all_reduce import (
    BLOCK,
    PACKET_BYTES,
    Exchange,
    inbox_bytes,
    state_words,
)
from pdrelay.engine.kernels.triton.all_reduce_norm import block_of, reduce_add_rms_norm
from pdrelay.engine.layers import TorchOps

pytestmark = pytest.mark.skipif(ON_GPU, reason="runs in the interpreter; test_cuda_tp.py on GPUs")
MAX_BYTES = 3 * BLOCK * PACKET_BYTES


class Ranks:
    def __init__(self, world_size, first_count=0, block=BLOCK):
        inboxes = [
            torch.zeros(inbox_bytes(MAX_BYTES, world_size, block), dtype=torch.uint8)
            for _ in range(world_size)
        ]
        self.inboxes = inboxes
        self.ranks = [
            Exchange(
                rank=rank,
                world_size=world_size,
                max_bytes=MAX_BYTES,
                timeout_us=1,
                inboxes=torch.tensor([inbox.data_ptr() for inbox in inboxes]),
                state=torch.zeros(state_words(MAX_BYTES, block), dtype=torch.int32),
                failed=torch.zeros(1, dtype=torch.int32),
                block=block,
            )
            for rank in range(world_size)
        ]
        for rank in self.ranks:
            rank.state[0::2] = first_count

    def reduce(self, parts):
        outs = [torch.full_like(part, torch.nan) for part in parts]
        for phase in ("send", "receive"):
            for rank, part, out in zip(self.ranks, parts, outs, strict=True):
                rank.reduce(part, out, phase=phase)
        return outs

    def gather(self, parts):
        outs = [part.new_zeros((len(parts), *part.shape)) for part in parts]
        for phase in ("send", "receive"):
            for rank, part, out in zip(self.ranks, parts, outs, strict=True):
                rank.gather(part, out, phase=phase)
        return outs

    def failed(self):
        return [bool(rank.failed[0]) for rank in self.ranks]


def parts_of(world_size, numel, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(numel, generator=generator).to(dtype) for _ in range(world_size)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("world_size", [2, 3])
def test_sums_in_rank_order(world_size, dtype):
    ranks = Ranks(world_size)
    most = MAX_BYTES // dtype.itemsize
    for seed, numel in enumerate((4, most, 1028, 8, most - 4)):  # both parities, other grids
        parts = parts_of(world_size, numel, dtype, seed)
        outs = ranks.reduce(parts)
        wanted = torch.zeros(numel)
        for part in parts:
            wanted += part.float()
        for out in outs:
            assert torch.equal(out, outs[0])
        if dtype == torch.float32:
            assert torch.equal(outs[0], wanted)
        else:  # the interpreter cuts bfloat16 off where hardware rounds
            torch.testing.assert_close(outs[0].float(), wanted, rtol=2**-7, atol=1e-6)
    assert not any(ranks.failed())


@pytest.mark.parametrize("dtype", [torch.int64, torch.bfloat16])
def test_gathers_bits(dtype):
    ranks = Ranks(3)
    for numel in (4, 700):
        parts = [torch.randint(-9999, 9999, (numel,)).to(dtype) for _ in range(3)]
        for out in ranks.gather(parts):
            assert torch.equal(out, torch.stack(parts))
    assert not any(ranks.failed())


def test_in_place():
    ranks = Ranks(2)
    parts = parts_of(2, 600, torch.float32)
    wanted = parts[0] + parts[1]
    for phase in ("send", "receive"):
        for rank, part in zip(ranks.ranks, parts, strict=True):
            rank.reduce(part, part, phase=phase)
    # Here the parts were sent before either was overwritten, as in one launch.
    assert torch.equal(parts[0], wanted) and torch.equal(parts[1], wanted)


@pytest.mark.parametrize("count", [2**31 - 2, -2])
def test_the_counter_wraps(count):
    """Past the greatest int32, and past 0, which a fresh inbox holds."""
    ranks = Ranks(2, count)
    for seed in range(5):
        parts = parts_of(2, 700, torch.float32, seed)
        assert torch.equal(ranks.reduce(parts)[0], parts[0] + parts[1])
    assert not any(ranks.failed())


@pytest.mark.parametrize("before", [0, 1, 2, 3])
def test_a_silent_peer_is_noticed(before):
    """Whatever older packets lie in the inbox; and by every exchange from then on."""
    ranks = Ranks(2)
    parts = parts_of(2, 700, torch.float32)
    for _ in range(before):
        ranks.reduce(parts)
    ranks.ranks[0].reduce(parts[0], torch.empty_like(parts[0]))
    assert ranks.failed() == [True, False]
    assert ranks.ranks[0].state[1] == 1


def test_torn_packets_are_not_taken():
    ranks = Ranks(2)
    parts = parts_of(2, 4, torch.float32)
    for rank, part in zip(ranks.ranks, parts, strict=True):
        rank.reduce(part, torch.empty_like(part), phase="send")
    words = ranks.inboxes[0].view(torch.int32)
    second_flags = words.view(-1, 4)[:, 3]
    assert second_flags.count_nonzero() > 0
    second_flags[second_flags.nonzero()[0]] = 0
    ranks.ranks[0].reduce(parts[0], torch.empty_like(parts[0]), phase="receive")
    assert ranks.failed()[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("num_rows", "width"), [(1, 64), (3, 200), (2, 512)])
@pytest.mark.parametrize("world_size", [2, 3])
def test_reduce_add_rms_norm(world_size, num_rows, width, dtype):
    """As torch's sum, then torch's norm."""
    ranks = Ranks(world_size, block=block_of(width, dtype))
    weight = randn(width, dtype=dtype, seed=50)
    for step in range(3):
        parts = [randn(num_rows, width, dtype=dtype, seed=9 * step + r) for r in range(world_size)]
        residuals = [randn(num_rows, width, dtype=dtype, seed=40) for _ in range(world_size + 1)]
        outs = [torch.full_like(part, torch.nan) for part in parts]
        for phase in ("send", "receive"):
            for rank, x, residual, out in zip(ranks.ranks, parts, residuals, outs, strict=False):
                reduce_add_rms_norm(rank, x, residual, weight, EPS, out, phase=phase)
        for out, residual in zip(outs, residuals, strict=False):
            assert torch.equal(out, outs[0]) and torch.equal(residual, residuals[0])
        wanted = residuals[-1]
        total = torch.stack(parts).float().sum(dim=0).to(dtype)
        TorchOps().add_rms_norm(total, wanted, weight, EPS)
        normed = TorchOps().add_rms_norm(None, residuals[0].clone(), weight, EPS)
        if dtype == torch.float32:
            torch.testing.assert_close(residuals[0], wanted, rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(outs[0], normed, rtol=1e-5, atol=1e-6)
        else:  # the interpreter cuts bfloat16 off where hardware rounds
            scale = wanted.abs().max()
            assert (residuals[0].float() - wanted.float()).abs().max() < 2**-6 * scale
            assert equal_but_for_rounding(outs[0], normed, steps=2)
    assert not any(ranks.failed())


def test_a_silent_peer_of_the_norm_is_noticed():
    ranks = Ranks(2, block=block_of(64, torch.float32))
    x, residual, weight = (
        randn(2, 64, dtype=torch.float32),
        randn(2, 64, dtype=torch.float32),
        randn(64, dtype=torch.float32),
    )
    reduce_add_rms_norm(ranks.ranks[1], x, residual, weight, EPS, torch.empty_like(x))
    assert ranks.failed() == [False, True]
