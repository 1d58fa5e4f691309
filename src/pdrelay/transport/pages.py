"""A rank's KV pool on CPU: anonymous shared memory that a peer can map.

The memory has no name (memfd, or a file unlinked at once), so nothing can be left behind, however
a process dies; a peer maps it through the file descriptor it is handed.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import tempfile

import numpy as np

from pdrelay.core.kv_layout import KVLayout


def anonymous_file(num_bytes: int, label: str) -> int:
    """An fd of `num_bytes` zeros without a name; `label` shows in /proc only.

    Raises OSError, OverflowError. Memory is taken page by page, when first written.
    """
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create(label, os.MFD_CLOEXEC)
    else:
        with tempfile.TemporaryFile() as file:
            fd = os.dup(file.fileno())
    try:
        os.ftruncate(fd, num_bytes)
    except BaseException:
        os.close(fd)
        raise
    return fd


class SharedPages:
    """KV pages `[num_layers, num_blocks, layer_block_bytes]` as uint8, backed by `fd`.

    Zero at first. All memory is taken when mapped, not by the first requests: a first touch costs
    about 4 µs a 4 KiB page, which is 2 ms on a 512-token prompt of `tiny` (docs/LOG.md).
    """

    def __init__(self, layout: KVLayout, fd: int) -> None:
        """Map `fd` (owned by this object from now on)."""
        self.layout = layout
        self.fd = fd
        flags = mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)
        self._map = mmap.mmap(fd, layout.total_bytes, flags=flags)
        self.array: np.ndarray[tuple[int, int, int], np.dtype[np.uint8]] = np.frombuffer(
            self._map, dtype=np.uint8
        ).reshape(layout.num_layers, layout.num_blocks, layout.layer_block_bytes)

    @classmethod
    def create(cls, layout: KVLayout) -> SharedPages:
        return cls(layout, anonymous_file(layout.total_bytes, "pdrelay-kv"))

    @property
    def buffer(self) -> mmap.mmap:
        """The raw bytes, for torch.frombuffer."""
        return self._map

    def close(self) -> None:
        """Drop the mapping. Views that others still hold keep it alive until they go."""
        self.array = np.empty((0, 0, 0), dtype=np.uint8)
        # A torch tensor may still export it: then the kernel frees it with the process.
        with contextlib.suppress(BufferError):
            self._map.close()
        os.close(self.fd)
