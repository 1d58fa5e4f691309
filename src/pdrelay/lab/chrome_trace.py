"""A Chrome trace (Perfetto, chrome://tracing) of all requests: a process per instance and link.

Format: Chromium's "Trace Event Format", JSON object form. Times are µs after the first event.
Perfetto drops without a word what breaks its rules (tests/lab/trace_rules.py has them): slices of
one thread that overlap, flows whose id is no number or that bind to no open slice.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from pdrelay.core.events import Event, EventKind, RequestRecord
from pdrelay.lab.rundir import Run, TopologyData
from pdrelay.lab.topology import label_of
from pdrelay.telemetry.log import GpuRecord
from pdrelay.telemetry.sample import GpuSample

_CLIENT_SIDE = "router"
_APART_NS = 1000  # between slices on one row: importers round to whole ns, each start and end
_TIDS = 10_000  # thread ids a process: none is a process's id or another process's thread
TraceEvent = dict[str, Any]


def chrome_trace(run: Run) -> dict[str, Any]:
    """The trace of a run: `{"traceEvents": [...], "displayTimeUnit": "ms"}`.

    Each topology's instances, links and router are processes; requests that overlap on one of
    them lie on numbered rows (threads). A flow arrow leads from prefill over the transfer to decode
    where a request has prefill and decode on two instances.
    """
    pids, flows = _Numbers(), itertools.count(1)
    zero = min(
        (event.t_ns for data in run.topologies.values() for event in _all_events(data)), default=0
    )
    events: list[TraceEvent] = []
    for name, data in run.topologies.items():
        requests = [list(spans_of(record)) for record in data.by_client_id.values()]
        for own in requests:
            _tie(own, flows)
        spans = [span for own in requests for span in own]
        for track, on_track in _by_track(spans).items():
            process = f"{label_of(name)} · {track}"
            pid = pids.number(process)
            events.append(_metadata(pid, process))
            events += _rows(on_track, pid, zero)
        events += _gpu_counters(data, pids, label_of(name), zero)
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": {"model": run.info.model}}


def _gpu_counters(
    data: TopologyData, pids: _Numbers, label: str, zero_ns: int
) -> Iterator[TraceEvent]:
    """A process for each instance's GPU, with a counter track a quantity."""
    named: dict[str, int] = {}
    for record in data.gpu:
        for instance, gpus in record.log.instances.items():
            for gpu in gpus:
                process = f"{label} · GPU {gpu} ({instance})"
                if process not in named:
                    named[process] = pids.number(process)
                    yield _metadata(named[process], process)
                yield from _counters(record, gpu, named[process], zero_ns)


def _counters(record: GpuRecord, gpu: int, pid: int, zero_ns: int) -> Iterator[TraceEvent]:
    for sample in record.samples:
        if sample.gpu != gpu or sample.t_ns < zero_ns:
            continue
        for name, unit, value in _quantities(sample):
            ts = (sample.t_ns - zero_ns) / 1e3
            # Perfetto names the track "name key".
            yield {"ph": "C", "name": name, "pid": pid, "tid": 0, "ts": ts, "args": {unit: value}}


def _quantities(sample: GpuSample) -> Iterator[tuple[str, str, float]]:
    """What the GPU tells, in units that people read."""
    quantities: tuple[tuple[str, str, float | None, float], ...] = (
        ("SM", "%", sample.sm, 100.0),
        ("tensor cores", "%", sample.tensor, 100.0),
        ("DRAM", "TB/s", sample.dram_bytes_per_s, 1e-12),
        ("NVLink out", "GB/s", sample.nvlink_tx_mib_s, (1 << 20) / 1e9),
        ("NVLink in", "GB/s", sample.nvlink_rx_mib_s, (1 << 20) / 1e9),
        ("utilisation", "%", sample.utilization, 100.0),
        ("memory", "GB", sample.memory_used_bytes, 1e-9),
        ("power", "W", sample.power_w, 1.0),
    )
    for name, unit, value, factor in quantities:
        if value is not None:
            yield name, unit, value * factor


class Span:
    """One piece of work of one request on one track."""

    def __init__(
        self,
        track: str,
        name: str,
        start_ns: int,
        end_ns: int,
        request: RequestRecord,
        **args: object,
    ) -> None:
        self.track = track
        self.name = name
        self.start_ns = start_ns
        self.end_ns = max(start_ns, end_ns)
        self.request = request
        self.args = args
        self.flow: tuple[str, int] | None = None  # its phase and id

    @property
    def has_length(self) -> bool:
        return self.end_ns - self.start_ns >= _APART_NS


