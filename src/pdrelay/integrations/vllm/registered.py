"""From the tensors that vLLM registers to pages that the hand-over moves."""

from __future__ import annotations

import ctypes
import mmap
import os
from typing import TYPE_CHECKING

import numpy as np
import torch

from pdrelay.errors import ConfigError, TransportError
from pdrelay.integrations.vllm.page_layout import LayerLayout, PageLayout, layer_layout
from pdrelay.integrations.vllm.pages import Pages
from pdrelay.integrations.vllm.shm_pages import Bytes, SharedMemoryPages
from pdrelay.transport.pages import anonymous_file

if TYPE_CHECKING:
    from pdrelay.transport.cuda.device import CudaDevice

_MIN_SHARED_BYTES = 1 << 20
_MAP_FIXED = 0x10  # linux/mman.h
_MAP_POPULATE = 0x8000


def describe(
    kv_caches: dict[str, torch.Tensor], *, num_blocks: int, block_size: int
) -> tuple[PageLayout, list[torch.UntypedStorage], dict[str, int]]:
    """The layout, its regions (one a storage), and which layer each name belongs to.

    Layers that share one cache are one layer. Raises ConfigError for a cache it cannot move.
    """
    storages: dict[int, tuple[int, torch.UntypedStorage]] = {}
    seen: dict[tuple[object, ...], int] = {}
    layers: list[LayerLayout] = []
    index: dict[str, int] = {}
    for name, tensor in kv_caches.items():
        if not isinstance(tensor, torch.Tensor):
            raise ConfigError(f"KV cache of {name} is no tensor: such models are not supported")
        storage = tensor.untyped_storage()
        region = storages.setdefault(storage.data_ptr(), (len(storages), storage))[0]
        key = (tensor.data_ptr(), tensor.shape, tensor.stride())
        if key not in seen:
            seen[key] = len(layers)
            layers.append(
                layer_layout(
                    name,
                    region=region,
                    offset=int(tensor.storage_offset()),
                    dtype=str(tensor.dtype).removeprefix("torch."),
                    itemsize=tensor.element_size(),
                    shape=tensor.shape,
                    strides=tensor.stride(),
                    num_blocks=num_blocks,
                )
            )
        index[name] = seen[key]
    regions = [storage for _, storage in storages.values()]
    sizes = tuple(storage.nbytes() for storage in regions)
    return PageLayout(num_blocks, block_size, sizes, tuple(layers)), regions, index


def cpu_pages(
    layout: PageLayout, storages: list[torch.UntypedStorage], *, share: bool
) -> SharedMemoryPages:
    """Pages of tensors in host memory. `share`: move them into shared memory, where they are."""
    fd, starts = share_in_place(storages) if share else (None, [])
    regions = [_bytes_of(storage) for storage in storages]
    return SharedMemoryPages(layout, regions, fd=fd, region_starts=starts)


def create_pages(
    transport: str, layout: PageLayout, storages: list[torch.UntypedStorage], *, share: bool
) -> Pages:
    """Pages for `transport` ("auto": what fits where the tensors are). Raises ConfigError."""
    device = storages[0].device.type
    if transport == "auto":
        transport = "shm" if device == "cpu" else "cuda_ipc"
    if transport == "shm" and device == "cpu":
        return cpu_pages(layout, storages, share=share)
    if transport == "cuda_ipc" and device == "cuda":
        return cuda_pages(layout, storages)
    if transport == "nccl" and device == "cuda":
        return nccl_pages(layout, storages)
    raise ConfigError(
        f"PdrelayConnector cannot move a KV cache on {device} by transport {transport!r}: leave "
        'it at "auto", which is "shm" on CPUs and "cuda_ipc" on GPUs, where "nccl" works, too'
    )


def cuda_pages(layout: PageLayout, storages: list[torch.UntypedStorage]) -> Pages:
    """Pages of tensors on this process's GPU. Raises ConfigError where they cannot be shared."""
    from pdrelay.integrations.vllm.device_pages import DeviceKVPages, Region
    from pdrelay.transport.cuda.device import CudaDevice

    ordinal = storages[0].device.index or 0
    try:
        device = CudaDevice(ordinal)
        regions = []
        for storage in storages:
            base, size = device.driver.allocation_of(storage.data_ptr())
            handle = device.driver.ipc_handle(base)
            regions.append(Region(storage.data_ptr(), handle, size, storage.data_ptr() - base))
    except TransportError as error:
        raise ConfigError(
            f"the KV cache on cuda:{ordinal} cannot be shared with another process ({error}): "
            "start vLLM without sleep mode and without expandable_segments in "
            "PYTORCH_CUDA_ALLOC_CONF"
        ) from error
    return DeviceKVPages(
        layout,
        device,
        regions,
        bind_thread=device.make_current,
        on_compute_stream=lambda: _follow_torch(device),
    )


