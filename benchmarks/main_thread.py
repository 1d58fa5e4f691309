"""How much a process's event loop has computed."""

from __future__ import annotations

from pathlib import Path


def cpu_s(pid: int) -> float:
    """CPU time of a process's main thread so far (/proc/PID/schedstat, ns)."""
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9
