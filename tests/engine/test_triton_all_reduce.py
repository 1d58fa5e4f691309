"""The kernel of the one-shot collectives, rank after rank in the interpreter: all send, then all
receive. What runs at the same time is in test_cuda_tp.py."""

from __future__ import annotations

import pytest
import torch
from triton_harness import ON_GPU  # first: it decides how triton runs

from pdrelay.engine.kernels.triton.all_reduce import (
    BLOCK,
    PACKET_BYTES,
    Exchange,
    inbox_bytes,
    state_words,
)

pytestmark = pytest.mark.skipif(ON_GPU, reason="runs in the interpreter; test_cuda_tp.py on GPUs")
MAX_BYTES = 3 * BLOCK * PACKET_BYTES


class Ranks:
    def __init__(self, world_size, first_count=0):
        inboxes = [
            torch.zeros(inbox_bytes(MAX_BYTES, world_size), dtype=torch.uint8)
            for _ in range(world_size)
        ]
        self.inboxes = inboxes
        self.ranks = [
            Exchange(
                rank=rank,
                world_size=world_size,
                max_bytes=MAX_BYTES,
                timeout_ns=1,
                inboxes=torch.tensor([inbox.data_ptr() for inbox in inboxes]),
                state=torch.zeros(state_words(MAX_BYTES), dtype=torch.int32),
                failed=torch.zeros(1, dtype=torch.int32),
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