def nccl_pages(layout: PageLayout, storages: list[torch.UntypedStorage]) -> Pages:
    """Pages of tensors on this process's GPU. Raises ConfigError without a NCCL library."""
    from pdrelay.integrations.vllm.nccl_pages import NcclKVPages
    from pdrelay.transport.cuda.device import CudaDevice
    from pdrelay.transport.nccl_library import load_nccl

    ordinal = storages[0].device.index or 0
    try:
        device, library = CudaDevice(ordinal), load_nccl()
    except TransportError as error:
        raise ConfigError(f'transport "nccl" of PdrelayConnector: {error}') from error
    return NcclKVPages(
        layout,
        device,
        [storage.data_ptr() for storage in storages],
        library,
        lambda: CudaDevice(ordinal),
        on_compute_stream=lambda: _follow_torch(device),
    )


def _follow_torch(device: CudaDevice) -> None:
    """The engine launches on torch's current stream."""
    device.compute_stream = torch.cuda.current_stream(device.ordinal).cuda_stream


def share_in_place(storages: list[torch.UntypedStorage]) -> tuple[int, list[int]]:
    """Put shared memory where `storages` are: their addresses stay, their contents become zero.

    Returns a descriptor of that memory and where each storage starts in it. For caches that hold
    nothing yet. An allocation of this size has its pages to itself, in every common allocator, so
    that replacing whole pages touches nothing else; the bytes around it are kept all the same.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [
        *(ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int),
        ctypes.c_long,
    ]
    page = mmap.PAGESIZE
    ranges = [_page_range(storage) for storage in storages]
    spans = _merged(ranges)
    sizes = [last - first for first, last in spans]
    file_starts = [sum(sizes[:i]) for i in range(len(sizes))]
    fd = anonymous_file(sum(sizes), "pdrelay-vllm-kv")

    def place(address: int) -> int:
        """Where the byte at `address` lies in the file."""
        return next(
            start + address - first
            for (first, last), start in zip(spans, file_starts, strict=True)
            if first <= address < last
        )

    for first, last in ranges:
        # What shares a storage's first and last page with it: an allocator's own words.
        for at in (first, last - page):
            os.pwrite(fd, ctypes.string_at(at, page), place(at))
    for (first, last), start in zip(spans, file_starts, strict=True):
        flags = mmap.MAP_SHARED | _MAP_FIXED | _MAP_POPULATE
        protection = mmap.PROT_READ | mmap.PROT_WRITE
        if libc.mmap(first, last - first, protection, flags, fd, start) != first:
            error = os.strerror(ctypes.get_errno())
            raise ConfigError(f"cannot put {last - first} bytes of KV into shared memory: {error}")
    return fd, [place(storage.data_ptr()) for storage in storages]


def _page_range(storage: torch.UntypedStorage) -> tuple[int, int]:
    """First and end address of the pages that a storage lies in. Raises ConfigError."""
    if storage.nbytes() < _MIN_SHARED_BYTES:
        raise ConfigError(
            f"a KV cache of {storage.nbytes()} bytes is too small to share: raise "
            "VLLM_CPU_KVCACHE_SPACE"
        )
    page = mmap.PAGESIZE
    end = storage.data_ptr() + storage.nbytes()
    return storage.data_ptr() // page * page, -(-end // page) * page


def _merged(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The ranges in order, those that overlap made one."""
    spans: list[tuple[int, int]] = []
    for first, last in sorted(ranges):
        if spans and first < spans[-1][1]:
            spans[-1] = (spans[-1][0], max(last, spans[-1][1]))
        else:
            spans.append((first, last))
    return spans


def _bytes_of(storage: torch.UntypedStorage) -> Bytes:
    """The storage's memory as flat uint8, not copied."""
    flat = torch.empty(0, dtype=torch.uint8).set_(storage)
    array: Bytes = flat.numpy()
    assert array.dtype == np.uint8
    return array
