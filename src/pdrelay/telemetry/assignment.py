"""Which GPUs an instance runs on, from what its ranks say of themselves.

An instance of a production engine was given `gpus`, names as in CUDA_VISIBLE_DEVICES. A rank's
resolved settings may name `gpu_uuids`, or `device`, both comma-separated where one instance reports
for several ranks. Where they do not say enough (`cuda`, or every rank its own `cuda:0`), the
instances' ranks take the visible GPUs in order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pdrelay.telemetry.sample import GpuInfo

BY_LAUNCH = "as the instances were started: each on its own GPUs, whatever else it sees"
BY_PLAN = "as the ranks report"
BY_INDEX = "by index: ranks in the order of their instances take the visible GPUs in theirs"
NO_GPU = "the instances do not run on a GPU"


@dataclass(frozen=True)
class Worker:
    """One instance."""

    instance: str
    num_ranks: int
    resolved: Mapping[str, str]

    def listed(self, key: str) -> list[str]:
        return [part.strip() for part in self.resolved.get(key, "").split(",") if part.strip()]


@dataclass(frozen=True)
class Assignment:
    """NVML indices by instance, and how they were found."""

    instances: dict[str, list[int]]
    how: str


def assign(workers: Sequence[Worker], gpus: Sequence[GpuInfo]) -> Assignment:
    """Instances that run on no GPU are left out."""
    devices = [name for worker in workers for name in worker.listed("device")]
    if not gpus or (devices and not any(name.startswith("cuda") for name in devices)):
        return Assignment({}, NO_GPU)
    launched = _launched(workers, gpus)
    if launched is not None:
        return Assignment(launched, BY_LAUNCH)
    by_uuid = {gpu.uuid.removeprefix("GPU-"): gpu.index for gpu in gpus}
    by_name = {f"cuda:{place}": gpu.index for place, gpu in enumerate(gpus)}
    reported = _reported(workers, "gpu_uuids", by_uuid) or _reported(workers, "device", by_name)
    if reported is not None:
        return Assignment(reported, BY_PLAN)
    return Assignment(_by_index(workers, gpus), BY_INDEX)


def _launched(workers: Sequence[Worker], gpus: Sequence[GpuInfo]) -> dict[str, list[int]] | None:
    """None unless every instance was given GPUs that we see; two may have been given the same. The
    number of ranks is not asked: of an engine that others wrote, any process may count as one."""
    found: dict[str, list[int]] = {}
    for worker in workers:
        indices = [_index_of(name, gpus) for name in worker.listed("gpus")]
        known = [index for index in indices if index is not None]
        if not known or len(known) != len(indices):
            return None
        found[worker.instance] = known
    return found


def _index_of(name: str, gpus: Sequence[GpuInfo]) -> int | None:
    """`name` is the driver's index or the start of a UUID, as CUDA takes them; None for others and
    for a start of several."""
    if name.isdecimal():
        matching = [gpu.index for gpu in gpus if gpu.index == int(name)]
    else:
        matching = [gpu.index for gpu in gpus if gpu.uuid.startswith(name)]
    return matching[0] if len(matching) == 1 else None


def _reported(
    workers: Sequence[Worker], key: str, known: Mapping[str, int]
) -> dict[str, list[int]] | None:
    """None unless every rank names a GPU that we see, each another one."""
    found = {}
    for worker in workers:
        names = [name.removeprefix("GPU-") for name in worker.listed(key)]
        if len(names) != worker.num_ranks or any(name not in known for name in names):
            return None
        found[worker.instance] = [known[name] for name in names]
    indices = [index for own in found.values() for index in own]
    return found if len(indices) == len(dict.fromkeys(indices)) else None


def _by_index(workers: Sequence[Worker], gpus: Sequence[GpuInfo]) -> dict[str, list[int]]:
    """Where there are fewer GPUs than ranks, ranks share them in turn."""
    assigned, rank = {}, 0
    for worker in workers:
        places = [(rank + i) % len(gpus) for i in range(worker.num_ranks)]
        assigned[worker.instance] = [gpus[place].index for place in dict.fromkeys(places)]
        rank += worker.num_ranks
    return assigned
