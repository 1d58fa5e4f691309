"""The fixed load beside its prediction, on a run whose prefills are FCFS by construction."""

from __future__ import annotations

import pytest
from synthetic import FIXED_LEN, FIXED_RATE, NUM_FIXED, prefill_ms

from pdrelay.lab.queueing import MDc
from pdrelay.lab.report.queues import models_of, queue_rows
from pdrelay.lab.rundir import read_run


@pytest.fixture(scope="module")
def rows(built):
    return {(row.topology, row.model): row for row in built.summary.queues}


def test_every_topology_has_its_queue(rows):
    assert list(rows) == [
        ("replicas-2", "M/D/2 (least loaded, lower bound)"),
        ("replicas-2", "2 × M/D/1 (random split)"),
        ("tp-2", "M/D/1"),
        ("pd-1-1", "M/D/1"),
        ("replicas-1", "M/D/1"),
    ]
    assert [model.servers for model in models_of("vllm.nixl.pd-3-1")] == [3]
    assert [(model.servers, model.share) for model in models_of("replicas-4")] == [
        (4, 1),
        (1, 0.25),
    ]


def test_service_is_the_idle_prefill_and_sets_the_utilisation(rows):
    row = rows["pd-1-1", "M/D/1"]
    assert (row.input_len, row.rate, row.service_source) == (FIXED_LEN, FIXED_RATE, "prefill, idle")
    assert row.service_ms == pytest.approx(prefill_ms(FIXED_LEN), rel=0.05)
    assert row.utilisation == pytest.approx(FIXED_RATE * row.service_ms / 1e3)
    assert row.idle_ttft.value > row.service_ms
    assert row.ttft.n == NUM_FIXED


def test_steady_state_is_idle_ttft_plus_the_queues_wait(rows):
    row = rows["pd-1-1", "M/D/1"]
    queue = MDc(FIXED_RATE, row.service_ms / 1e3)
    assert row.mean_wait_ms == pytest.approx(1e3 * queue.mean_wait_s)
    for percentile, value in ((50, row.steady.p50), (90, row.steady.p90), (99, row.steady.p99)):
        expected = row.idle_ttft.value + 1e3 * queue.wait_s(percentile)
        assert value == pytest.approx(expected)
    split = rows["replicas-2", "2 × M/D/1 (random split)"]
    shared = rows["replicas-2", "M/D/2 (least loaded, lower bound)"]
    assert shared.utilisation == pytest.approx(split.utilisation)
    assert shared.steady.p99 < split.steady.p99
    assert split.replayed.p50 is None


def test_the_runs_own_arrivals_predict_what_was_measured(rows):
    for row in rows.values():
        if row.replayed.p50 is not None:
            assert row.replayed.p50 == pytest.approx(row.ttft.value, rel=0.15)
            assert row.replayed.p90 == pytest.approx(row.ttft_p90.value, rel=0.15)
    assert rows["pd-1-1", "M/D/1"].ttft_p99.value is None  # 200 samples carry no p99


def test_a_load_without_steady_state_says_so(run_dir):
    run = read_run(run_dir)
    for case in run.cases:
        if case.info.case == "fixed":
            case.info.rate = 1000.0
    for row in queue_rows(run):
        assert row.utilisation > 1 and row.mean_wait_ms is None and row.steady.p50 is None


def test_without_the_servers_record_the_idle_ttft_stands_in(run_dir):
    run = read_run(run_dir)
    for data in run.topologies.values():
        data.by_client_id.clear()
    for row in queue_rows(run):
        assert row.service_source == "TTFT, idle"
        assert row.service_ms == pytest.approx(row.idle_ttft.value)


def test_without_idle_requests_there_is_no_prediction(run_dir):
    run = read_run(run_dir)
    run.cases = [case for case in run.cases if case.info.case != "fixed-idle"]
    assert queue_rows(run) == []


def test_the_page_and_the_summary_show_it(built):
    page = built.report.read_text()
    assert "beside a queue in front of the prefill" in page
    assert "2 × M/D/1 (random split)" in page
    assert "Streams sent together" in page
    assert [row.num_streams for row in built.summary.streams] == [1, 4] * 4
    assert all(row.itl.value < 4 for row in built.summary.streams if row.num_streams == 1)
