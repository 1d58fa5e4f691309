"""The machine's NVIDIA GPUs and how they reach each other: NVML, else nvidia-smi, else none."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

_SMI_DEADLINE_S = 20.0
_MAX_NVLINKS = 18
_SMI_QUERY = (
    "index,uuid,name,memory.total,memory.free,mig.mode.current,compute_mode,compute_cap,"
    "driver_version"
)
_COMPUTE_MODES = ("Default", "Exclusive_Thread", "Prohibited", "Exclusive_Process")
_ANCESTORS = {0: "same board", 10: "PIX", 20: "PXB", 30: "PHB", 40: "NODE", 50: "SYS"}


@dataclass(frozen=True)
class Gpu:
    """`index` is NVML's. Memory in bytes."""

    index: int
    uuid: str
    name: str
    total_bytes: int
    free_bytes: int
    mig: bool = False
    compute_mode: str = "Default"
    capability: tuple[int, int] = (0, 0)
    num_nvlinks: int | None = None  # active ones; None where unknown


@dataclass(frozen=True)
class Link:
    """Between two GPUs; None where unknown."""

    a: int
    b: int
    peer_access: bool | None = None
    path: str = ""  # the nearest common switch, bridge or socket, in nvidia-smi's words


@dataclass(frozen=True)
class GpuFacts:
    gpus: tuple[Gpu, ...] = ()
    links: tuple[Link, ...] = ()
    driver: str = ""
    cuda_version: int | None = None  # the driver's highest, 13000 for 13.0
    source: str = ""  # "NVML", "nvidia-smi" or "" when there is neither
    error: str = ""


def read_gpus() -> GpuFacts:
    """What the driver says; never raises."""
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError:
        nvml = None
    if nvml is not None:
        facts = from_nvml(nvml)
        if facts.gpus:
            return facts
    if shutil.which("nvidia-smi") is None:
        return GpuFacts(error="no NVIDIA GPU: neither NVML nor nvidia-smi answers")
    return from_nvidia_smi(_run_smi)


def from_nvml(nvml: Any) -> GpuFacts:
    """From the module `pynvml`, or one that acts like it."""
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        return GpuFacts(error=str(error))
    try:
        handles = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
        pairs = [(a, b) for a in range(len(handles)) for b in range(a + 1, len(handles))]
        return GpuFacts(
            gpus=tuple(_nvml_gpu(nvml, index, handle) for index, handle in enumerate(handles)),
            links=tuple(_nvml_link(nvml, handles, a, b) for a, b in pairs),
            driver=_text(_try(nvml, nvml.nvmlSystemGetDriverVersion, default="")),
            cuda_version=_try(nvml, nvml.nvmlSystemGetCudaDriverVersion_v2),
            source="NVML",
        )
    except nvml.NVMLError as error:
        return GpuFacts(source="NVML", error=str(error))
    finally:
        nvml.nvmlShutdown()


def _try(nvml: Any, call: Callable[..., Any], *args: Any, default: Any = None) -> Any:
    """The answer, or `default` where this driver or GPU has none."""
    try:
        return call(*args)
    except nvml.NVMLError:
        return default


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _nvml_gpu(nvml: Any, index: int, handle: Any) -> Gpu:
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    mig = _try(nvml, nvml.nvmlDeviceGetMigMode, handle, default=(0, 0))
    mode = _try(nvml, nvml.nvmlDeviceGetComputeMode, handle, default=0)
    capability = _try(nvml, nvml.nvmlDeviceGetCudaComputeCapability, handle, default=(0, 0))
    links = [_try(nvml, nvml.nvmlDeviceGetNvLinkState, handle, i) for i in range(_MAX_NVLINKS)]
    return Gpu(
        index=index,
        uuid=_text(nvml.nvmlDeviceGetUUID(handle)),
        name=_text(nvml.nvmlDeviceGetName(handle)),
        total_bytes=memory.total,
        free_bytes=memory.free,
        mig=bool(mig[0]),
        compute_mode=_COMPUTE_MODES[mode] if 0 <= mode < len(_COMPUTE_MODES) else str(mode),
        capability=(capability[0], capability[1]),
        num_nvlinks=sum(bool(link) for link in links),
    )


