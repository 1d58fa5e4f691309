"""One reading of one GPU, one JSON line in `gpu*.jsonl`."""

from __future__ import annotations

import msgspec

SCHEMA_VERSION = 1


class GpuInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What does not change while we look."""

    index: int  # NVML's
    uuid: str
    name: str
    memory_bytes: int
    peak_bytes_per_s: float | None = None  # of DRAM: bus width x 2 x highest memory clock
    gpm: bool = False  # whether it has GPM counters (Hopper and later)


class GpuSample(msgspec.Struct, kw_only=True, omit_defaults=True):
    """Averages since the sample before; None where the GPU or driver does not tell.

    `utilization` is NVML's plain one, the share of time in which any kernel ran: it says nothing of
    how many SMs were busy, and stands in where there are no GPM counters.
    """

    t_ns: int  # CLOCK_MONOTONIC, at the end of the interval
    gpu: int  # GpuInfo.index
    sm: float | None = None  # share of SMs busy, 0 to 1
    occupancy: float | None = None  # warps active, 0 to 1
    tensor: float | None = None  # tensor cores active, 0 to 1
    dram: float | None = None  # of DRAM's peak bandwidth, 0 to 1
    dram_bytes_per_s: float | None = None
    nvlink_rx_mib_s: float | None = None
    nvlink_tx_mib_s: float | None = None
    utilization: float | None = None  # 0 to 1
    memory_used_bytes: int | None = None
    sm_clock_mhz: int | None = None
    memory_clock_mhz: int | None = None
    power_w: float | None = None


class GpuLog(msgspec.Struct, kw_only=True):
    """The first line of a file of samples."""

    schema_version: int = SCHEMA_VERSION
    gpus: list[GpuInfo] = []
    instances: dict[str, list[int]] = {}  # instance to the indices of its GPUs
    assignment: str = ""  # where `instances` comes from
    period_s: float = 0.0
    missing: str = ""  # why there are no GPUs
