"""All-reduce between ranks of one host through anonymous shared memory, by the C kernel.

The memory is a memfd that rank 0 hands out over a Unix socket: nothing has a name once the ranks
have met, so nothing can be left behind.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import socket
import struct
import time

import numpy as np
import torch

from pdrelay.engine.kernels import Kernels
from pdrelay.engine.rendezvous import connect_when_there
from pdrelay.errors import LaunchError, WorkerLostError

_LINE = 64  # bytes, as in cpu.c
_SLOT_FLOATS = 1 << 18  # 1 MiB a rank and slot; longer tensors go in pieces


class ShmCommunicator:
    """float32 on CPU. Every rank adds the parts in rank order: the same bits on every rank."""

    def __init__(
        self, *, rank: int, world_size: int, socket_path: str, timeout_s: float, kernels: Kernels
    ) -> None:
        """Meet the other ranks at `socket_path`, which must not exist yet.

        Raises LaunchError when they do not come before the deadline.
        """
        self.rank = rank
        self.world_size = world_size
        self._timeout_ms = int(timeout_s * 1000)
        self._all_reduce = kernels.all_reduce
        self._sequence = 0
        size = (world_size + 1) * _LINE + 2 * world_size * _SLOT_FLOATS * 4
        try:
            fd = (_lead if rank == 0 else _join)(socket_path, world_size, size, timeout_s)
        except (OSError, EOFError) as error:
            raise LaunchError(
                f"tensor-parallel rank {rank} did not meet its {world_size - 1} peers within "
                f"{timeout_s:g} s ({error}): see their logs"
            ) from error
        self._map = mmap.mmap(fd, size)
        os.close(fd)
        self._array = np.frombuffer(self._map, dtype=np.uint8)
        self._at = self._array.ctypes.data
        self.barrier()

    def all_reduce_(self, x: torch.Tensor) -> torch.Tensor:
        """Raises WorkerLostError when a peer does not answer before the deadline."""
        assert x.dtype == torch.float32 and x.is_contiguous()
        at, left = x.data_ptr(), x.numel()
        while left:
            count = min(left, _SLOT_FLOATS)
            self._sequence += 1
            if self._all_reduce(
                at,
                count,
                self.rank,
                self.world_size,
                self._at,
                self._sequence & 0xFFFFFFFF,
                self._timeout_ms,
            ):
                raise WorkerLostError(
                    f"a tensor-parallel peer of rank {self.rank} did not answer within "
                    f"{self._timeout_ms / 1000:g} s; see its log"
                )
            at += 4 * count
            left -= count
        return x

    def all_reduce_add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> torch.Tensor | None:
        return None

    def all_gather_last_dim(self, x: torch.Tensor) -> torch.Tensor:
        """As the sum of zero-padded parts: adding zeros changes no bit but the sign of -0."""
        width = x.shape[-1]
        out = x.new_zeros(*x.shape[:-1], self.world_size * width)
        out[..., self.rank * width : (self.rank + 1) * width] = x
        return self.all_reduce_(out)

    def barrier(self) -> None:
        self.all_reduce_(torch.zeros(1))

    def check(self) -> None:
        """Every collective waits and raises itself."""

    def close(self) -> None:
        """Drop the mapping. Idempotent; no collective may follow."""
        self._array = np.empty(0, dtype=np.uint8)
        with contextlib.suppress(BufferError):
            self._map.close()


def _lead(path: str, world_size: int, size: int, timeout_s: float) -> int:
    """Rank 0: make the memory and hand it to everyone. Returns its descriptor."""
    deadline = time.monotonic() + timeout_s
    fd = os.memfd_create("pdrelay-tp", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, size)
        line = world_size * _LINE
        os.pwrite(fd, struct.pack("=I", _SLOT_FLOATS), line)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            listener.bind(path)
            try:
                listener.listen(world_size)
                for _ in range(world_size - 1):
                    listener.settimeout(max(0.001, deadline - time.monotonic()))
                    peer, _ = listener.accept()
                    with peer:
                        socket.send_fds(peer, [b"\0"], [fd])
            finally:
                os.unlink(path)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _join(path: str, world_size: int, size: int, timeout_s: float) -> int:
    """Rank 1..: wait for rank 0's socket, take the descriptor."""
    with connect_when_there(path, time.monotonic() + timeout_s) as sock:
        _, fds, _, _ = socket.recv_fds(sock, 1, 1)
    if not fds:
        raise EOFError("rank 0 is gone")
    return fds[0]
