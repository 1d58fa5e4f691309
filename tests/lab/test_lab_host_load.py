from __future__ import annotations

import subprocess
import sys
import time

import pytest

from pdrelay.lab.host_load import HostSample, foreign_cores, sample

SPIN = "import time\nwhile time.process_time() < 0.6: pass"


def test_foreign_is_what_is_not_ours():
    before = HostSample(at_s=10.0, everybody_s=100.0, ours_s=50.0)
    after = HostSample(at_s=14.0, everybody_s=106.0, ours_s=54.0)
    assert foreign_cores(before, after) == pytest.approx(0.5)
    assert foreign_cores(None, after) is None
    assert foreign_cores(before, before) is None


def test_everybody_includes_a_process_that_is_not_ours():
    before = sample([])
    subprocess.run([sys.executable, "-c", SPIN], check=True, timeout=60)
    after = sample([])
    assert after.everybody_s - before.everybody_s >= 0.5


def test_a_named_process_is_ours():
    with subprocess.Popen([sys.executable, "-c", SPIN + "\ninput()"], stdin=-1) as process:
        deadline = time.monotonic() + 20
        while sample([process.pid]).ours_s - sample([]).ours_s < 0.5:
            assert time.monotonic() < deadline
        process.stdin.close()
        process.wait()
    assert sample([process.pid]).ours_s == pytest.approx(sample([]).ours_s, abs=0.1)
