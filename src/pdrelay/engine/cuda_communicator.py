"""Tensor-parallel ranks on GPUs of one host: an own kernel for small tensors, NCCL for large ones.

Everything is queued on the current stream and can be captured in CUDA graphs. Every rank must
capture and replay the same collectives in the same order, which follows from running the same
steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import torch

from pdrelay.engine.rendezvous import exchange
from pdrelay.errors import LaunchError, TransportError

# Bytes that one rank may store into peers' memory for one tensor, packets' flags aside. The one-
# shot kernel stores twice the tensor to each peer; NCCL starts later and moves fewer bytes.
_ONE_SHOT_BYTES = 2 << 20
# Of one piece where NCCL cannot be had: pieces cost a trip each, inboxes four times their size.
_PIECE_BYTES = 8 << 20
# A single row's norm is done by the linear layer behind it (`CudaOps.small_rows`), for nothing.
_FUSED_FROM = 2


class Collectives(Protocol):
    """One way to combine contiguous tensors over ranks. The fake joins threads of one process."""

    max_bytes: int  # of one tensor

    def all_reduce_(self, x: torch.Tensor) -> None:
        """Sum over ranks, in place."""

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """[world_size, *x.shape], a new tensor."""

    def all_reduce_add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> torch.Tensor | None:
        """As `Communicator.all_reduce_add_rms_norm`."""

    def check(self) -> None:
        """As `Communicator.check`."""

    def close(self) -> None: ...


def one_shot_limit(world_size: int) -> int:
    """Bytes of the largest tensor that the one-shot kernel should take where there is NCCL."""
    return _ONE_SHOT_BYTES // (world_size - 1) // 4096 * 4096


def pieces(flat: torch.Tensor, max_bytes: int) -> Iterator[torch.Tensor]:
    """Consecutive views of at most `max_bytes`; one for an empty tensor."""
    return iter(flat.split(max(1, max_bytes // flat.element_size())))


class CudaCommunicator:
    """`small` takes what fits it, `large` the rest; without `large`, `small` takes it in pieces."""

    def __init__(
        self,
        *,
        rank: int,
        world_size: int,
        device: torch.device,
        small: Collectives,
        large: Collectives | None,
        synchronize: Callable[[], None] = torch.cuda.synchronize,
    ) -> None:
        self.rank = rank
        self.world_size = world_size
        self._device = device
        self._small = small
        self._large = large
        self._synchronize = synchronize
        self.fuses_norms = True  # False: to compare with

    def all_reduce_(self, x: torch.Tensor) -> torch.Tensor:
        assert x.is_contiguous()
        if x.numel() == 0:
            return x
        large = self._taker(x)
        if large is not None:
            large.all_reduce_(x)
            return x
        for piece in pieces(x.view(-1), self._small.max_bytes):
            self._small.all_reduce_(piece)
        return x

    def all_reduce_add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> torch.Tensor | None:
        if not self.fuses_norms or x.shape[0] < _FUSED_FROM:
            return None
        return self._small.all_reduce_add_rms_norm(x, residual, weight, eps)

    def all_gather_last_dim(self, x: torch.Tensor) -> torch.Tensor:
        if x.numel() == 0:
            return x.new_empty((*x.shape[:-1], self.world_size * x.shape[-1]))
        x = x.contiguous()
        parts = self._gather(x)
        return parts.movedim(0, -2).reshape(*x.shape[:-1], self.world_size * x.shape[-1])

    def _gather(self, x: torch.Tensor) -> torch.Tensor:
        """[world_size, *x.shape]"""
        taker = self._taker(x) or self._fitting(x)
        if taker is not None:
            return taker.all_gather(x)
        parts = [self._small.all_gather(p) for p in pieces(x.view(-1), self._small.max_bytes)]
        return torch.cat(parts, dim=1).view(self.world_size, *x.shape)

    def _fitting(self, x: torch.Tensor) -> Collectives | None:
        """`small` where it takes x whole."""
        return self._small if x.numel() * x.element_size() <= self._small.max_bytes else None

    def _taker(self, x: torch.Tensor) -> Collectives | None:
        """`large` where there is one and x does not fit `small`."""
        return None if self._fitting(x) is not None else self._large

    def barrier(self) -> None:
        """Raises WorkerLostError when a peer does not come before the deadline."""
        self._small.all_reduce_(torch.zeros(2, device=self._device))
        self._synchronize()
        self.check()

    def check(self) -> None:
        self._small.check()
        if self._large is not None:
            self._large.check()

    def close(self) -> None:
        """Idempotent; no collective may follow."""
        self._synchronize()
        self._small.close()
        if self._large is not None:
            self._large.close()
            self._large = None


def connect_gpus(
    *, rank: int, world_size: int, path: str, timeout_s: float, device: torch.device
) -> CudaCommunicator:
    """Meet the other ranks at `path` plus a suffix. NCCL where every rank has a GPU of its own.

    Raises LaunchError at the deadline, or when the GPUs cannot map each other's memory.
    """
    from pdrelay.engine.ipc_collectives import IpcCollectives
    from pdrelay.engine.nccl_collectives import NcclCollectives
    from pdrelay.transport.cuda.driver import Driver

    if device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    try:
        driver = Driver()
        uuid = driver.uuid(device.index)
    except TransportError as error:
        raise LaunchError(f"tensor-parallel rank {rank}: {error}") from error
    uuids = exchange(
        f"{path}.gpus",
        rank=rank,
        world_size=world_size,
        payload=uuid.encode(),
        timeout_s=timeout_s,
    )
    has_nccl = len(set(uuids)) == world_size
    small = IpcCollectives(
        rank=rank,
        world_size=world_size,
        socket_path=f"{path}.ipc",
        timeout_s=timeout_s,
        max_bytes=one_shot_limit(world_size) if has_nccl else _PIECE_BYTES,
        device=device,
        driver=driver,
    )
    large = None
    if has_nccl:
        large = NcclCollectives(
            rank=rank,
            world_size=world_size,
            store_path=f"{path}.nccl",
            timeout_s=timeout_s,
            device=device,
        )
    return CudaCommunicator(
        rank=rank, world_size=world_size, device=device, small=small, large=large
    )
