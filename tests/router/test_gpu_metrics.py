"""GPU gauges beside the other metrics."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, generate_latest

from pdrelay.router.gpu_metrics import GpuMetrics
from pdrelay.telemetry.assignment import Assignment
from pdrelay.telemetry.fake import FakeSource
from pdrelay.telemetry.sample import GpuSample


def lines_of(source, instances):
    registry = CollectorRegistry()
    metrics = GpuMetrics(source, "m", lambda: Assignment(instances, ""), period_s=0.001)
    registry.register(metrics)
    assert source.wait_for_reads(2, 10.0)  # the first reading was taken before the second began
    metrics.close()
    assert source.closed
    return [line for line in generate_latest(registry).decode().splitlines() if line[0] != "#"]


def test_each_instance_has_its_gpus_latest_values():
    lines = lines_of(FakeSource(), {"prefill-0": [0], "decode-0": [1]})
    assert 'pdrelay:gpu_sm_utilization{gpu="0",instance="prefill-0",model_name="m"} 0.9' in lines
    wanted = 'pdrelay:gpu_dram_bytes_per_second{gpu="1",instance="decode-0",model_name="m"} 3e+12'
    assert wanted in lines


def test_what_a_gpu_does_not_tell_is_no_sample():
    source = FakeSource(1, lambda gpu, reads: GpuSample(t_ns=0, gpu=gpu, utilization=0.4))
    lines = lines_of(source, {"tp-0": [0]})
    assert lines == ['pdrelay:gpu_utilization{gpu="0",instance="tp-0",model_name="m"} 0.4']


def test_a_gpu_without_an_instance_is_not_shown():
    assert lines_of(FakeSource(), {}) == []
