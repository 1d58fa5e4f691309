"""The seam between those who want readings and the driver that has them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from pdrelay.telemetry.sample import GpuInfo, GpuSample


class GpuSource(Protocol):
    """Reads all GPUs that this process may see. One thread at a time."""

    gpus: list[GpuInfo]

    def read(self) -> list[GpuSample]:
        """One sample a GPU, averaged since the call before. A GPU that does not answer is left
        out; nothing is raised."""

    def close(self) -> None: ...


@dataclass(frozen=True)
class NoGpu:
    """Why nothing can be read, in one line."""

    reason: str


OpenGpus = Callable[[], GpuSource | NoGpu]


def open_source() -> GpuSource | NoGpu:
    """NVML through `pynvml`, where there are both and a GPU."""
    try:
        import pynvml
    except ImportError:
        return NoGpu("pynvml is not installed: pip install 'pdrelay[gpu]'")
    from pdrelay.telemetry.nvml import open_nvml

    return open_nvml(pynvml)
