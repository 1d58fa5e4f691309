"""What the CUDA runner needs of a device besides tensors: pinned memory, events, graphs.

`HostAccelerator` is the fake: the same runner computes on the CPU, eagerly, without a GPU.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Protocol

import torch

from pdrelay.engine.step_news import StepNews

Work = Callable[[], None]


class DeviceEvent(Protocol):
    """A point of the device's stream."""

    def record(self) -> None: ...

    def query(self) -> bool: ...

    def synchronize(self) -> None: ...


class Accelerator(Protocol):
    device: torch.device

    def pinned(self, num_words: int) -> torch.Tensor:
        """Zeros int64 [num_words] in host memory that the device copies from and to directly."""

    def event(self) -> DeviceEvent: ...

    def watch(self, event: DeviceEvent) -> None:
        """Make `fileno` readable once `event`, recorded already, has passed."""

    def fileno(self) -> int | None: ...

    def drain_news(self) -> None: ...

    def capture(self, work: Work) -> Work:
        """Record `work`, which ran before, as a graph; returns what replays it. Memory that is
        allocated inside is shared by all graphs: their results are valid until the next replay."""

    def synchronize(self) -> None: ...

    def close(self) -> None: ...


class HostAccelerator:
    """The CPU: every call is done when it returns."""

    device = torch.device("cpu")

    def pinned(self, num_words: int) -> torch.Tensor:
        return torch.zeros(num_words, dtype=torch.int64)

    def event(self) -> DeviceEvent:
        return _Passed()

    def watch(self, event: DeviceEvent) -> None:
        pass

    def fileno(self) -> int | None:
        return None

    def drain_news(self) -> None:
        pass

    def capture(self, work: Work) -> Work:
        return work

    def synchronize(self) -> None:
        pass

    def close(self) -> None:
        pass


class _Passed:
    def record(self) -> None:
        pass

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass


class CudaAccelerator:
    """One CUDA device, its current stream, and a thread that waits for events.

    The thread sleeps in the driver (blocking events) without the interpreter lock and wakes the
    loop through an eventfd, so the loop goes on reading its sockets while a step computes.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._news = StepNews()
        self._pool = torch.cuda.graph_pool_handle()
        self._capturing = torch.cuda.Stream(device)
        self._watched: queue.SimpleQueue[DeviceEvent | None] = queue.SimpleQueue()
        self._watcher = threading.Thread(target=self._watch_all, name="step-watcher", daemon=True)
        self._watcher.start()

    def pinned(self, num_words: int) -> torch.Tensor:
        return torch.zeros(num_words, dtype=torch.int64, pin_memory=True)

    def event(self) -> DeviceEvent:
        event: DeviceEvent = torch.cuda.Event(blocking=True)
        return event

    def watch(self, event: DeviceEvent) -> None:
        self._watched.put(event)

    def fileno(self) -> int | None:
        return self._news.fileno()

    def drain_news(self) -> None:
        self._news.drain()

    def capture(self, work: Work) -> Work:
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(self.device)
        # Not by `torch.cuda.graph`: it would give back all cached memory, which steps that are
        # not graphs need again at once. Other threads (transports) may use the device meanwhile.
        with torch.cuda.stream(self._capturing):
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                work()
            finally:
                graph.capture_end()
        return graph.replay

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def close(self) -> None:
        self._watched.put(None)
        self._watcher.join()
        self._news.close()

    def _watch_all(self) -> None:
        torch.cuda.set_device(self.device)
        while (event := self._watched.get()) is not None:
            event.synchronize()
            self._news.ring()
