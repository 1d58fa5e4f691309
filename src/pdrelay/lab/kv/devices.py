"""Where a measured pool lies: its pages, a plain copy between two of them, and work to overlap."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from pdrelay.core.clock import monotonic_ns
from pdrelay.core.kv_layout import KVLayout
from pdrelay.errors import TransportError
from pdrelay.lab.environment import cpu_name
from pdrelay.transport.checksum import checksum
from pdrelay.transport.pages import SharedPages

_UNIT = 128  # side of the matrices of one unit of stand-in computation
_LARGE = 512
_CALIBRATION_S = 0.15


class PlainCopy(Protocol):
    """Copies bytes from our pool to the other process's: what the link can do at best."""

    def copy(self, num_bytes: int) -> None:
        """From the start of one pool to the start of the other, in one piece; done on return."""

    def close(self) -> None: ...


class Device(Protocol):
    """One process's view of the device that it measures on."""

    words: str

    def create_pages(self, layout: KVLayout) -> SharedPages: ...

    def fill(self, pages: SharedPages, seed: int) -> None:
        """Random bytes, so that a page in the wrong place is noticed."""

    def checksum(self, pages: SharedPages, blocks: Sequence[int]) -> int: ...

    def plain_copy(self, pages: SharedPages, remote_fds: Sequence[int]) -> PlainCopy | None:
        """To the pool behind a `mapped` descriptor (fds are taken over); None: cannot be had."""

    def compute(self, units: int) -> None:
        """Stands in for a layer's computation."""

    def calibrate(self) -> tuple[float, float]:
        """(ns of one unit, FLOP/s of a large product); zeros where the device does not compute."""


class _MappedCopy:
    def __init__(self, pages: SharedPages, remote: SharedPages) -> None:
        self._from = pages.array.reshape(-1)
        self._remote = remote
        self._to = remote.array.reshape(-1)

    def copy(self, num_bytes: int) -> None:
        np.copyto(self._to[:num_bytes], self._from[:num_bytes])

    def close(self) -> None:
        self._to = self._to[:0].copy()
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

    def plain_copy(self, pages: SharedPages, remote_fds: Sequence[int]) -> PlainCopy | None:
        (fd,) = remote_fds
        return _MappedCopy(pages, SharedPages(pages.layout, fd))

    def compute(self, units: int) -> None:
        for _ in range(units):
            np.matmul(self._a, self._b, out=self._out)

    def calibrate(self) -> tuple[float, float]:
        large = np.random.default_rng(1).random((_LARGE, _LARGE), dtype=np.float32)
        out = np.empty_like(large)
        unit_ns = _median_ns(lambda: self.compute(1))
        large_ns = _median_ns(lambda: np.matmul(large, large, out=out))
        return unit_ns, 2 * _LARGE**3 / (large_ns / 1e9)


def _median_ns(work: object) -> float:
    """Median time of calls over _CALIBRATION_S, the first left out."""
    assert callable(work)
    work()
    times: list[int] = []
    end = time.monotonic() + _CALIBRATION_S
    while time.monotonic() < end or len(times) < 3:
        start = monotonic_ns()
        work()
        times.append(monotonic_ns() - start)
    return float(np.median(times))


def open_device(name: str) -> Device:
    """`cpu`. Raises TransportError for what this build cannot measure on."""
    if name == "cpu":
        return Cpu()
    raise TransportError(
        f"no device pages for {name!r} in this build: run with --device cpu, or --predict-only"
    )


def close_fds(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)
