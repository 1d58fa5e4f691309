"""What a JSON trace must fulfil for Perfetto and chrome://tracing to draw all of it.

Rules of the "Trace Event Format" document (JSON object form, complete, duration, counter, metadata
and flow events) and of Perfetto's importer, which drops what breaks them without a word:

- times are µs; Perfetto takes them as whole ns, so neighbours must stay apart after rounding;
- slices of one thread nest or are disjoint: of two that partly overlap, the second is dropped;
- B and E come in pairs, innermost first;
- a flow's id is a whole number, or a string of hexadecimal digits; other strings are dropped;
- a flow event binds to the slice that is open on its thread at its time: one that has length, and
  that comes earlier in the file where both have one time stamp;
- a flow has one start, then steps, then an end, in the order of time, with one name and category;
- threads and processes that are drawn have names, each one; a thread belongs to one process, and
  one whose tid is a pid would be taken for that process's main thread;
- a counter's values are numbers.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

TraceEvent = dict[str, Any]
KNOWN_PHASES = frozenset("XBECMstf")
FLOW_PHASES = "stf"
_METADATA = ("process_name", "thread_name", "process_sort_index", "thread_sort_index")
_HEXADECIMAL = re.compile(r"(0[xX])?[0-9a-fA-F]{1,16}")


def violations(text: str | bytes) -> list[str]:
    """Every rule that the trace breaks, with the event's place in it; empty for a good trace."""
    try:
        trace = json.loads(text, parse_constant=_no_constant)
    except ValueError as error:
        return [f"not JSON: {error}"]
    events = trace.get("traceEvents") if isinstance(trace, dict) else None
    if not isinstance(events, list):
        return ["no traceEvents list"]
    malformed = [f"event {i}: {what}" for i, event in enumerate(events) for what in _fields(event)]
    if malformed:
        return malformed  # the rest needs the fields
    return [*_names(events), *_nesting(events), *_pairs(events), *_flows(events)]


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _fields(event: object) -> Iterator[str]:
    """What is wrong with one event on its own."""
    if not isinstance(event, dict):
        yield "is no object"
        return
    phase = event.get("ph")
    if phase not in KNOWN_PHASES:
        yield f"phase {phase!r}"
        return
    if phase != "E" and not (isinstance(event.get("name"), str) and event["name"]):
        yield "has no name"
    for key in ("pid", "tid"):
        if not _is_whole(event.get(key)):
            yield f"{key} is {event.get(key)!r}"
    if not isinstance(event.get("args", {}), dict):
        yield "args is no object"
        return
    if phase == "M":
        yield from _metadata_fields(event)
        return
    if not _is_number(event.get("ts")) or event["ts"] < 0:
        yield f"ts is {event.get('ts')!r}"
    if phase == "X" and (not _is_number(event.get("dur")) or event["dur"] < 0):
        yield f"dur is {event.get('dur')!r}"
    if phase == "C" and not (event.get("args") and all(map(_is_number, event["args"].values()))):
        yield f"counter values are {event.get('args')!r}"
    if phase in FLOW_PHASES:
        yield from _flow_fields(event)


def _metadata_fields(event: TraceEvent) -> Iterator[str]:
    if event["name"] not in _METADATA:
        yield f"metadata {event['name']!r}"
    elif event["name"].endswith("_name"):
        name = event.get("args", {}).get("name")
        if not (isinstance(name, str) and name):
            yield f"{event['name']} is {name!r}"


def _flow_fields(event: TraceEvent) -> Iterator[str]:
    number = event.get("id")
    is_string = isinstance(number, str) and _HEXADECIMAL.fullmatch(number) is not None
    if not is_string and not (_is_whole(number) and number >= 0):
        yield f"flow id {number!r}"
    if not isinstance(event.get("cat"), str):
        yield "a flow without category"
    if event["ph"] == "f" and event.get("bp") != "e":
        yield "a flow's end that does not bind to the enclosing slice"


def _ns(event: TraceEvent) -> tuple[int, int]:
    """Start and end of a complete event as an importer that truncates takes them."""
    start = int(event["ts"] * 1000)
    return start, start + int(event["dur"] * 1000)


