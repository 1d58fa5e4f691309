from __future__ import annotations

import itertools
import json
from collections import defaultdict

import pytest

from pdrelay.lab.rundir import read_run
from pdrelay.lab.timeline import timelines


@pytest.fixture(scope="module")
def trace(built):
    return json.loads(built.trace.read_bytes())


def of_phase(trace, phase):
    return [event for event in trace["traceEvents"] if event["ph"] == phase]


def test_a_process_for_every_instance_and_link(trace):
    named = [e["args"]["name"] for e in of_phase(trace, "M") if e["name"] == "process_name"]
    assert len(named) == len(set(named))
    for name in ("P/D 1:1 · prefill-0", "P/D 1:1 · decode-0", "P/D 1:1 · router",
                 "P/D 1:1 · link prefill-0 → decode-0", "TP=2 · tp-0"):  # fmt: skip
        assert name in named
    pids = {e["pid"] for e in of_phase(trace, "X") + of_phase(trace, "C")}
    assert pids == {e["pid"] for e in of_phase(trace, "M") if e["name"] == "process_name"}


def test_times_are_microseconds_after_the_first_event(trace):
    events = of_phase(trace, "X")
    assert min(e["ts"] for e in events) == pytest.approx(0, abs=1)
    assert all(e["ts"] >= 0 and e["dur"] >= 0 for e in events)
    prefill = [
        e["dur"]
        for e in events
        if e["name"] == "prefill" and e["args"]["prompt_tokens"] == 2048 and e["dur"] < 300_000
    ]
    assert prefill
    assert min(prefill) > 100_000  # 252 ms in the model, 0.7 of it on TP=2


def test_no_two_events_overlap_on_one_row(trace):
    rows = defaultdict(list)
    for event in of_phase(trace, "X"):
        rows[event["pid"], event["tid"]].append((event["ts"], event["ts"] + event["dur"]))
    assert rows
    for spans in rows.values():
        spans.sort()
        for (_, end), (start, _) in itertools.pairwise(spans):
            assert start >= end - 1e-3


def test_every_request_and_transfer_is_there(trace, built):
    run = read_run(built.report.parent)
    records = [r for data in run.topologies.values() for r in data.by_client_id.values()]
    events = of_phase(trace, "X")
    assert sum(e["name"] == "prefill" for e in events) == len(records)
    moved = [e for e in events if e["name"] == "transfer"]
    assert len(moved) == sum(len(r.instances) == 2 for r in records)
    assert all(e["args"]["bytes"] > 0 and e["args"]["transport"] == "mapped" for e in moved)


def test_flows_have_two_ends(trace):
    starts = [e["id"] for e in of_phase(trace, "s")]
    ends = [e["id"] for e in of_phase(trace, "f")]
    assert len(starts) == len(set(starts))
    assert sorted(starts) == sorted(ends)


def test_timelines_show_one_request_in_each_topology(built):
    drawn = {timeline.topology: timeline for timeline in built.summary.timelines}
    assert list(drawn) == ["replicas-2", "tp-2", "pd-1-1", "replicas-1"]
    for timeline in drawn.values():
        assert timeline.num_prompt_tokens == 2048
        lanes = {lane.name: lane for lane in timeline.lanes}
        assert {"client", "router"} <= set(lanes)
        for lane in timeline.lanes:
            for segment in lane.segments:
                assert 0 <= segment.start <= segment.end <= timeline.until + 1e-6
        (waits,) = [s for s in lanes["client"].segments if s.kind == "wait"]
        assert waits.end == pytest.approx(timeline.ttft)
    names = [lane.name for lane in drawn["pd-1-1"].lanes]
    assert names == ["client", "router", "prefill-0", "link", "decode-0"]


def test_the_timeline_is_of_the_median_request(built):
    run = read_run(built.report.parent)
    for timeline in timelines(run):
        (case,) = [c for c in run.select("ttft", timeline.topology) if c.info.case == "idle"]
        times = sorted(r.ttft_ms for r in case.records if r.tag == "probe-2048")
        assert timeline.ttft == pytest.approx(times[(len(times) - 1) // 2])
