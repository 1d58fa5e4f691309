"""How much of this host's cores somebody else used during a measurement (Linux proc(5))."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class HostSample:
    """Cumulated CPU seconds on the cores that we may use: of everybody, and of us."""

    at_s: float
    everybody_s: float
    ours_s: float


def sample(pids: Sequence[int]) -> HostSample | None:
    """`ours` are this process and `pids`. None where there is no /proc."""
    try:
        everybody = _busy_s(Path("/proc/stat").read_text(encoding="ascii"))
    except OSError:
        return None
    ours = sum(_process_s(pid) for pid in dict.fromkeys([os.getpid(), *pids]))
    return HostSample(time.monotonic(), everybody, ours)


def foreign_cores(before: HostSample | None, after: HostSample | None) -> float | None:
    """Cores that other processes kept busy in between, on average."""
    if before is None or after is None or after.at_s <= before.at_s:
        return None
    everybody = after.everybody_s - before.everybody_s
    ours = after.ours_s - before.ours_s
    return max(0.0, (everybody - ours) / (after.at_s - before.at_s))


def _busy_s(stat: str) -> float:
    """user, nice, system, irq, softirq, steal of the cores in our affinity mask."""
    mine = {f"cpu{core}" for core in os.sched_getaffinity(0)}
    ticks = 0
    for line in stat.splitlines():
        name, *fields = line.split()
        if name in mine:
            numbers = [int(field) for field in fields[:8]]
            ticks += sum(numbers) - sum(numbers[3:5])  # less idle and iowait
    return ticks / os.sysconf("SC_CLK_TCK")


def _process_s(pid: int) -> float:
    """utime + stime of a process with its ended children; 0 when it is gone."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return 0.0
    fields = stat.rpartition(")")[2].split()
    return sum(int(field) for field in fields[11:15]) / os.sysconf("SC_CLK_TCK")