def _names(events: list[TraceEvent]) -> Iterator[str]:
    processes: dict[int, int] = defaultdict(int)
    threads: dict[tuple[int, int], int] = defaultdict(int)
    owners: dict[int, set[int]] = defaultdict(set)
    drawn: dict[tuple[int, int], None] = {}
    for event in events:
        pid, tid = event["pid"], event["tid"]
        if event["ph"] == "M" and event["name"] == "process_name":
            processes[pid] += 1
        elif event["ph"] == "M" and event["name"] == "thread_name":
            threads[pid, tid] += 1
        elif event["ph"] in "XBE":
            drawn[pid, tid] = None
            owners[tid].add(pid)
    used = dict.fromkeys(event["pid"] for event in events if event["ph"] != "M")
    for pid in used:
        if processes[pid] != 1:
            yield f"process {pid} has {processes[pid]} names"
    for pid, tid in drawn:
        if threads[pid, tid] != 1:
            yield f"thread {tid} of process {pid} has {threads[pid, tid]} names"
        if tid in used:
            yield f"thread {tid} of process {pid} has the number of a process"
    for tid, pids in owners.items():
        if len(pids) > 1:
            yield f"thread {tid} is in {len(pids)} processes"


def _by_thread(events: list[TraceEvent], phases: str) -> dict[tuple[int, int], list[TraceEvent]]:
    threads: dict[tuple[int, int], list[TraceEvent]] = defaultdict(list)
    for event in events:
        if event["ph"] in phases:
            threads[event["pid"], event["tid"]].append(event)
    return threads


def _nesting(events: list[TraceEvent]) -> Iterator[str]:
    """Complete events of one thread, sorted as an importer sorts: by start, stable."""
    for (pid, tid), slices in _by_thread(events, "X").items():
        open_ends: list[int] = []
        for event in sorted(slices, key=lambda event: _ns(event)[0]):
            start, end = _ns(event)
            while open_ends and open_ends[-1] <= start:
                open_ends.pop()
            if open_ends and end > open_ends[-1]:
                late_us = (end - open_ends[-1]) / 1e3
                yield (
                    f"{event['name']} at {event['ts']} µs on thread {tid} of process {pid} "
                    f"overlaps a slice that ends {late_us} µs before it"
                )
                continue
            open_ends.append(end)


def _pairs(events: list[TraceEvent]) -> Iterator[str]:
    for (pid, tid), pairs in _by_thread(events, "BE").items():
        stack: list[TraceEvent] = []
        for event in sorted(pairs, key=lambda event: event["ts"]):
            if event["ph"] == "B":
                stack.append(event)
            elif not stack:
                yield f"an E at {event['ts']} µs on thread {tid} of process {pid} ends nothing"
            elif event.get("name", stack[-1]["name"]) != stack.pop()["name"]:
                yield f"an E at {event['ts']} µs on thread {tid} of process {pid} ends another"
        for event in stack:
            yield f"{event['name']} at {event['ts']} µs on thread {tid} never ends"


def _flows(events: list[TraceEvent]) -> Iterator[str]:
    slices: dict[tuple[int, int], list[tuple[int, int, int]]] = defaultdict(list)
    flows: dict[tuple[str, str, int], list[tuple[int, str]]] = defaultdict(list)
    for place, event in enumerate(events):
        thread = event["pid"], event["tid"]
        if event["ph"] == "X":
            slices[thread].append((*_ns(event), place))
        elif event["ph"] in FLOW_PHASES:
            number = event["id"]
            value = int(number, 16) if isinstance(number, str) else number
            at = int(event["ts"] * 1000)
            flows[event["cat"], event["name"], value].append((at, event["ph"]))
    for place, event in enumerate(events):
        if event["ph"] in FLOW_PHASES:
            at = int(event["ts"] * 1000)
            around = slices[event["pid"], event["tid"]]
            if not any(s < at < e or (s == at < e and before < place) for s, e, before in around):
                yield f"flow {event['id']} ({event['ph']}) at {event['ts']} µs lies in no slice"
    for (_, name, number), parts in flows.items():
        phases = "".join(phase for _, phase in sorted(parts, key=lambda part: part[0]))
        if re.fullmatch("st*f", phases) is None:
            yield f"flow {name} {number} is {phases!r}, not a start, steps and an end"
