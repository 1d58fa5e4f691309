"""A thread that reads a source at a steady rate."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from pdrelay.telemetry.sample import GpuLog, GpuSample
from pdrelay.telemetry.source import GpuSource

PERIOD_S = 0.1
_STOP_S = 5.0  # for a read under way: the driver answers in ms, or is stuck


class Sampler:
    """Calls `take` with each reading, from its own thread, until stopped; then closes the source.

    Readings keep to a schedule: a late one is not made up for, the next is on time.
    """

    def __init__(
        self, source: GpuSource, take: Callable[[list[GpuSample]], None], period_s: float = PERIOD_S
    ) -> None:
        self._source = source
        self._take = take
        self._period_s = period_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="gpu-telemetry", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def _run(self) -> None:
        due = time.monotonic()
        while not self._stop.is_set():
            self._take(self._source.read())
            due = max(due + self._period_s, time.monotonic())
            self._stop.wait(due - time.monotonic())

    def stop(self) -> bool:
        """Idempotent. False when a read hangs: the thread is left behind, and so is the source."""
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join(_STOP_S)
        if self._thread.is_alive():
            return False
        self._source.close()
        return True


class FileSampler:
    """Samples into a JSONL file: a GpuLog line, then GpuSample lines."""

    def __init__(
        self, source: GpuSource, path: Path, log: GpuLog, period_s: float = PERIOD_S
    ) -> None:
        """Raises OSError."""
        log.period_s = period_s
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("wb")
        self._file.write(msgspec.json.encode(log) + b"\n")
        self._sampler = Sampler(source, self._write, period_s)
        self._sampler.start()

    def _write(self, samples: list[GpuSample]) -> None:
        self._file.write(b"".join(msgspec.json.encode(sample) + b"\n" for sample in samples))
        self._file.flush()

    def stop(self) -> None:
        """No line follows. Idempotent."""
        if self._sampler.stop() and not self._file.closed:
            self._file.close()
