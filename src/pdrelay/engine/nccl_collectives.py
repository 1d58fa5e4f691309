"""Large collectives between GPUs through NCCL, by torch.distributed."""

from __future__ import annotations

import sys
from datetime import timedelta

import torch
import torch.distributed as dist

from pdrelay.errors import LaunchError


class NcclCollectives:
    """On NCCL's stream, which the current one waits for; CUDA graphs may capture them. NCCL
    refuses ranks that share a GPU."""

    max_bytes = sys.maxsize

    def __init__(
        self,
        *,
        rank: int,
        world_size: int,
        store_path: str,
        timeout_s: float,
        device: torch.device,
    ) -> None:
        """Meet the other ranks at `store_path`, a file that no earlier group has used.

        Raises LaunchError when they do not come before the deadline, or NCCL cannot start.
        """
        self._world_size = world_size
        timeout = timedelta(seconds=timeout_s)
        try:
            store = dist.FileStore(store_path, world_size)
            store.set_timeout(timeout)
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = timeout
            self._group = dist.ProcessGroupNCCL(store, rank, world_size, options)
            self.all_reduce_(torch.zeros(1, device=device))  # makes NCCL's communicator
            torch.cuda.synchronize(device)
        except RuntimeError as error:
            first = str(error).splitlines()[0]
            raise LaunchError(
                f"NCCL does not start on tensor-parallel rank {rank} ({first}): set "
                "NCCL_DEBUG=INFO to see more, or use --replicas"
            ) from error

    def all_reduce_(self, x: torch.Tensor) -> None:
        self._group.allreduce([x]).wait()

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        out = x.new_empty((self._world_size, *x.shape))
        self._group._allgather_base(out, x).wait()
        return out

    def all_reduce_add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> torch.Tensor | None:
        return None

    def check(self) -> None:
        """Nothing to see here: torch's watchdog ends the process when a peer does not answer."""

    def close(self) -> None:
        self._group.abort()
