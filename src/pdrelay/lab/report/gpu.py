"""What each instance's GPUs did while requests ran: from NVML's samples and the event lists."""

from __future__ import annotations

import statistics
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from pdrelay.core.events import EventKind, RequestRecord
from pdrelay.lab.report.figures import Counter, GpuFigures, GpuRow, GpuTrack
from pdrelay.lab.rundir import Case, Run, TopologyData
from pdrelay.telemetry.log import GpuRecord
from pdrelay.telemetry.sample import GpuSample

TRACKED = ("interference", "traffic", "ttft", "shapes")  # the first that ran is drawn over time
_MIB = 1 << 20
Value = Callable[[GpuSample], float | None]


def gpu_figures(run: Run) -> GpuFigures:
    """By experiment, topology and instance."""
    records = [record for data in run.topologies.values() for record in data.gpu]
    logs = [record.log for record in records]
    rows = [
        row
        for experiment in run.info.experiments
        for name in run.topologies
        for row in _rows(run, experiment, name)
    ]
    gpus = {info.index: info for log in logs for info in log.gpus}
    return GpuFigures(
        missing=list(dict.fromkeys(log.missing for log in logs if log.missing)),
        gpus=[gpus[index] for index in sorted(gpus)],
        assignment=list(dict.fromkeys(log.assignment for log in logs if log.assignment)),
        rows=rows,
        tracks=_tracks(run),
    )


# ---- the table


@dataclass(frozen=True)
class _Reading:
    """A sample, and whether its instance computed throughout its interval."""

    sample: GpuSample
    working: bool


def _rows(run: Run, experiment: str, topology: str) -> list[GpuRow]:
    data, cases = run.topologies[topology], run.select(experiment, topology)
    instances = dict.fromkeys(name for record in data.gpu for name in record.log.instances)
    rows = []
    for instance in instances:
        spans = busy_spans(data.by_client_id.values(), instance)
        readings = list(_readings(data, cases, instance, spans))
        if readings:
            rows.append(_row(topology, experiment, instance, data, readings))
    return rows


def _readings(
    data: TopologyData, cases: Sequence[Case], instance: str, spans: Spans
) -> Iterator[_Reading]:
    for record in data.gpu:
        for gpu in record.log.instances.get(instance, []):
            for case in cases:
                before: int | None = None
                for sample in record.of(gpu, *_window(case)):
                    if before is not None:
                        yield _Reading(sample, spans.cover(before, sample.t_ns))
                    before = sample.t_ns


def _window(case: Case) -> tuple[int, int]:
    """First sending to last answer of the measured traffic: an open loop's window ends earlier."""
    ends = [record.end_ns for record in case.measured]
    return case.info.window_start_ns, max([case.info.window_end_ns, *ends])


def _row(
    topology: str,
    experiment: str,
    instance: str,
    data: TopologyData,
    readings: Sequence[_Reading],
) -> GpuRow:
    samples = [reading.sample for reading in readings]
    working = [reading.sample for reading in readings if reading.working]
    gpus = [gpu for record in data.gpu for gpu in record.log.instances.get(instance, [])]
    dram = [s.dram_bytes_per_s for s in samples if s.dram_bytes_per_s is not None]
    memory = [s.memory_used_bytes for s in samples if s.memory_used_bytes is not None]
    return GpuRow(
        topology=topology,
        experiment=experiment,
        instance=instance,
        gpus=list(dict.fromkeys(gpus)),
        n=len(samples),
        sm=_mean(samples, lambda s: s.sm),
        tensor=_mean(samples, lambda s: s.tensor),
        dram=_mean(samples, lambda s: s.dram),
        dram_tb_per_s=_mean(samples, lambda s: s.dram_bytes_per_s, 1e-12),
        dram_tb_per_s_max=max(dram) / 1e12 if dram else None,
        nvlink_tx_gb_per_s=_mean(samples, lambda s: s.nvlink_tx_mib_s, _MIB / 1e9),
        nvlink_rx_gb_per_s=_mean(samples, lambda s: s.nvlink_rx_mib_s, _MIB / 1e9),
        utilization=_mean(samples, lambda s: s.utilization),
        memory_gb=max(memory) / 1e9 if memory else None,
        power_w=_mean(samples, lambda s: s.power_w),
        working_n=len(working),
        working_sm=_mean(working, lambda s: s.sm),
        working_dram_tb_per_s=_mean(working, lambda s: s.dram_bytes_per_s, 1e-12),
        working_dram=_mean(working, lambda s: s.dram),
    )


