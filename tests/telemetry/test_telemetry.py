"""Sampling GPUs, with a fake driver and a fake source."""

from __future__ import annotations

import sys
import threading

import pytest
from fake_nvml import FakeNvml

from pdrelay.core.clock import FakeClock
from pdrelay.errors import ConfigError
from pdrelay.telemetry.assignment import BY_INDEX, BY_LAUNCH, BY_PLAN, NO_GPU, Worker, assign
from pdrelay.telemetry.fake import FakeSource
from pdrelay.telemetry.log import read_gpu_record, write_missing
from pdrelay.telemetry.nvml import NvmlSource, open_nvml, visible
from pdrelay.telemetry.sample import GpuLog
from pdrelay.telemetry.sampler import FileSampler, Sampler
from pdrelay.telemetry.source import NoGpu, open_source

DEADLINE_S = 10.0


# ---- NVML


def test_counters_are_differences_in_the_units_that_samples_have():
    nvml = FakeNvml()
    source = NvmlSource(nvml, {}, clock=FakeClock(7))
    nvml.totals[1].update({2: 80.0, 3: 25.0, 5: 60.0, 10: 50.0, 60: 100.0, 61: 6000.0})
    first, second = source.read()
    assert (first.gpu, first.sm, first.dram_bytes_per_s) == (0, 0.0, 0.0)
    assert (second.gpu, second.t_ns) == (1, 7)
    assert (second.sm, second.occupancy, second.tensor) == (0.8, 0.25, 0.6)
    assert (second.nvlink_rx_mib_s, second.nvlink_tx_mib_s) == (100.0, 6000.0)
    peak = 5120 / 8 * 2619e6 * 2  # an H100's 3.35 TB/s
    assert source.gpus[1].peak_bytes_per_s == pytest.approx(peak) == pytest.approx(3.352e12, 1e-3)
    assert second.dram_bytes_per_s == pytest.approx(0.5 * peak)
    assert (second.memory_used_bytes, second.power_w, second.utilization) == (2 << 30, 512.0, 0.4)
    nvml.totals[1][2] += 10.0
    assert source.read()[1].sm == pytest.approx(0.1), "since the last read, not since the first"


def test_plain_readings_stand_in_where_there_are_no_counters():
    nvml = FakeNvml(gpm=False)
    (sample, _) = NvmlSource(nvml, {}).read()
    assert sample.sm is None and sample.dram is None and sample.utilization == 0.4
    assert nvml.snapshots == []


def test_a_counter_or_a_gpu_that_is_missing_is_left_out():
    nvml = FakeNvml()
    source = NvmlSource(nvml, {})
    nvml.failing = {60, 61}
    nvml.totals[0][2] = 30.0
    sample = source.read()[0]
    assert sample.sm == 0.3 and sample.nvlink_tx_mib_s is None
    nvml.lost = {0}
    assert [sample.gpu for sample in source.read()] == [1]


def test_everything_is_given_back():
    nvml = FakeNvml(as_bytes=True)
    source = open_nvml(nvml, {})
    assert source.gpus[0].name == "NVIDIA fake"
    source.read()
    source.close()
    assert len(nvml.snapshots) == 4 and all(snapshot.freed for snapshot in nvml.snapshots)
    assert (nvml.inits, nvml.shutdowns) == (1, 1)


@pytest.mark.parametrize(
    ("nvml", "environ", "reason"),
    [
        (FakeNvml(driver=False), {}, "no NVIDIA driver answers (Driver Not Loaded)"),
        (FakeNvml(num_gpus=0), {}, "lists no GPU"),
        (FakeNvml(), {"CUDA_VISIBLE_DEVICES": ""}, "that this process may use"),
    ],
)
def test_without_a_gpu_the_reason_is_given(nvml, environ, reason):
    found = open_nvml(nvml, environ)
    assert isinstance(found, NoGpu) and reason in found.reason
    assert nvml.inits == nvml.shutdowns


def test_without_pynvml_the_reason_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    found = open_source()
    assert isinstance(found, NoGpu) and "pdrelay[gpu]" in found.reason


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        (None, [0, 1, 2]),
        ("2,0", [2, 0]),
        ("", []),
        ("1,9,0", [1]),
        ("GPU-222", [2]),
        ("GPU-", []),
        ("0,0", [0]),
        ("-1", []),
    ],
)
def test_visible_devices_are_read_as_cuda_does(setting, expected):
    assert visible(["GPU-000", "GPU-111", "GPU-222"], setting) == expected


