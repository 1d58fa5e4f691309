"""Reads and writes whole files of samples."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import msgspec

from pdrelay.errors import ConfigError
from pdrelay.telemetry.sample import SCHEMA_VERSION, GpuInfo, GpuLog, GpuSample


@dataclass(frozen=True)
class GpuRecord:
    """One file: its first line, and its samples by time."""

    log: GpuLog
    samples: list[GpuSample]

    def of(self, gpu: int, start_ns: int, end_ns: int) -> list[GpuSample]:
        """One GPU's samples within a time span."""
        return [s for s in self.samples if s.gpu == gpu and start_ns <= s.t_ns <= end_ns]

    def info(self, gpu: int) -> GpuInfo | None:
        return next((info for info in self.log.gpus if info.index == gpu), None)


def write_missing(path: Path, reason: str) -> None:
    """A file that says why there is nothing to read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(msgspec.json.encode(GpuLog(missing=reason)) + b"\n")


def read_gpu_record(path: Path) -> GpuRecord:
    """Raises ConfigError that names the line. A last line without its newline is dropped."""
    try:
        complete, _, _ = path.read_bytes().rpartition(b"\n")
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}; restore it") from error
    lines = complete.split(b"\n")
    number = 1
    try:
        log = msgspec.json.decode(lines[0], type=GpuLog)
        samples = []
        decoder = msgspec.json.Decoder(GpuSample)
        for line in lines[1:]:
            number += 1
            samples.append(decoder.decode(line))
    except msgspec.MsgspecError as error:
        raise ConfigError(f"{path}:{number} is damaged: {error}; delete the line") from error
    if log.schema_version != SCHEMA_VERSION:
        raise ConfigError(
            f"{path} has schema_version {log.schema_version}, this pdrelay reads "
            f"{SCHEMA_VERSION}: use the pdrelay that made it"
        )
    return GpuRecord(log, samples)
