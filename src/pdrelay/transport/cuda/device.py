"""A GPU behind the device seam."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from pdrelay.core.kv_layout import KVLayout
from pdrelay.errors import TransportError
from pdrelay.transport.cuda.driver import Driver
from pdrelay.transport.device import (
    BlockPairs,
    Event,
    PageMove,
    PagePool,
    Run,
    RunTable,
    alike,
    latest,
    move_runs,
)

PageCopies = Literal["auto", "kernel", "driver"]
# Who copies: between two H200 over NVLink a copy engine moves 395 GB/s and spends 1.3 µs more on
# each run (4,096 runs of 256 KiB in 8.1 ms), the page-copy kernel of 16 thread blocks moves 329
# GB/s whatever the runs, and starts some 8 µs later, behind its list. That makes them equal at 6
# runs, and one more for every 2.6 MB; of equals the engine, which occupies no multiprocessor.
# (64 MiB in 32 runs: 200 GB/s by the driver, 158 by the kernel. `python benchmarks/transports.py
# --device cuda`, 2026-11-24.)
_FREE_RUNS = 6
_ENGINE_RUN_BYTES = 2 << 20
# From here on a kernel on an idle device takes all of it: 132 thread blocks instead of 16 gained
# 3 to 12 % at 1 GiB there. While a prefill computes they would take its multiprocessors.
_WHOLE_DEVICE_BYTES = 32 << 20


class CudaEvent:
    """An event of this module's; it wakes a waiting thread by interrupt, not by spinning.

    Its handle is recorded again by a later one once nobody holds this one: a stream that waits for
    it took note of the place when it was told to wait."""

    __slots__ = ("_device", "_timing", "handle")

    def __init__(self, device: CudaDevice, *, timing: bool = False) -> None:
        self._device = device
        self._timing = timing
        self.handle = device.take_event(timing)

    def record(self, stream: int) -> CudaEvent:
        self._device.driver.record(self.handle, stream)
        return self

    def done(self) -> bool:
        return self._device.driver.query(self.handle)

    def wait(self) -> None:
        self._device.make_current()
        self._device.driver.synchronize(self.handle)

    def __del__(self) -> None:
        if hasattr(self, "handle"):
            self._device.drop_event(self.handle, self._timing)


class CudaCopy:
    """A batch of runs on the side stream, between two timed events."""

    def __init__(self, start: CudaEvent, end: CudaEvent, driver: Driver) -> None:
        self._start, self._end, self._driver = start, end, driver

    def done(self) -> bool:
        return self._end.done()

    def wait(self) -> None:
        self._end.wait()

    def busy_ns(self) -> int:
        return self._driver.elapsed_ns(self._start.handle, self._end.handle)


class CudaStream:
    def __init__(self, device: CudaDevice) -> None:
        self._device = device
        self.handle = device.driver.create_stream()

    def wait(self, event: Event) -> None:
        assert isinstance(event, CudaEvent)
        self._device.driver.wait_event(self.handle, event.handle)

    def record(self) -> CudaEvent:
        return CudaEvent(self._device).record(self.handle)

    def copy(self, runs: Sequence[Run]) -> CudaCopy:
        return self.timed(partial(self._device.submit, RunTable.of(runs), self.handle))

    def timed(self, enqueue: Callable[[], None]) -> CudaCopy:
        """Enqueue something between two timed events. What the host does between them counts as
        the device's time: it should be little."""
        start = CudaEvent(self._device, timing=True)
        end = CudaEvent(self._device, timing=True)
        start.record(self.handle)
        enqueue()
        end.record(self.handle)
        return CudaCopy(start, end, self._device.driver)

    def close(self) -> None:
        self._device.driver.destroy_stream(self.handle)


