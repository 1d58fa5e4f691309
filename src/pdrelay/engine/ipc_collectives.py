"""Small collectives between GPUs through memory that they map of each other over CUDA IPC."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from pdrelay.engine.kernels.triton.all_reduce import (
    BLOCK,
    PACKET_BYTES,
    Exchange,
    inbox_bytes,
    state_words,
)
from pdrelay.engine.kernels.triton.all_reduce_norm import block_of, reduce_add_rms_norm
from pdrelay.engine.rendezvous import exchange
from pdrelay.errors import LaunchError, TransportError, WorkerLostError

if TYPE_CHECKING:
    from pdrelay.transport.cuda.driver import Driver

_GRANULE = 2 << 20  # smaller allocations share a driver block, all of which a handle would name
_NORM_BYTES = 4 << 20  # of the inbox of rows to norm: 64 rows of 8 KiB between two ranks
_MAX_NORM_ROWS = 64  # longer batches hide a kernel's start better


class IpcCollectives:
    """One kernel a collective (`kernels/triton/all_reduce.py`), on the current stream; CUDA graphs
    may capture them. Ranks may share a GPU, which time-slices them: correct, and slow."""

    def __init__(
        self,
        *,
        rank: int,
        world_size: int,
        socket_path: str,
        timeout_s: float,
        max_bytes: int,
        device: torch.device,
        driver: Driver,
        block: int = BLOCK,
        pdl: bool = True,
    ) -> None:
        """Meet the other ranks at `socket_path`, which must not exist yet. `block`, `pdl`: of the
        kernel's launches.

        Raises LaunchError when they do not come before the deadline, or their memory cannot be
        mapped.
        """
        self.max_bytes = max_bytes
        self._rank = rank
        self._world_size = world_size
        self._timeout_s = timeout_s
        self._driver = driver
        self._context = driver.context(device.index)
        norm_at = inbox_bytes(max_bytes, world_size, block)
        num_bytes = -(-(norm_at + _NORM_BYTES) // _GRANULE) * _GRANULE
        try:
            self._inbox = driver.allocate(num_bytes)
            driver.zero(self._inbox, num_bytes)
            driver.synchronize_stream(0)  # before a peer can know the address
            handle = driver.ipc_handle(self._inbox)
        except TransportError as error:
            raise LaunchError(
                f"{device} cannot share {num_bytes >> 20} MiB with tensor-parallel peers ({error}):"
                " free the GPU, or use --replicas"
            ) from error
        handles = exchange(
            socket_path, rank=rank, world_size=world_size, payload=handle, timeout_s=timeout_s
        )
        self._peers: list[int] = []
        addresses = [self._open(i, handle) for i, handle in enumerate(handles)]
        self._failed = torch.zeros(1, dtype=torch.int32, pin_memory=True)
        self._failed_view = self._failed.numpy()
        self._exchange = Exchange(
            rank=rank,
            world_size=world_size,
            max_bytes=max_bytes,
            timeout_us=int(timeout_s * 1e6),
            inboxes=torch.tensor(addresses, dtype=torch.int64, device=device),
            state=torch.zeros(state_words(max_bytes, block), dtype=torch.int32, device=device),
            failed=self._failed,
            pdl=pdl,
            block=block,
        )
        # The exchange of rows to norm: its block becomes known with the first row.
        self._norm_inboxes = self._exchange.inboxes + norm_at
        self._norm_state = torch.zeros(2 * _MAX_NORM_ROWS, dtype=torch.int32, device=device)
        self._norm_exchange: Exchange | None = None

    def _open(self, rank: int, handle: bytes) -> int:
        if rank == self._rank:
            return self._inbox
        try:
            address = self._driver.open_ipc(handle)
        except TransportError as error:
            raise LaunchError(
                f"tensor-parallel rank {self._rank} cannot map memory of rank {rank} ({error}): "
                "both GPUs must be visible to both ranks and reach each other (nvidia-smi topo "
                "-p2p r), and containers must share IPC and PID namespaces; or use --replicas"
            ) from error
        self._peers.append(address)
        return address

    def all_reduce_(self, x: torch.Tensor) -> None:
        packed = _packed(x)
        self._exchange.reduce(packed, packed)
        if packed is not x:
            x.copy_(packed[: x.numel()].view(x.shape))

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        packed = _packed(x)
        out = packed.new_empty((self._world_size, packed.numel()))
        self._exchange.gather(packed, out)
        return out[:, : x.numel()].reshape(self._world_size, *x.shape)

    def all_reduce_add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> torch.Tensor | None:
        row_bytes = x.shape[1] * x.element_size()
        if row_bytes % PACKET_BYTES or x.shape[0] > _MAX_NORM_ROWS:
            return None
        block = block_of(x.shape[1], x.dtype)
        if self._norm_exchange is None:
            self._norm_exchange = replace(
                self._exchange,
                max_bytes=_norm_rows(block, self._world_size) * block * PACKET_BYTES,
                inboxes=self._norm_inboxes,
                state=self._norm_state,
                block=block,
            )
        exchange = self._norm_exchange
        if exchange.block != block or x.shape[0] * block * PACKET_BYTES > exchange.max_bytes:
            return None
        out = torch.empty_like(residual)
        reduce_add_rms_norm(exchange, x, residual, weight, eps, out)
        return out

    def check(self) -> None:
        if self._failed_view[0]:
            raise WorkerLostError(
                f"a tensor-parallel peer of rank {self._rank} did not answer within "
                f"{self._timeout_s:g} s; see its log"
            )

    def close(self) -> None:
        """Idempotent. This rank's kernels must be done, so that it has every peer's last packets;
        a peer that is behind reads its own memory only."""
        self._driver.make_current(self._context)
        while self._peers:
            self._driver.close_ipc(self._peers.pop())
        if self._inbox:
            self._driver.free(self._inbox)
            self._inbox = 0


def _norm_rows(block: int, world_size: int) -> int:
    """Rows that the norm's part of the inbox has places for."""
    return min(_MAX_NORM_ROWS, _NORM_BYTES // (4 * world_size * block * PACKET_BYTES))


def _packed(x: torch.Tensor) -> torch.Tensor:
    """x itself, or flat and padded to whole packets."""
    num_bytes = x.numel() * x.element_size()
    if num_bytes % PACKET_BYTES == 0 and x.data_ptr() % PACKET_BYTES == 0:
        return x
    numel = -(-num_bytes // PACKET_BYTES) * PACKET_BYTES // x.element_size()
    packed = x.new_zeros(numel)
    packed[: x.numel()] = x.view(-1)
    return packed
