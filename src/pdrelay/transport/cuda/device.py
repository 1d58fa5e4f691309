"""A GPU behind the device seam."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, TypeVar

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
    latest,
    move_runs,
)

PageCopies = Literal["auto", "kernel", "driver"]
# Runs as long as this keep a link busy while the host submits the next one: copy engines then copy,
# and no multiprocessor has to.
_ENGINE_RUN_BYTES = 4 << 20

T = TypeVar("T")


class CudaEvent:
    """An event of this module's; it wakes a waiting thread by interrupt, not by spinning."""

    def __init__(self, device: CudaDevice, *, timing: bool = False) -> None:
        self._device = device
        self.handle = device.driver.create_event(timing=timing)

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
            self._device.drop_event(self.handle)


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
        return self.timed(lambda: self._device.submit(runs, self.handle))[0]

    def timed(self, enqueue: Callable[[], T]) -> tuple[CudaCopy, T]:
        """Enqueue something between two timed events."""
        start = CudaEvent(self._device, timing=True).record(self.handle)
        answer = enqueue()
        end = CudaEvent(self._device, timing=True).record(self.handle)
        return CudaCopy(start, end, self._device.driver), answer

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
        without Triton. Raises TransportError without that GPU."""
        self.driver = driver or Driver()
        count = self.driver.num_devices()
        if not 0 <= ordinal < count:
            raise TransportError(f"no GPU {ordinal}: this process sees {count}")
        self.ordinal = ordinal
        self.name = f"cuda:{ordinal}"
        self.uuid = self.driver.uuid(ordinal)
        self.compute_stream = 0
        self._context = self.driver.context(ordinal)
        self._side = CudaStream(self)
        self._batch = batch and self.driver.has_batch
        self.page_copies: PageCopies = page_copies
        self.page_copy_ctas = page_copy_ctas
        self._copier: Any = None  # a PageCopier, once prepared and where there is Triton
        self._written: dict[int, CudaEvent] = {}  # in the order of the latest writes
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
        layer = latest(list(self._written), layers)
        return self.launched() if layer is None else self._written[layer]

    def launched(self) -> CudaEvent:
        return CudaEvent(self).record(self.compute_stream)

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
        if not self._by_kernel(source.layout.layer_block_bytes, moves):
            return self.copy(move_runs(source, target, moves), after)
        self.make_current()
        if after is not None:
            self._side.wait(after)
        launch = partial(self._copier.launch, source, target, moves, num_ctas=self.page_copy_ctas)
        copy, ids = self._side.timed(launch)
        ids.busy = copy
        return copy

    def _by_kernel(self, page_bytes: int, moves: Sequence[PageMove]) -> bool:
        if self._copier is None or self.page_copies != "auto":
            return self._copier is not None and self.page_copies == "kernel"
        num_pages = sum(len(move.pairs) for move in moves)
        num_runs = sum(len(move.pairs.runs) for move in moves)
        return num_pages * page_bytes < num_runs * _ENGINE_RUN_BYTES

    def prepare_page_copies(self, pool: PagePool) -> None:
        if self.page_copies == "driver":
            return
        if self._copier is None:
            try:
                from pdrelay.transport.cuda.page_copy import PageCopier
            except ImportError:  # no Triton: the driver copies
                return
            self._copier = PageCopier(self.ordinal, self._side.handle)
        self.make_current()
        ids = self._copier.launch(pool, pool, [PageMove(0, BlockPairs([0], [0]))])
        ids.busy = self._side.record()
        ids.busy.wait()

    @property
    def batched(self) -> bool:
        """Whether several runs go to the driver in one call; known after the first such copy."""
        return self._batch

    def submit(self, runs: Sequence[Run], stream: int) -> None:
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
        if self._copier is not None:
            self._copier.forget(address)
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

    def drop_event(self, handle: int) -> None:
        if not self._closed:
            self.driver.destroy_event(handle)

    def close(self) -> None:
        """The primary context stays: it is torch's."""
        if not self._closed:
            self.make_current()
            self._written.clear()
            if self._copier is not None:
                self._copier.close()
            self._copier = None
            self._closed = True
            self._side.close()