class CudaPinned:
    def __init__(self, driver: Driver, num_bytes: int) -> None:
        self._driver = driver
        self.address = driver.allocate_pinned(num_bytes)
        memory = (ctypes.c_uint8 * num_bytes).from_address(self.address)
        self.array: npt.NDArray[np.uint8] = np.ctypeslib.as_array(memory)

    def close(self) -> None:
        self.array = np.empty(0, np.uint8)
        self._driver.free_pinned(self.address)


class CudaDevice:
    """GPU `ordinal`, as `cuda:ordinal` of torch in this process.

    `compute_stream` is the raw handle of the stream that the engine launches on (torch:
    `torch.cuda.current_stream().cuda_stream`; 0 is the default stream).
    """

    def __init__(
        self,
        ordinal: int,
        driver: Driver | None = None,
        *,
        batch: bool = True,
        page_copies: PageCopies = "auto",
        page_copy_ctas: int = 16,
    ) -> None:
        """`batch=False` submits every run by itself. `page_copies`: who copies pages, a kernel of
        `page_copy_ctas` thread blocks or the driver; "auto": the driver where runs are long, or
        without Triton, and more thread blocks where nothing else runs (`_by_kernel`, `_ctas`).
        Raises TransportError without that GPU."""
        self.driver = driver or Driver()
        count = self.driver.num_devices()
        if not 0 <= ordinal < count:
            raise TransportError(f"no GPU {ordinal}: this process sees {count}")
        self.ordinal = ordinal
        self.name = f"cuda:{ordinal}"
        self.uuid = self.driver.uuid(ordinal)
        self.compute_stream = 0
        self._context = self.driver.context(ordinal)
        self._num_multiprocessors = self.driver.num_multiprocessors(ordinal)
        self._side = CudaStream(self)
        self._batch = batch and self.driver.has_batch
        self.page_copies: PageCopies = page_copies
        self.page_copy_ctas = page_copy_ctas
        self._copier: Any = None  # a PageCopier, once prepared and where there is Triton
        self._written: dict[int, CudaEvent] = {}  # in the order of the latest writes
        self._events: dict[bool, list[int]] = {False: [], True: []}  # by timing; free handles
        self._closed = False

    def make_current(self) -> None:
        """On this thread."""
        self.driver.make_current(self._context)

    def written(self, layer: int) -> None:
        # Recording again moves the event; a copy that waits for an earlier place is enqueued
        # already or may as well wait for this one.
        event = self._written.pop(layer, None) or CudaEvent(self)
        self._written[layer] = event.record(self.compute_stream)

    def writes_of(self, *layers: int) -> Event:
        layer = latest(self._written, layers)
        return self.launched() if layer is None else self._written[layer]

    def launched(self) -> CudaEvent:
        return self.behind(self.compute_stream)

    def behind(self, stream: int) -> CudaEvent:
        """What was enqueued on a stream so far."""
        return CudaEvent(self).record(stream)

    def copy(self, runs: Sequence[Run], after: Event | None) -> CudaCopy:
        self.make_current()  # threads of transports call this, too
        if after is not None:
            self._side.wait(after)
        return self._side.copy(runs)

    def copy_pages(
        self,
        source: PagePool,
        target: PagePool,
        moves: Sequence[PageMove],
        after: Event | None,
    ) -> CudaCopy:
        groups = alike(moves)
        num_pages = sum(len(pairs) * len(layers) for pairs, layers in groups)
        num_runs = sum(pairs.num_runs * len(layers) for pairs, layers in groups)
        num_bytes = num_pages * source.layout.layer_block_bytes
        if not self._by_kernel(num_bytes, num_runs):
            return self.copy(move_runs(source, target, moves), after)
        self.make_current()
        launch = self._copier.prepare(source, target, moves, num_ctas=self._ctas(num_bytes))
        if after is not None:
            self._side.wait(after)
        copy = self._side.timed(partial(self._enqueue, launch))
        launch.ids.busy = copy
        return copy

    def _enqueue(self, launch: Any) -> None:
        launch.enqueue()
        self.make_current()  # Triton's first launch leaves torch's own device current

    def _by_kernel(self, num_bytes: int, num_runs: int) -> bool:
        if self._copier is None or self.page_copies != "auto":
            return self._copier is not None and self.page_copies == "kernel"
        return num_runs >= _FREE_RUNS + num_bytes // _ENGINE_RUN_BYTES

    def _ctas(self, num_bytes: int) -> int:
        """Thread blocks of a kernel that copies so much now. Whatever is launched while it runs
        shares the multiprocessors with it."""
        if self.page_copies != "auto" or num_bytes < _WHOLE_DEVICE_BYTES:
            return self.page_copy_ctas
        if not self.driver.idle(self.compute_stream):
            return self.page_copy_ctas
        return max(self.page_copy_ctas, self._num_multiprocessors)

    def prepare_page_copies(self, pool: PagePool) -> None:
        if self.page_copies == "driver":
            return
        self.make_current()
        if self._copier is None:
            try:
                from pdrelay.transport.cuda.page_copy import PageCopier
            except ImportError:  # no Triton: the driver copies
                return
            self._copier = PageCopier(self.ordinal, self._side.handle, self.driver)
        launch = self._copier.prepare(pool, pool, [PageMove(0, BlockPairs([0], [0]))])
        self._enqueue(launch)
        launch.ids.busy = done = self._side.record()
        done.wait()

    @property
    def batched(self) -> bool:
        """Whether several runs go to the driver in one call; known after the first such copy."""
        return self._batch

    def submit(self, runs: Sequence[Run], stream: int) -> None:
        """All runs of one batch, in no order."""
        if len(runs) > 1 and self._batch:
            self._batch = self.driver.copy_batch(runs, stream)
        if len(runs) == 1 or not self._batch:
            for run in runs:
                self.driver.copy(run, stream)

    def stream(self) -> CudaStream:
        self.make_current()
        return CudaStream(self)

    def allocate(self, num_bytes: int) -> int:
        self.make_current()
        return self.driver.allocate(num_bytes)

    def free(self, address: int) -> None:
        self.driver.free(address)

    def open_peer(self, handle: bytes, num_bytes: int) -> int:
        """With this rank's device current, so that its kernels may use the address."""
        self.make_current()
        try:
            return self.driver.open_ipc(handle)
        except TransportError as error:
            raise TransportError(
                f"cannot open the consumer's pages on {self.name} ({error}): both GPUs must be "
                "visible to both ranks, and containers must share IPC and PID namespaces; or "
                "choose --transport nccl or tcp"
            ) from error

    def close_peer(self, address: int) -> None:
        self.make_current()
        self.driver.close_ipc(address)

    def pinned(self, num_bytes: int) -> CudaPinned:
        self.make_current()
        return CudaPinned(self.driver, num_bytes)

    def pin(self, address: int, num_bytes: int) -> None:
        self.make_current()
        self.driver.pin(address, num_bytes)

    def unpin(self, address: int) -> None:
        self.driver.unpin(address)

    def peer_tensor(self, layout: KVLayout, address: int) -> Any:
        from pdrelay.transport.cuda.tensors import tensor_at

        return tensor_at(address, layout.shape, layout.dtype, self.ordinal)

    def take_event(self, timing: bool) -> int:
        """A handle that nobody uses; threads of transports call this, too."""
        try:
            return self._events[timing].pop()
        except IndexError:
            return self.driver.create_event(timing=timing)

    def drop_event(self, handle: int, timing: bool) -> None:
        """Wherever the last holder of an event let go of it."""
        if not self._closed:
            self._events[timing].append(handle)

    def close(self) -> None:
        """The primary context stays: it is torch's."""
        if not self._closed:
            self.make_current()
            self._written.clear()
            if self._copier is not None:
                self._copier.close()
            self._copier = None
            self._closed = True
            for handles in self._events.values():
                while handles:
                    self.driver.destroy_event(handles.pop())
            self._side.close()