def _nvml_link(nvml: Any, handles: Sequence[Any], a: int, b: int) -> Link:
    status = _try(
        nvml, nvml.nvmlDeviceGetP2PStatus, handles[a], handles[b], nvml.NVML_P2P_CAPS_INDEX_READ
    )
    level = _try(nvml, nvml.nvmlDeviceGetTopologyCommonAncestor, handles[a], handles[b])
    return Link(
        a,
        b,
        peer_access=None if status is None else status == nvml.NVML_P2P_STATUS_OK,
        path=_ANCESTORS.get(level, ""),
    )


def _run_smi(*args: str) -> str:
    """Output of nvidia-smi; raises OSError or subprocess.SubprocessError."""
    return subprocess.run(
        ["nvidia-smi", *args],
        capture_output=True,
        text=True,
        timeout=_SMI_DEADLINE_S,
        check=True,
    ).stdout


def from_nvidia_smi(run: Callable[..., str]) -> GpuFacts:
    """From what `run(*arguments)` of nvidia-smi prints."""
    try:
        table = run(f"--query-gpu={_SMI_QUERY}", "--format=csv,noheader,nounits")
    except (OSError, subprocess.SubprocessError) as error:
        return GpuFacts(source="nvidia-smi", error=f"nvidia-smi failed: {error}")
    rows = [[cell.strip() for cell in line.split(",")] for line in table.splitlines()]
    rows = [row for row in rows if len(row) == len(_SMI_QUERY.split(","))]
    try:
        matrix = run("topo", "-p2p", "r")
    except (OSError, subprocess.SubprocessError):
        matrix = ""
    return GpuFacts(
        gpus=tuple(_smi_gpu(row) for row in rows),
        links=parse_p2p_matrix(matrix),
        driver=rows[0][-1] if rows else "",
        source="nvidia-smi",
        error="" if rows else "nvidia-smi lists no GPU",
    )


def _smi_gpu(row: Sequence[str]) -> Gpu:
    index, uuid, name, total, free, mig, mode, capability, _ = row
    major, _, minor = capability.partition(".")
    return Gpu(
        index=int(index),
        uuid=uuid,
        name=name,
        total_bytes=_mebibytes(total),
        free_bytes=_mebibytes(free),
        mig=mig == "Enabled",
        compute_mode=mode,
        capability=(int(major), int(minor)) if major.isdecimal() and minor.isdecimal() else (0, 0),
    )


def _mebibytes(cell: str) -> int:
    return int(cell) << 20 if cell.isdecimal() else 0


def parse_p2p_matrix(text: str) -> tuple[Link, ...]:
    """From `nvidia-smi topo -p2p r`: rows `GPU0  X  OK  CNS`."""
    links = []
    for line in text.splitlines():
        cells = line.split()
        if len(cells) < 2 or not cells[0].startswith("GPU") or "X" not in cells[1:]:
            continue
        a = int(cells[0][3:])
        links += [
            Link(a, b, peer_access=cell == "OK")
            for b, cell in enumerate(cells[1:])
            if b > a and cell != "X"
        ]
    return tuple(links)


def visible(facts: GpuFacts, devices: str | None = None) -> GpuFacts:
    """Only what CUDA_VISIBLE_DEVICES (or `devices`) leaves, in its order."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES") if devices is None else devices
    if chosen is None:
        return facts
    gpus: list[Gpu] = []
    for word in (part.strip() for part in chosen.split(",")):
        found = [
            gpu
            for gpu in facts.gpus
            if (word.isdecimal() and gpu.index == int(word))
            or (word.startswith("GPU-") and gpu.uuid.startswith(word))
        ]
        if not found:
            break  # CUDA ignores everything from the first unknown one on
        gpus += found[:1]
    kept = {gpu.index for gpu in gpus}
    links = tuple(link for link in facts.links if link.a in kept and link.b in kept)
    return replace(facts, gpus=tuple(gpus), links=links)
