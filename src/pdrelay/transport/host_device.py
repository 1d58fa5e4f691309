"""The fake of the device seam: streams on the host that complete at once, or only when told to.

fabric = HostFabric()
device = HostDevice(fabric, manual=True)
pages = HostPages.create(layout, device)
device.launch(write_a_layer)        # what an engine would put on the compute stream
device.run()                        # ... happens now, and the copies behind it
"""

from __future__ import annotations

import ctypes
import secrets
import threading
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import numpy.typing as npt

from pdrelay.core.clock import monotonic_ns
from pdrelay.core.kv_layout import KVLayout
from pdrelay.errors import TransportError
from pdrelay.transport.checksum import U64, OfWords, sampled, summed
from pdrelay.transport.device import Event, PageMove, PagePool, Run, latest, move_runs
from pdrelay.transport.pages import SharedPages


class HostFabric:
    """What the host devices of one test share: pages by handle, and who has them open."""

    def __init__(self, *, ipc: bool = True) -> None:
        self.ipc = ipc
        self.lock = threading.Lock()
        self.shared: dict[bytes, HostPages] = {}
        self.opened: list[HostPages] = []  # one entry a mapping that was not closed


class HostEvent:
    def __init__(self, device: HostDevice) -> None:
        self._device = device
        self.reached = False
        self.start_ns = self.end_ns = 0

    def done(self) -> bool:
        with self._device.changed:
            return self.reached

    def wait(self) -> None:
        with self._device.changed:
            self._device.changed.wait_for(lambda: self.reached or self._device.closed)

    def busy_ns(self) -> int:
        return max(1, self.end_ns - self.start_ns)


class _Stream:
    """Operations in order; one that returns False is not ready yet and holds up the rest."""

    def __init__(self) -> None:
        self.queue: deque[Callable[[], bool]] = deque()

    def run(self, limit: int | None) -> int:
        done = 0
        while self.queue and (limit is None or done < limit):
            if not self.queue[0]():
                break
            self.queue.popleft()
            done += 1
        return done


class HostStream:
    """A stream of a HostDevice. Libraries' fakes put operations on it with `put`."""

    def __init__(self, device: HostDevice, queue: _Stream) -> None:
        self._device = device
        self._queue = queue
        self.handle = self

    def put(self, operation: Callable[[], bool]) -> None:
        self._device._put(self._queue, operation)

    def run(self) -> None:
        """Look again at what was not ready."""
        self._device._run(self._queue, None)

    def wait(self, event: Event) -> None:
        self.put(event.done)

    def record(self) -> HostEvent:
        event = HostEvent(self._device)
        self._device._record(self._queue, event)
        return event

    def copy(self, runs: Sequence[Run]) -> HostEvent:
        return self._device._copy(self._queue, runs)

    def close(self) -> None:
        pass


