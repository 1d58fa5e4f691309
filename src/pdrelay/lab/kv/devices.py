"""Where a measured pool lies: its pages, a plain copy between two of them, and work to overlap."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from pdrelay.core.clock import monotonic_ns
from pdrelay.core.kv_layout import KVLayout
from pdrelay.errors import TransportError
from pdrelay.lab.environment import cpu_name
from pdrelay.transport.base import Descriptor
from pdrelay.transport.checksum import checksum
from pdrelay.transport.copying import close_fds
from pdrelay.transport.pages import SharedPages

_UNIT = 128  # side of the matrices of one unit of stand-in computation
_LARGE = 512
_CALIBRATION_S = 0.15

Pages = Any  # SharedPages, or a device's own kind: what `create_transport` takes
Mark = Callable[[], int]  # waits for what came before it; returns when that was over, ns


class PlainCopy(Protocol):
    """Copies bytes from our pool to the other process's: what the link can do at best."""

    def copy(self, num_bytes: int) -> None:
        """From the start of one pool to the start of the other, in one piece; done on return."""

    def close(self) -> None: ...


@dataclass(frozen=True)
class Rates:
    """What the device computes."""

    unit_ns: float  # one unit of stand-in computation
    flops_per_s: float
    words: str  # how `flops_per_s` was measured


class Device(Protocol):
    """One process's view of the device that it measures on."""

    words: str

    def create_pages(self, layout: KVLayout) -> Pages: ...

    def fill(self, pages: Pages, seed: int) -> None:
        """Random values, so that a page in the wrong place is noticed."""

    def checksum(self, pages: Pages, blocks: Sequence[int]) -> int: ...

    def plain_copy(self, pages: Pages, mapped: Descriptor) -> PlainCopy:
        """To the pool that transport `mapped` describes; its fds are taken over. Raises
        TransportError."""

    def compute(self, layer: int, units: int) -> None:
        """Stands in for the computation of `layer`, whose pages are written behind it."""

    def mark(self) -> Mark:
        """Behind all computation so far."""

    def calibrate(self) -> Rates: ...


class _MappedCopy:
    def __init__(self, pages: SharedPages, remote: SharedPages) -> None:
        self._from = pages.array.reshape(-1)
        self._remote = remote
        self._to = remote.array.reshape(-1)

    def copy(self, num_bytes: int) -> None:
        np.copyto(self._to[:num_bytes], self._from[:num_bytes])

    def close(self) -> None:
        self._from = self._to = np.empty(0, np.uint8)
        self._remote.close()


class Cpu:
    """Anonymous shared memory; computation is float32 matrix products on one thread."""

    def __init__(self) -> None:
        self.words = f"cpu ({cpu_name()})"
        rng = np.random.default_rng(0)
        self._a = rng.random((_UNIT, _UNIT), dtype=np.float32)
        self._b = rng.random((_UNIT, _UNIT), dtype=np.float32)
        self._out = np.empty((_UNIT, _UNIT), np.float32)

    def create_pages(self, layout: KVLayout) -> SharedPages:
        return SharedPages.create(layout)

    def fill(self, pages: SharedPages, seed: int) -> None:
        rng = np.random.default_rng(seed)
        for layer in pages.array:
            layer[:] = rng.integers(0, 256, layer.shape, np.uint8)

    def checksum(self, pages: SharedPages, blocks: Sequence[int]) -> int:
        return checksum(pages, blocks, "sample")

    def plain_copy(self, pages: SharedPages, mapped: Descriptor) -> PlainCopy:
        if len(mapped.fds) != 1:
            close_fds(mapped.fds)
            raise TransportError(f"one file descriptor leads to the pool, not {len(mapped.fds)}")
        return _MappedCopy(pages, SharedPages(pages.layout, mapped.fds[0]))

    def compute(self, layer: int, units: int) -> None:
        for _ in range(units):
            np.matmul(self._a, self._b, out=self._out)

    def mark(self) -> Mark:
        now = monotonic_ns()
        return lambda: now

    def calibrate(self) -> Rates:
        large = np.random.default_rng(1).random((_LARGE, _LARGE), dtype=np.float32)
        out = np.empty_like(large)
        unit_ns = median_ns(lambda: self.compute(0, 1))
        large_ns = median_ns(lambda: np.matmul(large, large, out=out))
        words = f"a float32 matrix product of {_LARGE}³ on one thread"
        return Rates(unit_ns, 2 * _LARGE**3 / (large_ns / 1e9), words)


def median_ns(work: Callable[[], object]) -> float:
    """Median time of calls over _CALIBRATION_S, the first left out."""
    work()
    times: list[int] = []
    end = time.monotonic() + _CALIBRATION_S
    while time.monotonic() < end or len(times) < 3:
        start = monotonic_ns()
        work()
        times.append(monotonic_ns() - start)
    return float(np.median(times))


def open_device(name: str) -> Device:
    """`cpu` or `cuda:N`. Raises TransportError for what this build cannot measure on."""
    if name == "cpu":
        return Cpu()
    from pdrelay.lab.kv.cuda_device import open_cuda

    return open_cuda(name)
