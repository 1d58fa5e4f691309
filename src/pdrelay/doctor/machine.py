"""What the kernel and the container allow, beyond `launch.host`."""

from __future__ import annotations

import os
import platform
import re
import resource
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pdrelay.core.time_slice import SHORT_SLICE_NS

_ENVIRONMENT = (
    "CUDA_VISIBLE_DEVICES",
    "GLOO_SOCKET_IFNAME",
    "HF_HUB_OFFLINE",
    "NCCL_P2P_DISABLE",
    "NCCL_SOCKET_IFNAME",
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
    "UCX_TLS",
    "VLLM_DISABLE_REQUEST_ID_RANDOMIZATION",
    "VLLM_HOST_IP",
    "VLLM_USE_V1",
)


@dataclass(frozen=True)
class Machine:
    """Bytes; None means unlimited or unknown, as named."""

    kernel: tuple[int, int]  # (6, 12)
    clock_source: str  # "tsc"; "" where unknown
    slice_ns: int  # that a latency-bound process asks for
    shm_total_bytes: int  # of /dev/shm; 0 when there is none
    shm_free_bytes: int
    memlock_bytes: int | None  # None: unlimited
    container: str  # "docker", "kubernetes", ... or ""
    seccomp: int  # 0 off, 1 strict, 2 filter
    can_ptrace: bool  # CAP_SYS_PTRACE
    loopback_v4: bool
    loopback_v6: bool
    hostname_resolves: bool
    localhost_v6_first: bool  # "localhost" resolves to ::1 first
    environment: Mapping[str, str]  # of the variables that change what engines do


def inspect_machine() -> Machine:
    shm_total, shm_free = _filesystem("/dev/shm")
    memlock = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    status = parse_status(_read("/proc/self/status"))
    return Machine(
        kernel=parse_kernel(platform.release()),
        clock_source=_read(
            "/sys/devices/system/clocksource/clocksource0/current_clocksource"
        ).strip(),
        slice_ns=SHORT_SLICE_NS,
        shm_total_bytes=shm_total,
        shm_free_bytes=shm_free,
        memlock_bytes=None if memlock == resource.RLIM_INFINITY else memlock,
        container=_container(),
        seccomp=status[0],
        can_ptrace=bool(status[1] >> _CAP_SYS_PTRACE & 1),
        loopback_v4=_can_bind(socket.AF_INET, "127.0.0.1"),
        loopback_v6=_can_bind(socket.AF_INET6, "::1"),
        hostname_resolves=_resolves(socket.gethostname()),
        localhost_v6_first=_first_family("localhost") == socket.AF_INET6,
        environment={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
    )


_CAP_SYS_PTRACE = 19  # linux/capability.h


def parse_status(text: str) -> tuple[int, int]:
    """(seccomp mode, effective capabilities) from /proc/PID/status; zeros where absent."""
    fields = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    return int(fields.get("Seccomp", "0")), int(fields.get("CapEff", "0").strip() or "0", 16)


def parse_kernel(release: str) -> tuple[int, int]:
    match = re.match(r"(\d+)\.(\d+)", release)
    return (int(match[1]), int(match[2])) if match else (0, 0)


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _filesystem(path: str) -> tuple[int, int]:
    """(total, available) bytes; zeros when there is no such directory."""
    try:
        stat = os.statvfs(path)
    except OSError:
        return 0, 0
    return stat.f_blocks * stat.f_frsize, stat.f_bavail * stat.f_frsize


def _container() -> str:
    if "KUBERNETES_SERVICE_HOST" in os.environ:
        return "kubernetes"
    if Path("/.dockerenv").exists():
        return "docker"
    return "podman" if Path("/run/.containerenv").exists() else ""


def _can_bind(family: socket.AddressFamily, address: str) -> bool:
    try:
        with socket.socket(family, socket.SOCK_STREAM) as sock:
            sock.bind((address, 0))
            return True
    except OSError:
        return False


def _resolves(name: str) -> bool:
    return _first_family(name) is not None


def _first_family(name: str) -> int | None:
    try:
        return int(socket.getaddrinfo(name, 80, type=socket.SOCK_STREAM)[0][0])
    except (OSError, UnicodeError):
        return None
