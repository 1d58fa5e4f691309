"""What `pdrelay kv` measures and predicts."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pdrelay.lab.kv.model import Compute, Link

CPU_TRANSPORTS = ("mapped", "tcp", "pool")
CUDA_TRANSPORTS = ("mapped", "nccl", "tcp", "pool")
PLACEMENTS = ("contiguous", "scattered")
DEFAULT_LENGTHS = (64, 128, 256, 512, 1024, 2048, 4096, 8192)
DEFAULT_BLOCK_SIZES = (16, 64)
DEFAULT_REPEATS = 12  # a median needs 11 samples
ONE_GPU = (
    "One GPU: both processes are on it, and the link between their pools is its own memory, whose "
    "bandwidth reads and writes share, also with the computation."
)

# What a network or bus is sold as; overheads of its protocol are not taken off.
LINKS = (
    Link(
        "NVLink",
        390e9,
        True,
        "assumed: one direction between two H200 (18 links sold as 450 GB/s), driver copies of 64 "
        "MiB and more",
    ),
    Link("PCIe 5 x16", 63e9, True, "assumed: 16 lanes of 32 GT/s, line code taken off"),
    Link("400 Gb/s", 50e9, False, "assumed: line rate, one card a host"),
    Link("100 Gb/s", 12.5e9, False, "assumed: line rate, one card a host"),
)
GPU = Compute(
    "GPU",
    660e12,
    4e12,
    "assumed: bf16 matrix products of an H100 or H200 at two thirds of 989 TFLOP/s, 4 TB/s of "
    "memory",
)


@dataclass(frozen=True)
class ServeConfig:
    """The same hand-over inside real servers, P/D beside one replica."""

    lengths: tuple[int, ...]
    requests: int  # a length and repeat
    repeats: int
    args: tuple[str, ...] = ()  # passed to `pdrelay serve`
    startup_timeout_s: float = 300.0
    side_by_side: bool = True  # both servers at once, requests in turn
    apart: bool = True  # one server after the other, as the lab's first experiment


@dataclass(frozen=True)
class KvConfig:
    """The whole run. Lengths are tokens."""

    model: str
    dtype: str
    tp: int
    device: str
    out: Path
    transports: tuple[str, ...]
    lengths: tuple[int, ...]
    block_sizes: tuple[int, ...]
    num_gpus: int = 0  # in this machine; 0 on CPU
    placements: tuple[str, ...] = PLACEMENTS
    repeats: int = DEFAULT_REPEATS
    predict_only: bool = False
    serve: ServeConfig | None = None
    compute: Compute = GPU
    links: tuple[Link, ...] = LINKS
    timeout_s: float = 60.0
    seed: int = 0
    argv: tuple[str, ...] = ()

    @property
    def devices(self) -> tuple[str, str]:
        """The producer's and the consumer's."""
        if self.device == "cpu":
            return "cpu", "cpu"
        return "cuda:0", "cuda:1" if self.num_gpus > 1 else "cuda:0"

    @property
    def remark(self) -> str:
        """What qualifies the measured link, or nothing."""
        return ONE_GPU if self.device == "cuda" and self.num_gpus == 1 else ""

    def as_json(self) -> dict[str, Any]:
        """For run.json: plain values."""
        values = asdict(self)
        values["out"] = self.out.name
        del values["argv"]
        return values