def spans_of(record: RequestRecord) -> Iterator[Span]:
    """Routing, prefill, transfer and decode of one request."""
    first: dict[EventKind, Event] = {}
    last: dict[EventKind, Event] = {}
    for event in record.events:
        first.setdefault(event.kind, event)
        last[event.kind] = event
    arrived, routed = first.get(EventKind.ARRIVED), first.get(EventKind.ROUTED)
    if arrived and routed:
        yield Span(_CLIENT_SIDE, "route", arrived.t_ns, routed.t_ns, record)
    start, end = first.get(EventKind.PREFILL_START), first.get(EventKind.PREFILL_END)
    if start and end:
        tokens = record.num_prompt_tokens
        yield Span(start.instance, "prefill", start.t_ns, end.t_ns, record, prompt_tokens=tokens)
    moved = last.get(EventKind.TRANSFER_END)
    if moved:
        begun = first.get(EventKind.TRANSFER_START, moved)
        yield Span(
            "link " + " → ".join(record.instances),
            "transfer",
            begun.t_ns,
            moved.t_ns,
            record,
            bytes=moved.num_bytes,
            pieces=moved.num_pieces,
            busy_us=moved.busy_ns / 1e3,
            transport=moved.transport,
        )
    token = last.get(EventKind.TOKEN)
    if token:
        admitted = first.get(EventKind.DECODE_ADMITTED) or first.get(EventKind.FIRST_TOKEN)
        begin = admitted.t_ns if admitted and admitted.instance == token.instance else token.t_ns
        output = record.num_output_tokens
        yield Span(token.instance, "decode", begin, token.t_ns, record, output_tokens=output)


def _tie(spans: Sequence[Span], numbers: Iterator[int]) -> None:
    """Give one request's spans their parts of a flow: prefill, the transfer, decode elsewhere.

    A flow binds to the slice that is open when it starts, so that a span without length has none;
    and it does not lead back in time.
    """
    found = {span.name: span for span in spans if span.has_length}
    prefill, decode = found.get("prefill"), found.get("decode")
    if prefill is None or decode is None or prefill.track == decode.track:
        return
    if decode.start_ns < prefill.start_ns + _APART_NS:
        return
    number = next(numbers)
    prefill.flow, decode.flow = ("s", number), ("f", number)
    moved = found.get("transfer")
    between = range(prefill.start_ns + _APART_NS, decode.start_ns - _APART_NS + 1)
    if moved is not None and moved.start_ns in between:
        moved.flow = ("t", number)


def _rows(spans: list[Span], pid: int, zero_ns: int) -> Iterator[TraceEvent]:
    """Complete events, overlapping ones on different rows, each with its part of a flow."""
    free: list[int] = []
    busy: list[tuple[int, int]] = []  # (end, row)
    num_rows = 0
    for span in sorted(spans, key=lambda span: (span.start_ns, span.end_ns)):
        while busy and busy[0][0] + _APART_NS <= span.start_ns:
            heapq.heappush(free, heapq.heappop(busy)[1])
        if free:
            row = heapq.heappop(free)
        else:
            num_rows += 1
            row = num_rows
            yield _thread_name(pid, row)
        heapq.heappush(busy, (span.end_ns, row))
        yield from _complete(span, pid, row, zero_ns)


def _thread_name(pid: int, row: int) -> TraceEvent:
    return {
        "ph": "M",
        "name": "thread_name",
        "pid": pid,
        "tid": _tid(pid, row),
        "args": {"name": f"requests, row {row}"},
    }


def _tid(pid: int, row: int) -> int:
    return pid * _TIDS + row


def _complete(span: Span, pid: int, row: int, zero_ns: int) -> Iterator[TraceEvent]:
    """The slice, and after it what binds to it."""
    start = (span.start_ns - zero_ns) / 1e3
    request = span.request
    base: TraceEvent = {"pid": pid, "tid": _tid(pid, row), "cat": "request", "ts": start}
    yield base | {
        "ph": "X",
        "name": span.name,
        "dur": (span.end_ns - span.start_ns) / 1e3,
        "args": {
            "request_id": request.request_id,
            "client_request_id": request.client_request_id,
            **span.args,
        },
    }
    if span.flow is not None:
        phase, number = span.flow
        extra = {"bp": "e"} if phase == "f" else {}
        yield base | {"ph": phase, "name": "hand-over", "id": number} | extra


def _by_track(spans: Iterable[Span]) -> dict[str, list[Span]]:
    tracks: dict[str, list[Span]] = {}
    for span in spans:
        tracks.setdefault(span.track, []).append(span)
    return {name: tracks[name] for name in sorted(tracks, key=lambda t: (t != _CLIENT_SIDE, t))}


def _metadata(pid: int, name: str) -> TraceEvent:
    return {"ph": "M", "name": "process_name", "pid": pid, "tid": 0, "args": {"name": name}}


def _all_events(data: TopologyData) -> Iterator[Event]:
    for record in data.by_client_id.values():
        yield from record.events


class _Numbers:
    """Gives names numbers, from 1, in the order of asking."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def number(self, name: str) -> int:
        return self._numbers.setdefault(name, len(self._numbers) + 1)
