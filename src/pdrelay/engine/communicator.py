"""What tensor-parallel ranks say to each other in a forward pass.

Every rank makes the same calls in the same order with the same shapes.
"""

from __future__ import annotations

import os
import threading
from datetime import timedelta
from typing import Protocol

import torch
import torch.distributed as dist

from pdrelay.engine.kernels import load_kernels
from pdrelay.errors import LaunchError


class Communicator(Protocol):
    rank: int
    world_size: int

    def all_reduce_(self, x: torch.Tensor) -> torch.Tensor:
        """Sum over ranks, in place; returns x. The same bits on every rank."""

    def all_reduce_add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> torch.Tensor | None:
        """`Ops.add_rms_norm` of the sum of x over ranks, in one kernel; None, and nothing done,
        where the two are better done one after the other. The same answer on every rank."""

    def all_gather_last_dim(self, x: torch.Tensor) -> torch.Tensor:
        """[.., n] of every rank, in rank order: [.., world_size * n], on every rank."""

    def barrier(self) -> None: ...

    def check(self) -> None:
        """Raises WorkerLostError when a queued collective that is over found a peer silent: what
        it gave is rubbish. Costs the host a memory read."""

    def close(self) -> None: ...


class SingleCommunicator:
    """One rank: nothing to say."""

    rank = 0
    world_size = 1

    def all_reduce_(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def all_reduce_add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> torch.Tensor | None:
        return None

    def all_gather_last_dim(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def barrier(self) -> None:
        pass

    def check(self) -> None:
        pass

    def close(self) -> None:
        pass


class GlooCommunicator:
    """Ranks of one host through torch.distributed's gloo, on the loopback interface."""

    def __init__(self, *, rank: int, world_size: int, store_path: str, timeout_s: float) -> None:
        """Meet the other ranks at `store_path`, a file that no earlier group has used.

        Raises LaunchError when they do not come before the deadline.
        """
        self.rank = rank
        self.world_size = world_size
        timeout = timedelta(seconds=timeout_s)
        try:
            store = dist.FileStore(store_path, world_size)
            store.set_timeout(timeout)
            device = dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")
            options = dist.ProcessGroupGloo._Options()
            options._devices = [device]
            options._timeout = timeout
            self._group = dist.ProcessGroupGloo(store, rank, world_size, options)
            self.barrier()
        except RuntimeError as error:
            raise LaunchError(
                f"tensor-parallel rank {rank} did not meet its {world_size - 1} peers within "
                f"{timeout_s:g} s: see their logs"
            ) from error

    def all_reduce_(self, x: torch.Tensor) -> torch.Tensor:
        self._group.allreduce([x]).wait()
        return x

    def all_reduce_add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> torch.Tensor | None:
        return None

    def all_gather_last_dim(self, x: torch.Tensor) -> torch.Tensor:
        parts = [torch.empty_like(x) for _ in range(self.world_size)]
        self._group.allgather([parts], [x]).wait()
        return torch.cat(parts, dim=-1)

    def barrier(self) -> None:
        self._group.barrier().wait()

    def check(self) -> None:
        """Every collective waits and raises itself."""

    def close(self) -> None:
        del self._group


def connect_ranks(
    *,
    rank: int,
    world_size: int,
    path: str,
    timeout_s: float,
    dtype: torch.dtype,
    device: torch.device,
) -> Communicator:
    """The fastest communicator for the ranks of an instance; they meet at `path` plus a suffix.

    On GPUs memory that they map of each other, and NCCL. Shared memory for float32 on CPU where
    the C kernels run (a small all-reduce takes 3 us there, 200 us in gloo), else gloo. Every rank
    must find the same answer, so all run on one host.
    Raises LaunchError at the deadline.
    """
    if world_size == 1:
        return SingleCommunicator()
    if device.type == "cuda":
        from pdrelay.engine.cuda_communicator import connect_gpus

        return connect_gpus(
            rank=rank, world_size=world_size, path=path, timeout_s=timeout_s, device=device
        )
    kernels = load_kernels()
    shared_memory = hasattr(os, "memfd_create") and device.type == "cpu"
    if kernels is not None and shared_memory and dtype == torch.float32:
        from pdrelay.engine.shm_communicator import ShmCommunicator

        return ShmCommunicator(
            rank=rank,
            world_size=world_size,
            socket_path=f"{path}.shm",
            timeout_s=timeout_s,
            kernels=kernels,
        )
    return GlooCommunicator(
        rank=rank, world_size=world_size, store_path=f"{path}.gloo", timeout_s=timeout_s
    )


class ThreadGroup:
    """Ranks as threads of one process, for tests: `group.rank(r)` is rank r's communicator."""

    def __init__(self, world_size: int, timeout_s: float = 30.0) -> None:
        self.world_size = world_size
        self._barrier = threading.Barrier(world_size, timeout=timeout_s)
        self._parts: list[torch.Tensor | None] = [None] * world_size

    def rank(self, rank: int) -> ThreadCommunicator:
        return ThreadCommunicator(self, rank)

    def exchange(self, rank: int, x: torch.Tensor) -> list[torch.Tensor]:
        """Everyone's tensor, in rank order."""
        self._parts[rank] = x.clone()
        self._barrier.wait()
        parts = [part for part in self._parts if part is not None]
        assert len(parts) == self.world_size
        self._barrier.wait()
        return parts


class ThreadCommunicator:
    def __init__(self, group: ThreadGroup, rank: int) -> None:
        self._group = group
        self.rank = rank
        self.world_size = group.world_size

    def all_reduce_(self, x: torch.Tensor) -> torch.Tensor:
        parts = self._group.exchange(self.rank, x)
        return x.copy_(torch.stack(parts).sum(dim=0))

    def all_reduce_add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> torch.Tensor | None:
        return None

    def all_gather_last_dim(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat(self._group.exchange(self.rank, x), dim=-1)

    def barrier(self) -> None:
        self._group.exchange(self.rank, torch.empty(0))

    def check(self) -> None:
        pass

    def close(self) -> None:
        pass
