"""One rank's KV pool on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from pdrelay.core.kv_layout import KVLayout
from pdrelay.errors import TransportError
from pdrelay.transport.checksum import OfWords, PendingWords, PreparedChecksum
from pdrelay.transport.cuda.device import CudaDevice
from pdrelay.transport.cuda.page_sums import PageSums
from pdrelay.transport.cuda.tensors import tensor_at

if TYPE_CHECKING:
    from pdrelay.transport.cuda.page_sample import PageSampler

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
        self._sampler = self._prepare_sampler()

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

    def checksum(self, blocks: Sequence[int], in_order: bool, *, full: bool) -> PreparedChecksum:
        """`in_order`: the calling thread's current stream must be the engine's."""
        if self._sampler is not None and not full:
            beside: int = self._beside.cuda_stream
            return self._sampler.prepare(blocks, self.device.compute_stream if in_order else beside)
        read = partial(self._sums.summed if full else self._sums.sampled, blocks)
        return OfWords(read if in_order else partial(self._read_beside, read))

    def _read_beside(self, read: Callable[[], PendingWords]) -> PendingWords:
        with torch.cuda.stream(self._beside):
            return read()

    def _prepare_sampler(self) -> PageSampler | None:
        """Compiled and launched once; None where pages are odd, or without Triton."""
        try:
            from pdrelay.transport.cuda.page_sample import PageSampler, takes
        except ImportError:
            return None
        if not takes(self.layout):
            return None
        sampler = PageSampler(self.address, self.layout, self.device)
        sampler.prepare([0], self._beside.cuda_stream).begin().result()
        return sampler

    def close(self) -> None:
        """Free the pool. Nothing may run on it any more, here or at a peer."""
        self.device.make_current()
        if self._sampler is not None:
            self._sampler.close()
        self.device.driver.free(self.address)
        self.device.close()