def _mean(samples: Iterable[GpuSample], value: Value, factor: float = 1.0) -> float | None:
    known = [v for v in map(value, samples) if v is not None]
    return statistics.fmean(known) * factor if known else None


class Spans:
    """Disjoint time spans, in order."""

    def __init__(self, spans: Iterable[tuple[int, int]]) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []
        for start, end in sorted(spans):
            if self._ends and start <= self._ends[-1]:
                self._ends[-1] = max(self._ends[-1], end)
            else:
                self._starts.append(start)
                self._ends.append(end)

    def cover(self, start: int, end: int) -> bool:
        """Whether one span holds all of `start .. end`."""
        place = bisect_right(self._starts, start) - 1
        return place >= 0 and end <= self._ends[place]


def busy_spans(records: Iterable[RequestRecord], instance: str) -> Spans:
    """When `instance` prefilled or decoded some request."""
    return Spans(span for record in records for span in _work(record, instance))


def _work(record: RequestRecord, instance: str) -> Iterator[tuple[int, int]]:
    own = [event for event in record.events if event.instance == instance]
    start = next((e.t_ns for e in own if e.kind is EventKind.PREFILL_START), None)
    end = next((e.t_ns for e in own if e.kind is EventKind.PREFILL_END), None)
    if start is not None and end is not None:
        yield start, end
    begins = (EventKind.DECODE_ADMITTED, EventKind.FIRST_TOKEN)
    first = next((e.t_ns for e in own if e.kind in begins), None)
    last = next((e.t_ns for e in reversed(own) if e.kind is EventKind.TOKEN), None)
    if first is not None and last is not None:
        yield first, last


# ---- over time


def _tracks(run: Run) -> list[GpuTrack]:
    """One case in each topology: the first of the first experiment in TRACKED that ran."""
    tracks = []
    for name, data in run.topologies.items():
        cases = [case for experiment in TRACKED for case in run.select(experiment, name)]
        if cases:
            tracks += list(_of_case(data, cases[0]))
    return tracks


def _of_case(data: TopologyData, case: Case) -> Iterator[GpuTrack]:
    start, end = _window(case)
    for record in data.gpu:
        for instance, gpus in record.log.instances.items():
            for gpu in gpus:
                points = [
                    ((s.t_ns - start) / 1e9, s.sm if s.sm is not None else s.utilization, s.dram)
                    for s in record.of(gpu, start, end)
                ]
                if points:
                    yield GpuTrack(
                        topology=case.info.topology,
                        instance=instance,
                        gpu=gpu,
                        case=case.path,
                        points=points,
                    )


# ---- under one request


def counters_under(data: TopologyData, start_ns: int, end_ns: int) -> list[Counter]:
    """SMs and DRAM of each instance's GPUs between two times; every sample as wide as it is long.
    Empty without GPUs."""
    found = []
    for record in data.gpu:
        for instance, gpus in record.log.instances.items():
            for gpu in gpus:
                for what, value in _SHOWN:
                    steps = list(_steps(record, gpu, start_ns, end_ns, value))
                    if steps:
                        found.append(Counter(name=f"{instance} {what}", steps=steps))
    return found


_SHOWN: tuple[tuple[str, Value], ...] = (
    ("SMs", lambda s: s.sm if s.sm is not None else s.utilization),
    ("DRAM", lambda s: s.dram),
)


def _steps(
    record: GpuRecord, gpu: int, start_ns: int, end_ns: int, value: Value
) -> Iterator[tuple[float, float, float]]:
    before: int | None = None
    for sample in (s for s in record.samples if s.gpu == gpu):
        share = value(sample)
        if before is not None and sample.t_ns > start_ns and before < end_ns and share is not None:
            left, right = max(before, start_ns), min(sample.t_ns, end_ns)
            yield (left - start_ns) / 1e6, (right - start_ns) / 1e6, share
        before = sample.t_ns
