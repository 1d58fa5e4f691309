import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from model_harness import Batcher, random_tokens, small_config
from rank_threads import together

from pdrelay.engine.communicator import (
    GlooCommunicator,
    SingleCommunicator,
    ThreadGroup,
    connect_ranks,
)
from pdrelay.engine.kernels import load_kernels
from pdrelay.engine.models import build_model
from pdrelay.engine.shm_communicator import ShmCommunicator
from pdrelay.errors import LaunchError, WorkerLostError

torch.set_num_threads(1)


def shm(rank, world_size, directory, timeout_s=20.0):
    return ShmCommunicator(
        rank=rank,
        world_size=world_size,
        socket_path=str(directory / "tp"),
        timeout_s=timeout_s,
        kernels=load_kernels(),
    )


@pytest.fixture(params=["threads", "shm"])
def connect(request, tmp_path):
    """A function rank, world_size -> communicator, for use on threads."""
    groups = {}

    def threads(rank, world_size):
        return groups.setdefault(world_size, ThreadGroup(world_size)).rank(rank)

    return threads if request.param == "threads" else lambda r, n: shm(r, n, tmp_path)


@pytest.mark.parametrize("world_size", [2, 3])
def test_collectives(connect, world_size, tmp_path):
    sizes = [1, 7, 264, 5000, (1 << 18) + 3, *range(1, 60)]

    def run(rank):
        communicator = connect(rank, world_size)
        generator = torch.Generator().manual_seed(rank)
        results = []
        for size in sizes:
            x = torch.randn(size, generator=generator)
            results.append((x.clone(), communicator.all_reduce_(x)))
        gathered = communicator.all_gather_last_dim(torch.full((2, 3), float(rank + 1)))
        communicator.barrier()
        communicator.close()
        return results, gathered

    ranks = together(world_size, run)
    for i in range(len(sizes)):
        total = torch.stack([results[i][0] for results, _ in ranks]).double().sum(dim=0)
        for results, _ in ranks:
            assert torch.equal(results[i][1], ranks[0][0][i][1])
            torch.testing.assert_close(results[i][1].double(), total, rtol=0, atol=1e-5)
    wanted = torch.arange(1, world_size + 1).float().repeat_interleave(3).expand(2, -1)
    for _, gathered in ranks:
        assert torch.equal(gathered, wanted)
    assert list(tmp_path.iterdir()) == []  # nothing with a name is left


def test_sequence_numbers_wrap(tmp_path):
    def run(rank):
        communicator = shm(rank, 2, tmp_path)
        for start in (2**31 - 3, 2**32 - 3):
            # Move both ranks' counters at once, between two collectives.
            communicator._sequence = start
            communicator._array.view(np.uint32)[rank * 16] = start & 0xFFFFFFFF
            ready.wait()
            for i in range(6):
                assert communicator.all_reduce_(torch.full((4,), float(i))).tolist() == [2 * i] * 4
            ready.wait()

    ready = threading.Barrier(2, timeout=20)
    together(2, run)


def test_a_silent_peer_is_an_error_at_the_deadline(tmp_path):
    def run(rank):
        communicator = shm(rank, 2, tmp_path, timeout_s=0.3)
        if rank == 1:
            return
        with pytest.raises(WorkerLostError, match="rank 0"):
            communicator.all_reduce_(torch.ones(3))

    together(2, run)


@pytest.mark.parametrize("rank", [0, 1])
def test_peers_that_do_not_come(tmp_path, rank):
    with pytest.raises(LaunchError, match=f"rank {rank} did not meet"):
        shm(rank, 2, tmp_path, timeout_s=0.2)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(LaunchError, match=f"rank {rank} did not meet"):
        GlooCommunicator(rank=rank, world_size=2, store_path=str(tmp_path / "store"), timeout_s=0.2)


def test_one_rank_needs_no_peers(tmp_path):
    communicator = connect_ranks(
        rank=0,
        world_size=1,
        path=str(tmp_path / "tp"),
        timeout_s=1,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    assert isinstance(communicator, SingleCommunicator)
    x = torch.ones(2, 3)
    assert communicator.all_reduce_(x) is x and communicator.all_gather_last_dim(x) is x


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_two_processes_compute_what_one_does(tmp_path, dtype):
    """float32 goes through shared memory, bfloat16 through gloo."""
    script = Path(__file__).with_name("tp_rank.py")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), "2", str(tmp_path), dtype], env=environment
        )
        for rank in range(2)
    ]
    try:
        assert [process.wait(timeout=60) for process in ranks] == [0, 0]
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    config = small_config()
    batcher = Batcher(config, build_model("small", config, load_format="dummy"))
    sequence = batcher.sequence(random_tokens(40))
    batcher.step(chunks=[(sequence, 40)])
    wanted = batcher.logits_of(sequence)
    results = [torch.from_numpy(np.load(tmp_path / f"{rank}.npy")) for rank in range(2)]
    assert torch.equal(*results)
    error = (results[0] - wanted).norm() / wanted.norm()
    assert error < (1e-5 if dtype == "float32" else 0.1)
