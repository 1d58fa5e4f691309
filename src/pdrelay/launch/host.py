"""What the machine offers, as far as the launcher cares."""

from __future__ import annotations

import os
import resource
import shutil
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Host:
    num_cores: int  # this process may use
    memory_bytes: int  # total, or the control group's limit
    available_bytes: int  # without swapping
    num_gpus: int  # this process may use
    max_open_files: int
    compiler: str | None  # path of a C compiler


def inspect_host() -> Host:
    total, available = _memory()
    return Host(
        num_cores=_num_cores(),
        memory_bytes=total,
        available_bytes=available,
        num_gpus=_num_gpus(),
        max_open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        compiler=shutil.which("cc") or shutil.which("gcc") or shutil.which("clang"),
    )


def _num_cores(group: Path = Path("/sys/fs/cgroup")) -> int:
    """Those of the affinity mask; fewer where control group v2 limits the time on them."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = (group / "cpu.max").read_text().split()
        return max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):  # no such group, or "max"
        return cores


def _memory() -> tuple[int, int]:
    """(total, available) bytes; control group v2's limit where it is lower."""
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    total = int(fields["MemTotal"].split()[0]) * 1024
    available = int(fields["MemAvailable"].split()[0]) * 1024
    group = Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        used = int((group / "memory.current").read_text()) - int(stat.get("inactive_file", 0))
    except (OSError, ValueError):  # no such group, or "max"
        return total, available
    return min(total, limit), min(available, max(limit - used, 0))


def _num_gpus() -> int:
    """NVIDIA GPUs with a device file (containers get their share of them), or that the driver
    lists; of these, those that CUDA_VISIBLE_DEVICES leaves."""
    files = [path for path in Path("/dev").glob("nvidia*") if path.name[6:].isdecimal()]
    driver = Path("/proc/driver/nvidia/gpus")
    present = len(files) or (len(list(driver.iterdir())) if driver.is_dir() else 0)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return present if visible is None else min(present, _num_visible(visible))


def _num_visible(devices: str) -> int:
    """How many a CUDA_VISIBLE_DEVICES value names: CUDA stops at the first it does not know."""
    count = 0
    for device in devices.split(","):
        if not device.strip() or device.strip().startswith("-"):
            break
        count += 1
    return count
