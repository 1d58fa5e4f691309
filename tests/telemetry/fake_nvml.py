"""What `pynvml` looks like to `telemetry/nvml.py`: GPUs whose counters the test sets."""

from __future__ import annotations

from types import SimpleNamespace

METRICS = {
    "SM_UTIL": 2,
    "SM_OCCUPANCY": 3,
    "ANY_TENSOR_UTIL": 5,
    "DRAM_BW_UTIL": 10,
    "NVLINK_TOTAL_RX_PER_SEC": 60,
    "NVLINK_TOTAL_TX_PER_SEC": 61,
}


class NVMLError(Exception):
    pass


class FakeNvml:
    """`totals[gpu][metric]` grow; GPM answers the difference between two snapshots."""

    NVMLError = NVMLError
    NVML_CLOCK_SM, NVML_CLOCK_MEM = 1, 2

    def __init__(self, num_gpus=2, *, gpm=True, driver=True, as_bytes=False):
        self.num_gpus = num_gpus
        self.gpm = gpm
        self.driver = driver
        self.as_bytes = as_bytes
        self.totals = [dict.fromkeys(METRICS.values(), 0.0) for _ in range(num_gpus)]
        self.failing = set()  # metric ids that this GPU does not have
        self.lost = set()  # GPUs that no longer answer
        self.inits = self.shutdowns = 0
        self.snapshots = []
        for name, number in METRICS.items():
            setattr(self, f"NVML_GPM_METRIC_{name}", number)

    def nvmlInit(self):
        if not self.driver:
            raise NVMLError("Driver Not Loaded")
        self.inits += 1

    def nvmlShutdown(self):
        self.shutdowns += 1

    def nvmlDeviceGetCount(self):
        return self.num_gpus

    def nvmlDeviceGetHandleByIndex(self, index):
        return index

    def nvmlDeviceGetUUID(self, gpu):
        uuid = f"GPU-{gpu}{gpu}{gpu}"
        return uuid.encode() if self.as_bytes else uuid

    def nvmlDeviceGetName(self, gpu):
        return b"NVIDIA fake" if self.as_bytes else "NVIDIA fake"

    def _alive(self, gpu):
        if gpu in self.lost:
            raise NVMLError("GPU is lost")

    def nvmlDeviceGetMemoryInfo(self, gpu):
        self._alive(gpu)
        return SimpleNamespace(total=80 << 30, used=(gpu + 1) << 30)

    def nvmlDeviceGetMemoryBusWidth(self, gpu):
        return 5120

    def nvmlDeviceGetMaxClockInfo(self, gpu, kind):
        return 2619

    def nvmlDeviceGetClockInfo(self, gpu, kind):
        self._alive(gpu)
        return 1980 if kind == self.NVML_CLOCK_SM else 2619

    def nvmlDeviceGetUtilizationRates(self, gpu):
        self._alive(gpu)
        return SimpleNamespace(gpu=40, memory=10)

    def nvmlDeviceGetPowerUsage(self, gpu):
        self._alive(gpu)
        return 512_000

    # ---- GPM

    def nvmlGpmQueryDeviceSupport(self, gpu):
        return SimpleNamespace(isSupportedDevice=int(self.gpm))

    def nvmlGpmSampleAlloc(self):
        snapshot = SimpleNamespace(gpu=None, totals=None, freed=False)
        self.snapshots.append(snapshot)
        return snapshot

    def nvmlGpmSampleFree(self, snapshot):
        assert not snapshot.freed
        snapshot.freed = True

    def nvmlGpmSampleGet(self, gpu, snapshot):
        self._alive(gpu)
        snapshot.gpu, snapshot.totals = gpu, dict(self.totals[gpu])

    def c_nvmlGpmMetricsGet_t(self):
        metrics = [SimpleNamespace(metricId=0, nvmlReturn=0, value=0.0) for _ in range(16)]
        return SimpleNamespace(version=0, numMetrics=0, sample1=None, sample2=None, metrics=metrics)

    def nvmlGpmMetricsGet(self, request):
        assert request.version == 1
        before, after = request.sample1, request.sample2
        assert before.gpu == after.gpu
        for metric in request.metrics[: request.numMetrics]:
            metric.nvmlReturn = 3 if metric.metricId in self.failing else 0
            metric.value = after.totals[metric.metricId] - before.totals[metric.metricId]
