"""GPU gauges for /metrics: the latest sample of each GPU, taken once a second by a thread."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from pdrelay.telemetry.assignment import Assignment
from pdrelay.telemetry.sample import GpuSample
from pdrelay.telemetry.sampler import Sampler
from pdrelay.telemetry.source import GpuSource

PERIOD_S = 1.0  # a reading costs well under a millisecond
_LABELS = ("model_name", "instance", "gpu")
_MIB = float(1 << 20)
# Name, help, sample's field, factor.
_GAUGES: tuple[tuple[str, str, str, float], ...] = (
    ("pdrelay:gpu_sm_utilization", "Share of SMs busy, 0 to 1.", "sm", 1.0),
    ("pdrelay:gpu_sm_occupancy", "Share of warps active, 0 to 1.", "occupancy", 1.0),
    ("pdrelay:gpu_tensor_utilization", "Tensor cores active, 0 to 1.", "tensor", 1.0),
    ("pdrelay:gpu_dram_utilization", "Of DRAM's peak bandwidth, 0 to 1.", "dram", 1.0),
    ("pdrelay:gpu_dram_bytes_per_second", "DRAM traffic.", "dram_bytes_per_s", 1.0),
    ("pdrelay:gpu_nvlink_rx_bytes_per_second", "NVLink, received.", "nvlink_rx_mib_s", _MIB),
    ("pdrelay:gpu_nvlink_tx_bytes_per_second", "NVLink, sent.", "nvlink_tx_mib_s", _MIB),
    ("pdrelay:gpu_utilization", "Share of time with any kernel, 0 to 1.", "utilization", 1.0),
    ("pdrelay:gpu_memory_used_bytes", "Memory in use, of all processes.", "memory_used_bytes", 1.0),
    ("pdrelay:gpu_sm_clock_hertz", "SM clock.", "sm_clock_mhz", 1e6),
    ("pdrelay:gpu_power_watts", "Power drawn.", "power_w", 1.0),
)


class GpuMetrics(Collector):
    """Owns the source until `close`. A GPU that ranks of several instances share is theirs all."""

    def __init__(
        self,
        source: GpuSource,
        model_name: str,
        assignment: Callable[[], Assignment],
        period_s: float = PERIOD_S,
    ) -> None:
        """`assignment` is asked at each scrape: instances come and go."""
        self._model_name = model_name
        self._assignment = assignment
        self._latest: list[GpuSample] = []  # replaced whole: the scrape reads it without a lock
        self._sampler = Sampler(source, self._take, period_s)
        self._sampler.start()

    def _take(self, samples: list[GpuSample]) -> None:
        self._latest = samples

    def collect(self) -> Iterable[Metric]:
        owners: dict[int, list[str]] = {}
        for instance, gpus in self._assignment().instances.items():
            for gpu in gpus:
                owners.setdefault(gpu, []).append(instance)
        latest = self._latest
        for name, text, field, factor in _GAUGES:
            gauge = GaugeMetricFamily(name, text, labels=_LABELS)
            for sample in latest:
                value = getattr(sample, field)
                for instance in owners.get(sample.gpu, []) if value is not None else []:
                    labels = [self._model_name, instance, str(sample.gpu)]
                    gauge.add_metric(labels, value * factor)
            yield gauge

    def close(self) -> None:
        self._sampler.stop()
