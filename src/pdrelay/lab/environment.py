"""What the run ran on, for environment.json."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("aiohttp", "msgspec", "numpy", "tokenizers", "torch", "transformers", "uvloop")
_QUERY = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
_COMMAND_S = 10.0


def environment() -> dict[str, Any]:
    """CPU, memory, kernel, versions, GPUs and load average now."""
    return {
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "kernel": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "packages": _packages(),
        "gpus": _gpus(),
        "load_average": [round(load, 2) for load in os.getloadavg()],
    }


def git_commit() -> str:
    """The commit of the checkout that this package lies in, with `+` when changed; else empty."""
    root = Path(__file__).resolve().parents[3]
    if not (root / ".git").exists():
        return ""
    commit = _output(["git", "-C", str(root), "rev-parse", "--short=12", "HEAD"])
    changed = _output(["git", "-C", str(root), "status", "--porcelain", "-uno"])
    return commit + ("+" if commit and changed else "")


def cpu_name() -> str:
    """As the kernel gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _packages() -> dict[str, str]:
    """Versions by package, from metadata: nothing is imported."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _gpus() -> list[str]:
    if shutil.which(_QUERY[0]) is None:
        return []
    return _output(_QUERY).splitlines()


def _output(command: list[str]) -> str:
    """Standard output, or nothing when the command fails or takes too long."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_COMMAND_S, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()