class HostDevice:
    """`manual`: streams move in `run`, `run_compute` and `run_copies` only."""

    def __init__(self, fabric: HostFabric, name: str = "host:0", *, manual: bool = False) -> None:
        self.name = name
        self.uuid = f"HOST-{name}"
        self.changed = threading.Condition(threading.RLock())
        self.closed = False
        self.num_copies = 0
        self.num_runs = 0
        self.fabric = fabric
        self._manual = manual
        self._compute = _Stream()
        self._side = _Stream()
        self._further: list[_Stream] = []
        self._allocated: dict[int, npt.NDArray[np.uint8]] = {}
        self._written: dict[int, HostEvent] = {}

    # ---- what tests do

    def launch(self, work: Callable[[], None]) -> None:
        """Put work on the compute stream, as an engine does."""

        def operation() -> bool:
            work()
            return True

        self._put(self._compute, operation)

    def launch_until(self, done: Callable[[], bool]) -> None:
        """Put work on the compute stream that goes on elsewhere. Call `run` when it is done."""
        self._put(self._compute, done)

    def run(self) -> None:
        """Complete everything launched."""
        while self.run_compute() + self.run_copies() + self._run_further():
            pass

    def _run_further(self) -> int:
        return sum(self._run(stream, None) for stream in self._further)

    def run_compute(self, limit: int | None = None) -> int:
        return self._run(self._compute, limit)

    def run_copies(self, limit: int | None = None) -> int:
        """Move the side stream; what waits for the compute stream stays."""
        return self._run(self._side, limit)

    def _run(self, stream: _Stream, limit: int | None) -> int:
        with self.changed:
            done = stream.run(limit)
            self.changed.notify_all()
            return done

    def _put(self, stream: _Stream, operation: Callable[[], bool]) -> None:
        with self.changed:
            stream.queue.append(operation)
            if not self._manual:
                self.run()

    def _record(self, stream: _Stream, event: HostEvent) -> None:
        def operation() -> bool:
            event.end_ns = monotonic_ns()
            event.reached = True
            return True

        self._put(stream, operation)

    # ---- the seam

    def written(self, layer: int) -> None:
        event = HostEvent(self)
        self._written.pop(layer, None)  # in the order of the latest writes
        self._written[layer] = event
        self._record(self._compute, event)

    def writes_of(self, *layers: int) -> Event:
        layer = latest(self._written, layers)
        return self.launched() if layer is None else self._written[layer]

    def launched(self) -> Event:
        event = HostEvent(self)
        self._record(self._compute, event)
        return event

    def copy(self, runs: Sequence[Run], after: Event | None) -> HostEvent:
        if after is not None:
            self._put(self._side, after.done)
        return self._copy(self._side, runs)

    def copy_pages(
        self,
        source: PagePool,
        target: PagePool,
        moves: Sequence[PageMove],
        after: Event | None,
    ) -> HostEvent:
        return self.copy(move_runs(source, target, moves), after)

    def prepare_page_copies(self, pool: PagePool) -> None:
        pass

    def _copy(self, stream: _Stream, runs: Sequence[Run]) -> HostEvent:
        runs = list(runs)
        event = HostEvent(self)

        def operation() -> bool:
            event.start_ns = monotonic_ns()
            for run in runs:
                ctypes.memmove(run.dst, run.src, run.num_bytes)
            return True

        self._put(stream, operation)
        self._record(stream, event)
        self.num_copies += 1
        self.num_runs += len(runs)
        return event

    def stream(self) -> HostStream:
        queue = _Stream()
        self._further.append(queue)
        return HostStream(self, queue)

    def allocate(self, num_bytes: int) -> int:
        memory = np.zeros(num_bytes, np.uint8)
        self._allocated[memory.ctypes.data] = memory
        return memory.ctypes.data

    def free(self, address: int) -> None:
        del self._allocated[address]

    def make_current(self) -> None:
        pass

    def open_peer(self, handle: bytes, num_bytes: int) -> int:
        with self.fabric.lock:
            pages = self.fabric.shared.get(handle)
            if pages is None or pages.layout.total_bytes != num_bytes:
                raise TransportError("the peer's memory cannot be opened")
            self.fabric.opened.append(pages)
            return pages.address

    def close_peer(self, address: int) -> None:
        with self.fabric.lock:
            pages = next(pages for pages in self.fabric.opened if pages.address == address)
            self.fabric.opened.remove(pages)
        pages.release()

    def pinned(self, num_bytes: int) -> HostMemory:
        return HostMemory(num_bytes)

    def pin(self, address: int, num_bytes: int) -> None:
        pass

    def unpin(self, address: int) -> None:
        pass

    def peer_tensor(self, layout: KVLayout, address: int) -> npt.NDArray[np.uint8]:
        """The peer's pages as bytes, `[num_layers, num_blocks, layer_block_bytes]`."""
        memory = (ctypes.c_uint8 * layout.total_bytes).from_address(address)
        shape = (layout.num_layers, layout.num_blocks, layout.layer_block_bytes)
        return np.ctypeslib.as_array(memory).reshape(shape)

    def close(self) -> None:
        with self.changed:
            self.closed = True
            self.changed.notify_all()


class HostMemory:
    def __init__(self, num_bytes: int) -> None:
        self.array: npt.NDArray[np.uint8] = np.zeros(num_bytes, np.uint8)
        self.address = self.array.ctypes.data

    def close(self) -> None:
        self.array = np.zeros(0, np.uint8)


class HostWords:
    """Read at once, or when the compute stream gets there."""

    def __init__(self, device: HostDevice, words_of: Callable[[], U64], in_order: bool) -> None:
        self._words: U64 | None = None
        self._taken: Event | None = None  # read already
        self._words_of = words_of
        if in_order:
            device.launch(self._take)
            self._taken = device.launched()
        else:
            self._take()

    def _take(self) -> None:
        self._words = self._words_of()

    def done(self) -> bool:
        return self._taken is None or self._taken.done()

    def wait(self) -> U64:
        if self._taken is not None:
            self._taken.wait()
        assert self._words is not None, "the device was closed"
        return self._words


class HostPages:
    """Pages of a HostDevice; `array` shows them to tests."""

    def __init__(self, shared: SharedPages, device: HostDevice) -> None:
        self._shared = shared
        self.layout = shared.layout
        self.device: HostDevice = device
        self.array = shared.array
        self.address: int = self.array.ctypes.data
        self._closed = False
        self._handle = secrets.token_bytes(64)
        device.fabric.shared[self._handle] = self

    @classmethod
    def create(cls, layout: KVLayout, device: HostDevice) -> HostPages:
        return cls(SharedPages.create(layout), device)

    def ipc_handle(self) -> bytes:
        if not self.device.fabric.ipc:
            raise TransportError("this host device does not share its memory")
        return self._handle

    def checksum(self, blocks: Sequence[int], in_order: bool, *, full: bool) -> OfWords:
        words_of = partial(summed if full else sampled, self._shared, list(blocks))
        return OfWords(partial(HostWords, self.device, words_of, in_order))

    def close(self) -> None:
        self._closed = True
        self.device.fabric.shared.pop(self._handle, None)
        self.release()

    def release(self) -> None:
        """Free the memory once it is closed here and at all peers, as real devices do."""
        if self._closed and self not in self.device.fabric.opened:
            self.array = np.empty((0, 0, 0), np.uint8)
            self._shared.close()
