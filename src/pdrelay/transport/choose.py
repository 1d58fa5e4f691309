"""Which transport can move KV between these GPUs: asked for, or the next that works.

probe = probe_gpus([0, 1])                       # a process of its own, seconds
choice = choose_transport("mapped", [(0, 1)], probe)
choice.name, choice.notes                        # "nccl", ["mapped: ...; using nccl"]
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from pdrelay.errors import TransportError

FALLBACKS = ("mapped", "nccl", "tcp")
_PROBE_TIMEOUT_S = 60.0


class GpuPair(msgspec.Struct, frozen=True):
    """What GPU `a` can do with GPU `b`'s memory."""

    a: int
    b: int
    peer_access: bool
    nvlink: bool  # else PCIe


class GpuProbe(msgspec.Struct, frozen=True):
    """What `python -m pdrelay.transport.cuda.probe` found out."""

    pairs: list[GpuPair] = []
    ipc_error: str = ""  # why a process cannot open another's memory; empty: it can
    nccl_error: str = ""  # why NCCL cannot be used; empty: it can


@dataclass(frozen=True)
class Choice:
    name: str
    notes: list[str] = field(default_factory=list)  # a line each, for people


def choose_transport(wanted: str, gpu_pairs: Sequence[tuple[int, int]], probe: GpuProbe) -> Choice:
    """The transport for KV from a producer's to a consumer's GPU, for each of `gpu_pairs`.

    A transport that cannot work is replaced by the next of `FALLBACKS` that can, with a note of one
    line that says why; those that need no such check (`tcp`, `pool`) are taken as they are.
    """
    if wanted not in FALLBACKS:
        return Choice(wanted)
    notes: list[str] = []
    for name in FALLBACKS[FALLBACKS.index(wanted) :]:
        obstacle = _obstacle(name, gpu_pairs, probe)
        if obstacle is None:
            chosen = [f"{note}; using {name}" for note in notes]
            return Choice(name, chosen + _remarks(name, gpu_pairs, probe))
        notes.append(f"transport {name}: {obstacle}")
    raise AssertionError("tcp has no obstacle")


def _obstacle(name: str, gpu_pairs: Sequence[tuple[int, int]], probe: GpuProbe) -> str | None:
    if name == "tcp":
        return None
    if name == "nccl":
        for a, b in gpu_pairs:
            if a == b:
                return f"NCCL refuses two ranks on one GPU ({a})"
        return probe.nccl_error or None
    for a, b in gpu_pairs:
        if a != b and not _pair(a, b, probe).peer_access:
            return (
                f"GPU {a} cannot reach GPU {b}'s memory (no peer access: other PCIe roots, or a "
                "virtual machine or driver setting that forbids it)"
            )
    if probe.ipc_error:
        return f"a process cannot open another's GPU memory ({probe.ipc_error})"
    return None


def _remarks(name: str, gpu_pairs: Sequence[tuple[int, int]], probe: GpuProbe) -> list[str]:
    if name == "tcp":
        return [
            "transport tcp: KV goes through host memory; expect a fraction of a GPU link's rate"
        ]
    slow = [(a, b) for a, b in gpu_pairs if a != b and not _pair(a, b, probe).nvlink]
    return [f"GPUs {a} and {b} have no NVLink: KV goes over PCIe" for a, b in slow]


def _pair(a: int, b: int, probe: GpuProbe) -> GpuPair:
    for pair in probe.pairs:
        if (pair.a, pair.b) == (a, b):
            return pair
    return GpuPair(a, b, peer_access=False, nvlink=False)


def probe_gpus(ordinals: Sequence[int]) -> GpuProbe:
    """Ask in a process of its own: one that used CUDA must not start others by fork, and a driver
    that hangs must not hang this one. Raises TransportError when it gives no answer."""
    command = [sys.executable, "-m", "pdrelay.transport.cuda.probe", *map(str, ordinals)]
    try:
        done = subprocess.run(command, capture_output=True, timeout=_PROBE_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise TransportError(
            f"the CUDA driver did not answer within {_PROBE_TIMEOUT_S:g} s: see nvidia-smi"
        ) from error
    if done.returncode:
        last = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise TransportError(f"cannot look at the GPUs: {''.join(last) or 'no reason given'}")
    return msgspec.json.decode(done.stdout, type=GpuProbe)
