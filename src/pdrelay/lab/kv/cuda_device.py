"""A GPU's pool for `pdrelay kv`, over the pages and the copies that the transports use.

Nothing here names torch: tensors come out of the pages, and make further ones themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any

from pdrelay.core.clock import monotonic_ns
from pdrelay.core.kv_layout import KVLayout
from pdrelay.errors import TransportError
from pdrelay.lab.kv.devices import Device, Mark, PlainCopy, Rates, median_ns
from pdrelay.transport.base import Descriptor
from pdrelay.transport.checksum import checksum
from pdrelay.transport.copying import decode_descriptor

_MODULES = ("cuda.pages", "device_mapped", "device")
_UNIT = 2048  # side of the matrices of one unit: some 25 µs on Hopper
_LARGE = 8192
_AHEAD = 20  # units launched before the first is waited for, so that launches are hidden


class _PeerCopy:
    """One copy of the driver's from pool to pool, waited for."""

    def __init__(self, pages: Any, address: int, run: Any) -> None:
        self._pages = pages
        self._address = address
        self._run = run

    def copy(self, num_bytes: int) -> None:
        run = self._run(self._address, self._pages.address, num_bytes)
        self._pages.device.copy([run], None).wait()

    def close(self) -> None:
        self._pages.device.close_peer(self._address)


class Cuda:
    """GPU `ordinal`; computation is matrix products in the pool's dtype."""

    def __init__(self, cuda_pages: Any, mapped: Any, transport_device: Any, ordinal: int) -> None:
        """The three modules of the transport layer that know GPUs."""
        self.words = f"cuda:{ordinal}"
        self._create = cuda_pages.CudaPages.create
        self._descriptor = mapped.DeviceDescriptor
        self._run = transport_device.Run
        self._ordinal = ordinal
        self._pages: Any = None
        self._a: Any = None

    def create_pages(self, layout: KVLayout) -> Any:
        self._pages = self._create(layout, self._ordinal)
        # Events and streams are made in the current context, which torch left at GPU 0's.
        self._pages.device.make_current()
        return self._pages

    def fill(self, pages: Any, seed: int) -> None:
        pages.tensor.normal_()
        self.mark()()

    def checksum(self, pages: Any, blocks: Sequence[int]) -> int:
        return checksum(pages, blocks, "sample")

    def plain_copy(self, pages: Any, mapped: Descriptor) -> PlainCopy:
        peer = decode_descriptor(mapped, self._descriptor)
        address = pages.device.open_peer(peer.handle, peer.num_bytes)
        return _PeerCopy(pages, address, self._run)

    def compute(self, layer: int, units: int) -> None:
        if self._a is None:
            self._a = self._square(_UNIT)
        for _ in range(units):
            self._a.matmul(self._a)
        self._pages.device.written(layer)

    def _square(self, side: int) -> Any:
        return self._pages.tensor.new_empty((side, side)).normal_()

    def mark(self) -> Mark:
        event = self._pages.device.launched()

        def wait() -> int:
            event.wait()
            return monotonic_ns()

        return wait

    def calibrate(self) -> Rates:
        large = self._square(_LARGE)

        def units() -> None:
            self.compute(0, _AHEAD)
            self.mark()()

        def product() -> None:
            large.matmul(large)
            self.mark()()

        unit_ns, large_ns = median_ns(units) / _AHEAD, median_ns(product)
        words = f"a matrix product of {_LARGE}³ in {self._pages.layout.dtype}"
        return Rates(unit_ns, 2 * _LARGE**3 / (large_ns / 1e9), words)


def open_cuda(name: str) -> Device:
    """`cuda:N`. Raises TransportError where the transports have no pages on GPUs."""
    ordinal = name.removeprefix("cuda:")
    if not ordinal.isdecimal():
        raise TransportError(f"{name!r} is no device: write cpu or cuda:N")
    try:
        pages, mapped, device = (import_module(f"pdrelay.transport.{name}") for name in _MODULES)
    except ImportError as error:
        raise TransportError(
            f"no pages on {name} ({error}): install a CUDA build of torch, or use --device cpu"
        ) from error
    return Cuda(pages, mapped, device, int(ordinal))
