"""How the KV pool of a GPU is sized, and what is said when it is too small."""

from __future__ import annotations

import pytest

from pdrelay.engine.device_memory import DeviceMemory, check_capacity, num_kv_blocks
from pdrelay.engine.startup_clock import StartupClock
from pdrelay.engine.step_executor import StepLimits
from pdrelay.errors import LaunchError

GIB = 1 << 30
BLOCK = 8 << 20  # 64 tokens of Llama-3.1-8B
H200 = DeviceMemory(total=140 * GIB, free=122 * GIB, peak=18 * GIB, resident=16 * GIB)


def test_the_share_less_what_a_step_takes():
    blocks = num_kv_blocks(H200, 0.9, BLOCK, 0)
    assert 105 * GIB < blocks * BLOCK < (0.9 * 140 - 18) * GIB
    assert num_kv_blocks(H200, 0.45, BLOCK, 0) * BLOCK < 45 * GIB
    fewer = num_kv_blocks(H200, 0.9, BLOCK, GIB)
    assert blocks - fewer == GIB // BLOCK


def test_another_process_on_the_device_makes_the_pool_smaller():
    busy = DeviceMemory(total=140 * GIB, free=30 * GIB, peak=18 * GIB, resident=16 * GIB)
    blocks = num_kv_blocks(busy, 0.9, BLOCK, 0)
    assert 25 * GIB < blocks * BLOCK <= 28 * GIB


def test_too_little_memory_is_said_with_the_way_out():
    limits = StepLimits(64, 8192, 131_072, 64)
    check_capacity(2048, limits, 0.9)
    with pytest.raises(LaunchError, match=r"90%.*--max-model-len 64000.*--gpu-memory-utilization"):
        check_capacity(1000, limits, 0.9)
    with pytest.raises(LaunchError, match="--gpu-memory-utilization"):
        check_capacity(-5, limits, 0.9)


def test_phases_add_up():
    times = iter([0, 10**9, 2 * 10**9, 5 * 10**9, 7 * 10**9, 8 * 10**9])
    clock = StartupClock(lambda: next(times))
    for name in ("weights", "graphs", "weights"):
        with clock.phase(name):
            pass
    assert str(clock) == "weights 2.0 s, graphs 3.0 s"
