"""The Chrome trace against the format's rules, and the rules against traces that break them."""

from __future__ import annotations

import copy
import json

import pytest
from fake_launcher import FakeLauncher
from test_lab_run import config
from trace_rules import violations

from pdrelay.core.events import Event, EventKind, RequestRecord
from pdrelay.lab.chrome_trace import chrome_trace
from pdrelay.lab.progress import SilentReporter
from pdrelay.lab.report.build import build_report
from pdrelay.lab.run import run_lab
from pdrelay.lab.rundir import LaunchInfo, Run, TopologyData
from pdrelay.telemetry.fake import FakeSource

MS = 1_000_000

GOOD = {
    "traceEvents": [
        {"ph": "M", "name": "process_name", "pid": 1, "tid": 0, "args": {"name": "P"}},
        {"ph": "M", "name": "process_name", "pid": 2, "tid": 0, "args": {"name": "D"}},
        {"ph": "M", "name": "thread_name", "pid": 1, "tid": 11, "args": {"name": "row"}},
        {"ph": "M", "name": "thread_name", "pid": 2, "tid": 21, "args": {"name": "row"}},
        {"ph": "X", "name": "prefill", "pid": 1, "tid": 11, "ts": 0, "dur": 10.5},
        {"ph": "X", "name": "layer", "pid": 1, "tid": 11, "ts": 2, "dur": 3},
        {"ph": "s", "name": "go", "cat": "c", "id": 7, "pid": 1, "tid": 11, "ts": 0},
        {"ph": "X", "name": "decode", "pid": 2, "tid": 21, "ts": 20, "dur": 5},
        {"ph": "f", "bp": "e", "name": "go", "cat": "c", "id": 7, "pid": 2, "tid": 21, "ts": 20},
        {"ph": "C", "name": "SM", "pid": 2, "tid": 0, "ts": 3.25, "args": {"%": 12}},
        {"ph": "B", "name": "outer", "pid": 2, "tid": 21, "ts": 40},
        {"ph": "E", "pid": 2, "tid": 21, "ts": 41},
    ]
}


def broken(index: int, **changes: object) -> str:
    """GOOD with one event changed; None removes a field."""
    trace = copy.deepcopy(GOOD)
    event = trace["traceEvents"][index]
    event.update(changes)
    for key in [key for key, value in changes.items() if value is None]:
        del event[key]
    return json.dumps(trace)


def test_a_good_trace_breaks_no_rule():
    assert violations(json.dumps(GOOD)) == []


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("[", "not JSON"),
        ("{}", "no traceEvents"),
        ('{"traceEvents": [3]}', "is no object"),
        ('{"traceEvents": [{"ph": "X", "ts": NaN}]}', "NaN is no JSON number"),
        (broken(4, ph="Z"), "phase 'Z'"),
        (broken(4, ts="0"), "ts is '0'"),
        (broken(4, ts=-1), "ts is -1"),
        (broken(4, ts=True), "ts is True"),
        (broken(4, dur=None), "dur is None"),
        (broken(4, dur=-0.5), "dur is -0.5"),
        (broken(4, pid="P"), "pid is 'P'"),
        (broken(4, tid=None), "tid is None"),
        (broken(4, name=""), "has no name"),
        (broken(4, args=[1]), "args is no object"),
        (broken(9, args={"%": "12"}), "counter values"),
        (broken(9, args={}), "counter values"),
        (broken(0, args={}), "process_name is None"),
        (broken(0, name="proces_name"), "metadata 'proces_name'"),
        (broken(0, pid=9), "process 1 has 0 names"),
        (broken(1, pid=1), "process 1 has 2 names"),
        (broken(2, tid=12), "thread 11 of process 1 has 0 names"),
        (broken(3, pid=1, tid=11), "thread 11 of process 1 has 2 names"),
        (broken(5, dur=9), "overlaps"),
        (broken(5, ts=10.4995, dur=1), "overlaps"),  # 0.5 ns within, as an importer truncates
        (broken(6, id="pd-1-1/r12"), "flow id"),
        (broken(6, id=1.5), "flow id"),
        (broken(6, cat=None), "without category"),
        (broken(6, ts=10.5), "lies in no slice"),
        (broken(6, id=8), "is 'f', not a start"),
        (broken(6, ts=21), "lies in no slice"),
        (broken(6, ph="t"), "is 'tf', not a start"),
        (broken(7, dur=0), "lies in no slice"),
        (broken(7, ts=21), "lies in no slice"),
        (broken(8, bp=None), "does not bind"),
        (broken(8, name="gone"), "not a start"),
        (broken(11, ph="B", name="x"), "never ends"),
        (broken(10, ts=42), "ends nothing"),
        (broken(11, name="inner"), "ends another"),
    ],
)
def test_every_rule_is_noticed(text, cause):
    assert any(cause in found for found in violations(text)), violations(text)


