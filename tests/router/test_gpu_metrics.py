"""GPU gauges beside the other metrics."""

from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from pdrelay.front_door import RouterFrontDoor
from pdrelay.launch.config import EngineConfig, ServeConfig
from pdrelay.launch.host import Host
from pdrelay.launch.plan import Plan
from pdrelay.launch.resolve import resolve
from pdrelay.launch.topology import PrefillDecode, instances
from pdrelay.model.config import load_model_config
from pdrelay.router.app import METRICS
from pdrelay.router.gpu_metrics import GpuMetrics
from pdrelay.telemetry.assignment import Assignment
from pdrelay.telemetry.fake import FakeSource
from pdrelay.telemetry.sample import GpuSample
from pdrelay.telemetry.source import NoGpu


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


def plan_on(device):
    config = ServeConfig(EngineConfig("tiny", device=device), topology=PrefillDecode(1, 1))
    host = Host(
        num_cores=8,
        memory_bytes=64 << 30,
        available_bytes=64 << 30,
        num_gpus=2,
        max_open_files=4096,
        compiler=None,
    )
    model = load_model_config("tiny")
    return Plan(config, model, resolve(config, model, host), instances(config.topology))


async def test_the_front_door_watches_the_gpus_of_its_ranks():
    source = FakeSource()
    front = RouterFrontDoor(plan_on("cuda"), dict, lambda: source)
    try:
        assert source.wait_for_reads(2, 10.0)
        shown = front.runner.app[METRICS].render().decode()
    finally:
        await front.close()
    assert 'pdrelay:gpu_sm_utilization{gpu="1",instance="decode-0",model_name="tiny"} 0.5' in shown
    assert source.closed


@pytest.mark.parametrize(
    ("device", "found"), [("cuda", NoGpu("none")), ("cpu", None)], ids=["no NVML", "on CPU"]
)
async def test_without_gpus_there_are_no_gauges(device, found):
    def open_gpus():
        assert found is not None, "the GPUs are not looked for"
        return found

    front = RouterFrontDoor(plan_on(device), dict, open_gpus)
    shown = front.runner.app[METRICS].render().decode()
    await front.close()
    assert "pdrelay:gpu" not in shown and "vllm:num_requests_running" in shown
