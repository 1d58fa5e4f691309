"""One rank's KV pool on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from pdrelay.core.kv_layout import KVLayout
from pdrelay.errors import TransportError
from pdrelay.transport.cuda.device import CudaDevice
from pdrelay.transport.cuda.page_sums import PageSums
from pdrelay.transport.cuda.tensors import tensor_at
from pdrelay.transport.device import PendingWords, PreparedWords

# Smaller allocations share a driver block, all of which a handle would name.
_GRANULE = 2 << 20


class CudaPages:
    """An allocation of its own, zeroed, so that its IPC handle names exactly the pool.

    `tensor`: torch, `layout.shape`, on `cuda:ordinal`. It and all views of it must be gone, or
    unused, when `close` frees the memory. `compute_stream` is the engine's (`CudaDevice`).
    """

    def __init__(self, layout: KVLayout, device: CudaDevice) -> None:
        """Raises TransportError when the GPU has not enough memory."""
        self.layout = layout
        self.device: CudaDevice = device
        num_bytes = -(-layout.total_bytes // _GRANULE) * _GRANULE
        device.make_current()
        try:
            self.address = device.driver.allocate(num_bytes)
        except TransportError as error:
            raise TransportError(
                f"no {num_bytes / 2**30:.1f} GiB for KV pages on {device.name} ({error}): lower "
                "--kv-cache-memory, or free the GPU"
            ) from error
        device.driver.zero(self.address, num_bytes)
        device.driver.synchronize_stream(0)
        self.tensor: torch.Tensor = tensor_at(
            self.address, layout.shape, layout.dtype, device.ordinal
        )
        self._sums = PageSums(self.tensor, layout)
        # For pages that no step writes: neither waits for the other.
        self._beside: Any = torch.cuda.Stream(device.ordinal, priority=-5)

    @classmethod
    def create(cls, layout: KVLayout, ordinal: int) -> CudaPages:
        """With torch's current stream of that GPU as the one that the engine launches on."""
        with torch.cuda.device(ordinal):
            device = CudaDevice(ordinal)
            device.compute_stream = torch.cuda.current_stream().cuda_stream
            return cls(layout, device)

    def ipc_handle(self) -> bytes:
        try:
            return self.device.driver.ipc_handle(self.address)
        except TransportError as error:
            raise TransportError(
                f"{self.device.name} does not share its memory with other processes ({error}): "
                "choose --transport nccl or tcp"
            ) from error

    def sampled(self, blocks: Sequence[int], in_order: bool) -> PreparedWords:
        """`in_order`: the calling thread's current stream must be the engine's."""
        if in_order:
            return self._sums.sampled(blocks)
        return _Beside(self._beside, partial(self._sums.sampled, blocks))

    def summed(self, blocks: Sequence[int], in_order: bool) -> PreparedWords:
        if in_order:
            return self._sums.summed(blocks)
        return _Beside(self._beside, partial(self._sums.summed, blocks))

    def close(self) -> None:
        """Free the pool. Nothing may run on it any more, here or at a peer."""
        self.device.make_current()
        self.device.driver.free(self.address)
        self.device.close()


class _Beside:
    """Everything on a stream of its own."""

    def __init__(self, stream: Any, prepare: Callable[[], PreparedWords]) -> None:
        self._stream = stream
        self._prepare = prepare

    def read(self) -> PendingWords:
        with torch.cuda.stream(self._stream):
            return self._prepare().read()