# ---- which GPU is whose


GPUS = FakeSource(3).gpus


@pytest.mark.parametrize(
    ("resolved", "ranks", "expected", "how"),
    [
        ([{"device": "cuda:2"}, {"device": "cuda:0"}], 1, {"p": [2], "d": [0]}, BY_PLAN),
        ([{"gpu_uuids": "GPU-1"}, {"gpu_uuids": "0"}], 1, {"p": [1], "d": [0]}, BY_PLAN),
        ([{"device": "cuda:0"}, {"device": "cuda:0"}], 1, {"p": [0], "d": [1]}, BY_INDEX),
        ([{"device": "cuda"}, {}], 1, {"p": [0], "d": [1]}, BY_INDEX),
        ([{"device": "cuda:0"}, {"device": "cuda:2"}], 2, {"p": [0, 1], "d": [2, 0]}, BY_INDEX),
        ([{"device": "cpu"}, {"device": "cpu"}], 1, {}, NO_GPU),
        ([{"gpus": "2"}, {"gpus": "0"}], 3, {"p": [2], "d": [0]}, BY_LAUNCH),
        ([{"gpus": "0,1"}, {"gpus": "2"}], 1, {"p": [0, 1], "d": [2]}, BY_LAUNCH),
        ([{"gpus": "1"}, {"gpus": "1"}], 1, {"p": [1], "d": [1]}, BY_LAUNCH),
        ([{"gpus": "GPU-FAKE"}, {"gpus": "0"}], 1, {"p": [0], "d": [1]}, BY_INDEX),
        ([{"gpus": "7"}, {"gpus": "0"}], 1, {"p": [0], "d": [1]}, BY_INDEX),
        ([{"gpus": "2"}, {}], 1, {"p": [0], "d": [1]}, BY_INDEX),
    ],
)
def test_assignment(resolved, ranks, expected, how):
    workers = [Worker(name, ranks, r) for name, r in zip("pd", resolved, strict=True)]
    found = assign(workers, GPUS)
    assert (found.instances, found.how) == (expected, how)
    assert assign(workers, []).instances == {}


# ---- sampling


def test_a_file_of_samples_is_read_back(tmp_path):
    source = FakeSource()
    path = tmp_path / "x" / "gpu.jsonl"
    log = GpuLog(gpus=source.gpus, instances={"prefill-0": [0]}, assignment="here")
    sampler = FileSampler(source, path, log, period_s=0.001)
    assert source.wait_for_reads(5, DEADLINE_S)
    sampler.stop()
    sampler.stop()
    assert source.closed
    reads = source.reads
    record = read_gpu_record(path)
    assert record.log.instances == {"prefill-0": [0]} and record.log.period_s == 0.001
    assert len(record.samples) == 2 * reads
    times = [sample.t_ns for sample in record.samples]
    assert times == sorted(times)
    assert len(record.of(1, times[2], times[-1])) == reads - 1
    assert record.info(1).name == "fake" and record.info(9) is None


def test_a_torn_or_damaged_file(tmp_path):
    path = tmp_path / "gpu.jsonl"
    write_missing(path, "none here")
    assert read_gpu_record(path).log.missing == "none here"
    with path.open("ab") as file:
        file.write(b'{"t_ns": 1, "gpu": 0}\n{"t_ns": 2, ')
    assert [sample.t_ns for sample in read_gpu_record(path).samples] == [1]
    with path.open("ab") as file:
        file.write(b"\n")
    with pytest.raises(ConfigError, match=r"gpu\.jsonl:3 is damaged"):
        read_gpu_record(path)


def test_a_read_that_hangs_does_not_hold_up_the_end(monkeypatch):
    monkeypatch.setattr("pdrelay.telemetry.sampler._STOP_S", 0.05)
    inside, go_on = threading.Event(), threading.Event()

    class Stuck(FakeSource):
        def read(self):
            inside.set()
            assert go_on.wait(DEADLINE_S)
            return []

    source = Stuck()
    sampler = Sampler(source, lambda samples: None, 0.001)
    sampler.start()
    assert inside.wait(DEADLINE_S)
    assert sampler.stop() is False and not source.closed
    go_on.set()
    monkeypatch.setattr("pdrelay.telemetry.sampler._STOP_S", DEADLINE_S)
    assert sampler.stop() is True and source.closed
