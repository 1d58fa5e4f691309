"""NVML's GPM counters, and its plain readings, through the `pynvml` module (nvidia-ml-py).

GPM ("GPU performance monitoring") averages hardware counters between two snapshots. It needs no
profiler's permission and costs some tens of µs a reading, but exists from Hopper on only.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from pdrelay.core.clock import Clock, monotonic_ns
from pdrelay.telemetry.sample import GpuInfo, GpuSample
from pdrelay.telemetry.source import GpuSource, NoGpu

T = TypeVar("T")
# Sample's field, NVML's metric, and what its unit is to be multiplied by.
_PERCENT = 0.01
_METRICS: tuple[tuple[str, str, float], ...] = (
    ("sm", "NVML_GPM_METRIC_SM_UTIL", _PERCENT),
    ("occupancy", "NVML_GPM_METRIC_SM_OCCUPANCY", _PERCENT),
    ("tensor", "NVML_GPM_METRIC_ANY_TENSOR_UTIL", _PERCENT),
    ("dram", "NVML_GPM_METRIC_DRAM_BW_UTIL", _PERCENT),
    ("nvlink_rx_mib_s", "NVML_GPM_METRIC_NVLINK_TOTAL_RX_PER_SEC", 1.0),
    ("nvlink_tx_mib_s", "NVML_GPM_METRIC_NVLINK_TOTAL_TX_PER_SEC", 1.0),
)
_DOUBLE_DATA_RATE = 2
_GPM_VERSION = 1


def open_nvml(nvml: Any, environ: Mapping[str, str] = os.environ) -> GpuSource | NoGpu:
    """`nvml` is the module `pynvml` or what behaves like it."""
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        return NoGpu(f"no NVIDIA driver answers ({error})")
    try:
        source = NvmlSource(nvml, environ)
    except nvml.NVMLError as error:
        nvml.nvmlShutdown()
        return NoGpu(f"the NVIDIA driver does not list its GPUs ({error})")
    if not source.gpus:
        source.close()
        return NoGpu("the NVIDIA driver lists no GPU that this process may use")
    return source


@dataclass
class _Gpu:
    handle: Any
    info: GpuInfo
    before: Any = None  # GPM snapshots: the last one, and the one to overwrite
    after: Any = None


class NvmlSource:
    """See GpuSource."""

    def __init__(
        self, nvml: Any, environ: Mapping[str, str], *, clock: Clock = monotonic_ns
    ) -> None:
        self._nvml = nvml
        self._clock = clock
        handles = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
        uuids = [_text(nvml.nvmlDeviceGetUUID(handle)) for handle in handles]
        chosen = visible(uuids, environ.get("CUDA_VISIBLE_DEVICES"))
        self._gpus = [self._open(handles[i], i, uuids[i]) for i in chosen]
        self.gpus = [gpu.info for gpu in self._gpus]

    def _open(self, handle: Any, index: int, uuid: str) -> _Gpu:
        nvml = self._nvml
        gpm = bool(self._try(lambda: nvml.nvmlGpmQueryDeviceSupport(handle).isSupportedDevice))
        memory = self._try(lambda: nvml.nvmlDeviceGetMemoryInfo(handle).total)
        info = GpuInfo(
            index=index,
            uuid=uuid,
            name=_text(nvml.nvmlDeviceGetName(handle)),
            memory_bytes=memory or 0,
            peak_bytes_per_s=self._peak(handle),
            gpm=gpm,
        )
        gpu = _Gpu(handle, info)
        if gpm:
            gpu.before, gpu.after = nvml.nvmlGpmSampleAlloc(), nvml.nvmlGpmSampleAlloc()
            nvml.nvmlGpmSampleGet(handle, gpu.before)
        return gpu

    def _peak(self, handle: Any) -> float | None:
        nvml = self._nvml
        bits = self._try(lambda: nvml.nvmlDeviceGetMemoryBusWidth(handle))
        mhz = self._try(lambda: nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_MEM))
        return bits / 8 * mhz * 1e6 * _DOUBLE_DATA_RATE if bits and mhz else None

    def _try(self, read: Callable[[], T]) -> T | None:
        """None where this GPU or driver does not have the reading."""
        try:
            return read()
        except (self._nvml.NVMLError, AttributeError):
            return None

    def read(self) -> list[GpuSample]:
        return [sample for gpu in self._gpus if (sample := self._read(gpu)) is not None]

    def _read(self, gpu: _Gpu) -> GpuSample | None:
        nvml, handle = self._nvml, gpu.handle
        memory = self._try(lambda: nvml.nvmlDeviceGetMemoryInfo(handle).used)
        rates = self._try(lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu)
        power = self._try(lambda: nvml.nvmlDeviceGetPowerUsage(handle))
        counters = self._counters(gpu) if gpu.info.gpm else {}
        if memory is None and rates is None and not counters:
            return None
        sample = GpuSample(
            t_ns=self._clock(),
            gpu=gpu.info.index,
            utilization=None if rates is None else rates * _PERCENT,
            memory_used_bytes=memory,
            sm_clock_mhz=self._clock_mhz(handle, nvml.NVML_CLOCK_SM),
            memory_clock_mhz=self._clock_mhz(handle, nvml.NVML_CLOCK_MEM),
            power_w=None if power is None else power / 1e3,
        )
        for field, value in counters.items():
            setattr(sample, field, value)
        if sample.dram is not None and gpu.info.peak_bytes_per_s is not None:
            sample.dram_bytes_per_s = sample.dram * gpu.info.peak_bytes_per_s
        return sample

    def _clock_mhz(self, handle: Any, kind: int) -> int | None:
        return self._try(lambda: self._nvml.nvmlDeviceGetClockInfo(handle, kind))

    def _counters(self, gpu: _Gpu) -> dict[str, float]:
        """GPM counters since the last call, by the sample's field; those that failed left out."""
        nvml = self._nvml
        try:
            nvml.nvmlGpmSampleGet(gpu.handle, gpu.after)
            request = nvml.c_nvmlGpmMetricsGet_t()
            request.version, request.numMetrics = _GPM_VERSION, len(_METRICS)
            request.sample1, request.sample2 = gpu.before, gpu.after
            for place, (_, metric, _) in enumerate(_METRICS):
                request.metrics[place].metricId = getattr(nvml, metric)
            nvml.nvmlGpmMetricsGet(request)
        except nvml.NVMLError:
            return {}
        gpu.before, gpu.after = gpu.after, gpu.before
        return {
            field: request.metrics[place].value * unit
            for place, (field, _, unit) in enumerate(_METRICS)
            if request.metrics[place].nvmlReturn == 0
        }

    def close(self) -> None:
        for gpu in self._gpus:
            for snapshot in (gpu.before, gpu.after):
                if snapshot is not None:
                    self._try(lambda kept=snapshot: self._nvml.nvmlGpmSampleFree(kept))  # type: ignore[misc]
        self._gpus = []
        self._try(self._nvml.nvmlShutdown)


def visible(uuids: Sequence[str], setting: str | None) -> list[int]:
    """NVML indices in the order in which CUDA numbers them, from CUDA_VISIBLE_DEVICES.

    Numbers are taken as NVML's, which holds where CUDA orders by bus (CUDA_DEVICE_ORDER, or GPUs of
    one kind). As in CUDA, the list ends at the first entry that names no GPU.
    """
    if setting is None:
        return list(range(len(uuids)))
    chosen: list[int] = []
    for part in (part.strip() for part in setting.split(",")):
        if part.isdecimal() and int(part) < len(uuids):
            found = [int(part)]
        else:
            found = [i for i, uuid in enumerate(uuids) if part and uuid.startswith(part)]
        if len(found) != 1 or found[0] in chosen:
            break
        chosen += found
    return chosen


def _text(value: str | bytes) -> str:
    """Older versions of the module answer in bytes."""
    return value.decode() if isinstance(value, bytes) else value
