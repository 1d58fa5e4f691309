"""Tensor parallelism on GPUs, in two processes: on two GPUs where there are two, else on one that
takes turns (right, and slow: each exchange costs time slices)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)
pytest.importorskip("triton", reason="the CUDA engine needs the triton package")

TIMEOUT_S = 180.0


def run_ranks(task, directory):
    """Both ranks to their end. Fails with the output of one that failed."""
    script = Path(__file__).with_name("cuda_tp_rank.py")
    path = os.pathsep.join([str(script.parent), *filter(None, sys.path)])
    environment = os.environ | {
        "PYTHONPATH": path,
        "NCCL_NVLS_ENABLE": "0",
        "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    }
    logs = [directory / f"log.{rank}" for rank in range(2)]
    ranks = []
    try:
        for rank, log in enumerate(logs):
            with log.open("wb") as out:
                command = [sys.executable, str(script), task, str(rank), str(directory)]
                ranks.append(subprocess.Popen(command, env=environment, stdout=out, stderr=out))
        for rank in ranks:
            rank.wait(timeout=TIMEOUT_S)
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait(timeout=30)
    output = "\n".join(log.read_text(errors="replace")[-3000:] for log in logs)
    assert [rank.returncode for rank in ranks] == [0, 0], output


@pytest.mark.parametrize("task", ["collectives", "graphs"])
def test_collectives(task, tmp_path):
    run_ranks(task, tmp_path)
    left = {path.name for path in tmp_path.iterdir()} - {"log.0", "log.1", "tp.nccl"}
    assert left == set()


def test_a_silent_peer_is_noticed_at_the_deadline(tmp_path):
    run_ranks("lost", tmp_path)


@pytest.mark.parametrize("shape", ["tiny", "small"])
def test_two_ranks_choose_what_one_gpu_chooses(shape, tmp_path):
    run_ranks(shape, tmp_path)
    sampled = [np.load(tmp_path / f"sampled.{rank}.npy") for rank in range(2)]
    assert np.array_equal(*sampled), "ranks sample from the same bits"
    pools = [np.load(tmp_path / f"pool.{rank}.npy") for rank in range(2)]
    assert pools[0].any() and not np.array_equal(*pools), "each holds its own heads"
