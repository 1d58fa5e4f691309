"""GPU samples in a lab run: from a fake source to the report, the trace, and the terminal."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET

import pytest
from fake_launcher import FakeLauncher
from test_lab_run import TINY, config

from pdrelay.core.events import Event, EventKind, RequestRecord
from pdrelay.lab.gpu_watch import GpuWatch
from pdrelay.lab.progress import SilentReporter
from pdrelay.lab.report.build import build_report
from pdrelay.lab.report.gpu import Spans, busy_spans, counters_under
from pdrelay.lab.run import run_lab
from pdrelay.lab.rundir import LaunchInfo, TopologyData, WorkerInfo
from pdrelay.telemetry.fake import FakeSource
from pdrelay.telemetry.log import GpuRecord, read_gpu_record
from pdrelay.telemetry.sample import GpuLog, GpuSample
from pdrelay.telemetry.source import NoGpu

MS = 1_000_000


async def lab(tmp_path, open_gpus):
    settings = config(tmp_path, "pd:1:1", experiments=("ttft",), scale=TINY)
    await run_lab(settings, FakeLauncher(), SilentReporter(), open_gpus)
    return build_report(tmp_path / "run")


async def test_gpus_are_sampled_and_shown(tmp_path, monkeypatch):
    monkeypatch.setattr("pdrelay.lab.gpu_watch.PERIOD_S", 0.001)
    sources = []

    def open_gpus():
        sources.append(FakeSource())
        return sources[-1]

    built = await lab(tmp_path, open_gpus)
    assert len(sources) == 1 and sources[0].closed
    rows = {(row.experiment, row.instance): row for row in built.summary.gpu.rows}
    producer, consumer = rows["ttft", "prefill-0"], rows["ttft", "decode-0"]
    assert (producer.gpus, consumer.gpus) == ([0], [1])
    assert producer.sm == pytest.approx(0.9) and producer.n > 0
    assert consumer.dram_tb_per_s == pytest.approx(3.0) == consumer.dram_tb_per_s_max
    assert consumer.nvlink_rx_gb_per_s == pytest.approx(6000 * 2**20 / 1e9)
    page = built.report.read_text()
    assert "P GPU utilisation in 1 TTFT: 90%" in page
    assert "D GPU memory bandwidth in 1 TTFT: 3.00 TB/s" in page
    ET.fromstring(page.removeprefix("<!DOCTYPE html>\n"))
    trace = json.loads(built.trace.read_bytes())["traceEvents"]
    names = {event["args"]["name"] for event in trace if event["name"] == "process_name"}
    assert {"P/D 1:1 · GPU 0 (prefill-0)", "P/D 1:1 · GPU 1 (decode-0)"} <= names
    counters = [event for event in trace if event["ph"] == "C" and event["name"] == "SM"]
    assert {event["args"]["%"] for event in counters} == {90.0, 50.0}
    assert built.summary.timelines[0].counters


def test_an_engine_of_several_processes_is_credited_with_its_own_gpus_only(tmp_path):
    workers = [
        WorkerInfo(instance=name, rank=rank, resolved={"gpus": own} if rank == 0 else {})
        for name, own in (("prefill-0", "0"), ("decode-0", "1"))
        for rank in range(3)  # processes: a server, its engine core, a resource tracker
    ]
    path = tmp_path / "gpu.jsonl"
    watch = GpuWatch(FakeSource(), path, workers)
    watch.stop()
    assert read_gpu_record(path).log.instances == {"prefill-0": [0], "decode-0": [1]}


async def test_without_a_gpu_the_report_says_so(tmp_path):
    built = await lab(tmp_path, lambda: NoGpu("no NVIDIA driver answers"))
    assert built.summary.gpu.rows == [] and built.summary.timelines[0].counters == []
    page = built.report.read_text()
    assert "No GPU was sampled: no NVIDIA driver answers." in page
    section = page[page.index('id="gpus"') : page.index('id="timelines"')]
    assert "<svg" not in section


def test_work_is_the_union_of_what_requests_did_there():
    def record(*events):
        return RequestRecord(
            request_id="r", events=[Event(kind, t, where) for kind, t, where in events]
        )

    records = [
        record(
            (EventKind.PREFILL_START, 10, "p"),
            (EventKind.PREFILL_END, 20, "p"),
            (EventKind.FIRST_TOKEN, 21, "p"),
            (EventKind.DECODE_ADMITTED, 30, "d"),
            (EventKind.TOKEN, 60, "d"),
        ),
        record((EventKind.DECODE_ADMITTED, 50, "d"), (EventKind.TOKEN, 90, "d")),
    ]
    prefill, decode = busy_spans(records, "p"), busy_spans(records, "d")
    assert prefill.cover(10, 20) and not prefill.cover(10, 21) and not prefill.cover(9, 12)
    assert decode.cover(30, 90) and decode.cover(55, 65) and not decode.cover(20, 40)
    assert not Spans([]).cover(0, 1)


def test_samples_under_a_request_are_cut_to_it():
    samples = [GpuSample(t_ns=t * MS, gpu=0, sm=s) for t, s in ((0, 0.1), (100, 0.2), (200, 0.3))]
    log = GpuLog(instances={"prefill-0": [0]})
    data = TopologyData(
        launch=LaunchInfo(name="x", num_gpus=1, argv=[]), gpu=[GpuRecord(log, samples)]
    )
    (counter,) = counters_under(data, 50 * MS, 150 * MS)
    assert counter.name == "prefill-0 SMs"
    assert counter.steps == [(0.0, 50.0, 0.2), (50.0, 100.0, 0.3)]
    assert counters_under(data, 300 * MS, 400 * MS) == []