def test_hexadecimal_flow_ids_are_one_with_their_numbers():
    trace = copy.deepcopy(GOOD)
    trace["traceEvents"][6]["id"] = "0x7"
    assert violations(json.dumps(trace)) == []


def test_a_thread_is_in_one_process_and_is_no_process():
    trace = copy.deepcopy(GOOD)
    for event in trace["traceEvents"]:
        event["tid"] = {11: 21, 21: 21}.get(event["tid"], event["tid"])
    assert "thread 21 is in 2 processes" in violations(json.dumps(trace))
    for event in trace["traceEvents"]:
        if event["pid"] == 2 and event["tid"] == 21:
            event["tid"] = 2
    assert any("the number of a process" in found for found in violations(json.dumps(trace)))


def test_the_trace_of_a_synthetic_run_breaks_no_rule(built):
    assert violations(built.trace.read_bytes()) == []


async def test_the_trace_of_a_run_breaks_no_rule(tmp_path, monkeypatch):
    monkeypatch.setattr("pdrelay.lab.gpu_watch.PERIOD_S", 0.01)
    chosen = config(tmp_path, "replicas:2,pd:1:1")
    await run_lab(chosen, FakeLauncher(), SilentReporter(), FakeSource)
    built = build_report(tmp_path / "run")
    assert violations(built.trace.read_bytes()) == []
    events = json.loads(built.trace.read_bytes())["traceEvents"]
    assert {event["ph"] for event in events} == {"M", "X", "C", "s", "t", "f"}


def run_of(*records: RequestRecord, info) -> Run:
    data = TopologyData(launch=LaunchInfo(name="pd-1-1", num_gpus=2, argv=[]))
    data.by_client_id = {record.request_id: record for record in records}
    return Run(root=None, info=info, environment={}, topologies={"pd-1-1": data}, cases=[])


def record(name: str, *events: tuple[EventKind, float, str]) -> RequestRecord:
    return RequestRecord(
        request_id=name,
        instances=["prefill-0", "decode-0"],
        events=[Event(kind, round(at * 1000), where) for kind, at, where in events],
    )


@pytest.fixture
def info(built):
    return built.summary.run


def trace_of(*records: RequestRecord, info) -> str:
    return json.dumps(chrome_trace(run_of(*records, info=info)))


P, D = "prefill-0", "decode-0"
PREFILL = ((EventKind.PREFILL_START, 1.0, P), (EventKind.PREFILL_END, 5.0, P))
MOVED = ((EventKind.TRANSFER_START, 2.0, P), (EventKind.TRANSFER_END, 6.0, D))
DECODED = ((EventKind.DECODE_ADMITTED, 7.0, D), (EventKind.TOKEN, 9.0, D))


@pytest.mark.parametrize(
    ("events", "flow"),
    [
        ((*PREFILL, *MOVED, *DECODED), "stf"),
        ((*PREFILL, *DECODED), "sf"),  # no transfer on record
        ((*PREFILL, *MOVED), ""),  # aborted before it decoded
        ((*PREFILL, *MOVED, (EventKind.TOKEN, 9.0, D)), ""),  # one token: decode has no length
        ((*MOVED, *DECODED), ""),
        ((*PREFILL, (EventKind.TRANSFER_END, 6.0, D), *DECODED), "sf"),  # a transfer of no length
        ((PREFILL[0], (EventKind.PREFILL_END, 1.0, P), *DECODED), ""),
        # A consumer that decodes before the producer's clock says so: no arrow back in time.
        ((*PREFILL, (EventKind.DECODE_ADMITTED, 0.5, D), (EventKind.TOKEN, 9.0, D)), ""),
    ],
)
def test_flows_are_whole_or_not_there(info, events, flow):
    text = trace_of(record("r1", *events), info=info)
    assert violations(text) == []
    phases = [event["ph"] for event in json.loads(text)["traceEvents"] if event["ph"] in "stf"]
    assert "".join(sorted(phases, key="stf".index)) == flow


def test_slices_that_touch_stay_apart_after_rounding(info):
    """One ends where the next begins, at times that are no whole µs."""
    records = [
        record(
            f"r{i}",
            (EventKind.PREFILL_START, 0.3333 * i, P),
            (EventKind.PREFILL_END, 0.3333 * (i + 1), P),
        )
        for i in range(60)
    ]
    assert violations(trace_of(*records, info=info)) == []


def test_the_same_request_id_on_two_topologies_is_two_flows(info):
    run = run_of(record("r1", *PREFILL, *MOVED, *DECODED), info=info)
    run.topologies["pd-2-1"] = run.topologies["pd-1-1"]
    text = json.dumps(chrome_trace(run))
    assert violations(text) == []
    starts = [event["id"] for event in json.loads(text)["traceEvents"] if event["ph"] == "s"]
    assert len(starts) == len(set(starts)) == 2


def test_an_empty_run_is_a_trace(info):
    assert violations(trace_of(info=info)) == []
