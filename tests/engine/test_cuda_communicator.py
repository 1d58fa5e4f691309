"""Which collectives take which tensors, on threads; and how ranks meet. Kernels are elsewhere."""

from __future__ import annotations

import sys

import pytest
import torch
from model_harness import Batcher, random_tokens, small_config
from rank_threads import together

from pdrelay.engine.communicator import ThreadGroup
from pdrelay.engine.cuda_communicator import CudaCommunicator, one_shot_limit, pieces
from pdrelay.engine.layers import TorchOps
from pdrelay.engine.models import build_model
from pdrelay.engine.rendezvous import exchange
from pdrelay.errors import LaunchError, WorkerLostError

torch.set_num_threads(1)
CPU = torch.device("cpu")


class ThreadCollectives:
    """Records what it is given, as (operation, elements)."""

    def __init__(self, communicator, max_bytes=sys.maxsize):
        self.communicator = communicator
        self.max_bytes = max_bytes
        self.calls = []
        self.error = None
        self.closed = 0

    def _note(self, what, x):
        assert x.is_contiguous() and x.numel() * x.element_size() <= self.max_bytes
        self.calls.append((what, x.numel()))

    def all_reduce_(self, x):
        self._note("reduce", x)
        self.communicator.all_reduce_(x)

    def all_gather(self, x):
        self._note("gather", x)
        rank = self.communicator
        return torch.stack(rank._group.exchange(rank.rank, x))

    def all_reduce_add_rms_norm(self, x, residual, weight, eps):
        self._note("norm", x)
        self.communicator.all_reduce_(x)
        return TorchOps().add_rms_norm(x, residual, weight, eps)

    def check(self):
        if self.error is not None:
            raise self.error

    def close(self):
        self.closed += 1


def on_threads(world_size, has_nccl, work, max_bytes=64):
    """work(communicator) on every rank: (result, small's calls, large's calls) of each."""
    small, large = ThreadGroup(world_size), ThreadGroup(world_size)

    def run(rank):
        parts = ThreadCollectives(small.rank(rank), max_bytes)
        whole = ThreadCollectives(large.rank(rank)) if has_nccl else None
        communicator = CudaCommunicator(
            rank=rank,
            world_size=world_size,
            device=CPU,
            small=parts,
            large=whole,
            synchronize=lambda: None,
        )
        return work(communicator), parts.calls, whole.calls if whole else []

    return together(world_size, run)


@pytest.mark.parametrize("has_nccl", [True, False])
@pytest.mark.parametrize("world_size", [2, 3])
def test_collectives_of_any_size(world_size, has_nccl):
    shapes = [(1, 1), (2, 8), (1, 17), (5, 7), (3, 64)]  # max_bytes: 16 floats

    def work(communicator):
        results = []
        for i, shape in enumerate(shapes):
            generator = torch.Generator().manual_seed(10 * i + communicator.rank)
            x = torch.randn(shape, generator=generator)
            given = x.clone()
            reduced = x.clone()
            assert communicator.all_reduce_(reduced) is reduced
            results.append((given, reduced, communicator.all_gather_last_dim(x)))
            assert torch.equal(x, given)
        communicator.barrier()
        return results

    ranks = on_threads(world_size, has_nccl, work)
    for i, shape in enumerate(shapes):
        given = [results[i][0] for results, _, _ in ranks]
        for results, _, _ in ranks:
            torch.testing.assert_close(results[i][1], torch.stack(given).sum(0))
            assert torch.equal(results[i][1], ranks[0][0][i][1])
            assert torch.equal(results[i][2], torch.cat(given, dim=-1)), shape
    for _, small, large in ranks:
        assert small == ranks[0][1] and large == ranks[0][2], "the same calls on every rank"
        if has_nccl:
            assert large == [(what, n) for n in (17, 35, 192) for what in ("reduce", "gather")]


def test_transposed_and_empty_tensors():
    def work(communicator):
        x = torch.arange(6.0).view(2, 3).t()
        return communicator.all_gather_last_dim(x), communicator.all_gather_last_dim(x[:0])

    for (gathered, empty), _, _ in on_threads(2, True, work):
        x = torch.arange(6.0).view(2, 3).t()
        assert torch.equal(gathered, torch.cat([x, x], dim=-1))
        assert empty.shape == (0, 4)


@pytest.mark.parametrize("fuses", [True, False])
def test_a_model_with_fused_norms_gives_what_one_rank_gives(fuses):
    config = small_config()
    tokens = random_tokens(40)

    def logits(communicator, world_size):
        model = build_model("small", config, load_format="dummy", communicator=communicator)
        batcher = Batcher(config, model, tp_size=world_size)
        sequence = batcher.sequence(tokens)
        batcher.step(chunks=[(sequence, 39)])
        batcher.step(decodes=[sequence])  # a single row: not fused
        return batcher.logits_of(sequence)

    def work(communicator):
        communicator.fuses_norms = fuses
        return logits(communicator, 2)

    wanted = logits(None, 1)
    for got, small, _ in on_threads(2, True, work, max_bytes=1 << 20):
        assert (got - wanted).norm() < 1e-5 * wanted.norm()
        norms = [n for what, n in small if what == "norm"]
        # Two a layer, but for the first layer's first, which has nothing to add.
        assert norms == [39 * 64] * (2 * config.num_layers - 1) * fuses


def test_pieces_are_views_in_order():
    x = torch.arange(10, dtype=torch.int32)
    cut = list(pieces(x, 16))
    assert [piece.tolist() for piece in cut] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert cut[1].data_ptr() == x.data_ptr() + 16


def test_more_ranks_send_less_each_by_the_kernel():
    limits = [one_shot_limit(n) for n in (2, 3, 4, 8)]
    assert limits == sorted(limits, reverse=True) and limits[0] == 2 << 20
    assert all(limit % 4096 == 0 and limit > 0 for limit in limits)


def test_a_lost_peer_is_an_error_of_check_and_barrier():
    group = ThreadGroup(1)
    small, large = (ThreadCollectives(group.rank(0)) for _ in range(2))
    communicator = CudaCommunicator(
        rank=0, world_size=2, device=CPU, small=small, large=large, synchronize=lambda: None
    )
    communicator.check()
    small.error = WorkerLostError("gone")
    with pytest.raises(WorkerLostError, match="gone"):
        communicator.check()
    with pytest.raises(WorkerLostError, match="gone"):
        communicator.barrier()
    communicator.close()
    communicator.close()
    assert large.closed == 1


@pytest.mark.parametrize("world_size", [2, 5])
def test_ranks_exchange_bytes(tmp_path, world_size):
    def run(rank):
        return exchange(
            str(tmp_path / "meet"),
            rank=rank,
            world_size=world_size,
            payload=bytes([rank]) * (rank + 1),
            timeout_s=20,
        )

    for payloads in together(world_size, run):
        assert payloads == [bytes([rank]) * (rank + 1) for rank in range(world_size)]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_that_do_not_come(tmp_path, rank):
    with pytest.raises(LaunchError, match=f"rank {rank} did not meet"):
        exchange(str(tmp_path / "meet"), rank=rank, world_size=2, payload=b"", timeout_s=0.2)
    assert list(tmp_path.iterdir()) == []
