"""Pages on a GPU for the conformance suite, as far as one process can have them."""

from __future__ import annotations

import numpy as np
import torch

from pdrelay.transport.cuda.device import CudaDevice
from pdrelay.transport.cuda.pages import CudaPages


class CudaArray:
    """A GPU's pages as bytes, read and written from the host like a numpy array."""

    def __init__(self, tensor, layout):
        shape = (layout.num_layers, layout.num_blocks, layout.layer_block_bytes)
        self._bytes = tensor.view(-1).view(torch.uint8).view(shape)
        self.shape = shape

    def __getitem__(self, key):
        torch.cuda.synchronize()
        return np.asarray(self)[key]

    def __setitem__(self, key, value):
        whole = np.asarray(self).copy()
        whole[key] = value
        self._bytes.copy_(torch.from_numpy(whole))
        torch.cuda.synchronize()

    def __array__(self, dtype=None, copy=None):
        torch.cuda.synchronize()
        return self._bytes.cpu().numpy()

    def copy(self):
        return np.asarray(self).copy()


class LocalDevice(CudaDevice):
    """A process cannot open its own IPC handle: here it gets the address itself."""

    def __init__(self, fabric):
        super().__init__(0)
        self.fabric = fabric

    def open_peer(self, handle, num_bytes):
        super_handles = {pages.ipc_handle(): pages for pages in self.fabric.cuda}
        pages = super_handles[handle]
        self.fabric.opened.append(pages)
        return pages.address

    def close_peer(self, address):
        pages = next(pages for pages in self.fabric.opened if pages.address == address)
        self.fabric.opened.remove(pages)
        pages.release()


class LocalPages(CudaPages):
    """Closed pages stay until nobody has them open, as memory that is mapped by IPC does.

    Freed at once, a producer's next copy would go to an address that CUDA knows no longer, takes
    for pageable host memory, and fills from a thread of the driver's: SIGSEGV.
    """

    def __init__(self, layout, fabric):
        super().__init__(layout, LocalDevice(fabric))
        self._fabric = fabric
        self._closed = self._freed = False

    def close(self):
        self._closed = True
        if self in self._fabric.cuda:
            self._fabric.cuda.remove(self)  # nobody opens it any more
        self.release()

    def release(self):
        if self._closed and not self._freed and self not in self._fabric.opened:
            self._freed = True
            super().close()


def make_pages(layout, fabric):
    pages = LocalPages(layout, fabric)
    pages.array = CudaArray(pages.tensor, layout)
    if not hasattr(fabric, "cuda"):
        fabric.cuda = []
    fabric.cuda.append(pages)
    return pages
