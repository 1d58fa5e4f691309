"""Samples the GPUs while one server of the lab runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pdrelay.lab.rundir import WorkerInfo
from pdrelay.telemetry.assignment import Worker, assign
from pdrelay.telemetry.log import write_missing
from pdrelay.telemetry.sample import GpuLog
from pdrelay.telemetry.sampler import PERIOD_S, FileSampler
from pdrelay.telemetry.source import GpuSource, NoGpu


class GpuWatch:
    """Writes `path` from now until `stop`; only the reason where there is no GPU."""

    def __init__(
        self, source: GpuSource | NoGpu, path: Path, workers: Sequence[WorkerInfo]
    ) -> None:
        self._sampler: FileSampler | None = None
        if isinstance(source, NoGpu):
            write_missing(path, source.reason)
            return
        found = assign(_instances(workers), source.gpus)
        if not found.instances:
            source.close()
            write_missing(path, found.how)
            return
        log = GpuLog(gpus=source.gpus, instances=found.instances, assignment=found.how)
        self._sampler = FileSampler(source, path, log, PERIOD_S)

    def stop(self) -> None:
        """Idempotent."""
        if self._sampler is not None:
            self._sampler.stop()


def _instances(workers: Sequence[WorkerInfo]) -> list[Worker]:
    """Ranks by instance; rank 0 has the settings."""
    ranks: dict[str, list[WorkerInfo]] = {}
    for worker in workers:
        ranks.setdefault(worker.instance, []).append(worker)
    return [
        Worker(name, len(own), next((w.resolved for w in own if w.resolved), {}))
        for name, own in ranks.items()
    ]
