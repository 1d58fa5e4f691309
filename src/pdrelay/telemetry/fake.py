"""A GpuSource without a GPU, for tests: answers what it is told."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from pdrelay.core.clock import Clock, monotonic_ns
from pdrelay.telemetry.sample import GpuInfo, GpuSample

Reading = Callable[[int, int], GpuSample]  # (GPU's index, how many reads before) -> sample


class FakeSource:
    """`num_gpus` GPUs of 4 TB/s. `reading` makes each sample; times are the clock's."""

    def __init__(
        self, num_gpus: int = 2, reading: Reading | None = None, clock: Clock = monotonic_ns
    ) -> None:
        self.gpus = [
            GpuInfo(
                index=index,
                uuid=f"GPU-{index}",
                name="fake",
                memory_bytes=80_000_000_000,
                peak_bytes_per_s=4e12,
                gpm=True,
            )
            for index in range(num_gpus)
        ]
        self.reads = 0
        self.closed = False
        self._reading = reading or steady
        self._clock = clock
        self._more = threading.Condition()

    def read(self) -> list[GpuSample]:
        samples = [self._reading(gpu.index, self.reads) for gpu in self.gpus]
        for sample in samples:
            sample.t_ns = self._clock()
        with self._more:
            self.reads += 1
            self._more.notify_all()
        return samples

    def wait_for_reads(self, count: int, timeout_s: float) -> bool:
        """Whether there were `count` reads in time."""
        with self._more:
            return self._more.wait_for(lambda: self.reads >= count, timeout_s)

    def close(self) -> None:
        self.closed = True


def steady(gpu: int, reads: int) -> GpuSample:
    """GPU 0 as a busy producer, every other one as a busy consumer."""
    producer = gpu == 0
    dram = 0.25 if producer else 0.75
    return GpuSample(
        t_ns=0,
        gpu=gpu,
        sm=0.9 if producer else 0.5,
        occupancy=0.3,
        tensor=0.7 if producer else 0.1,
        dram=dram,
        dram_bytes_per_s=dram * 4e12,
        nvlink_rx_mib_s=0.0 if producer else 6000.0,
        nvlink_tx_mib_s=6000.0 if producer else 0.0,
        utilization=1.0,
        memory_used_bytes=20_000_000_000,
        sm_clock_mhz=1980,
        memory_clock_mhz=3201,
        power_w=500.0,
    )


def readings(samples: Sequence[Sequence[GpuSample]]) -> Reading:
    """Given samples, `samples[reads][gpu]`; the last ones again when they run out."""

    def reading(gpu: int, reads: int) -> GpuSample:
        return samples[min(reads, len(samples) - 1)][gpu]

    return reading
