"""The part of `pdrelay kv` that runs real servers, over stand-ins for them."""

from __future__ import annotations

import dataclasses
import statistics

import pytest
from fake_launcher import FakeLauncher
from test_kv_run import KV_CONFIG

from pdrelay.errors import LaunchError
from pdrelay.lab.kv.config import ServeConfig
from pdrelay.lab.kv.serve import measure_servers
from pdrelay.lab.kv.serve_figures import prefill_ms, serve_rows
from pdrelay.lab.progress import SilentReporter
from pdrelay.lab.report.joined import joined
from pdrelay.lab.rundir import read_run

SERVE = ServeConfig(lengths=(64, 128), requests=6, repeats=2, args=("--transport", "tcp"))


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    out = tmp_path_factory.mktemp("kv")
    launcher = FakeLauncher()
    config = dataclasses.replace(KV_CONFIG, out=out, serve=SERVE)
    assert measure_servers(config, launcher, SilentReporter()) == ""
    return read_run(out / "serve")


def test_only_idle_probes_run_on_both(served):
    assert served.info.notes == []
    paths = [case.path for case in served.cases]
    assert paths == [
        f"ttft/{name}/idle/rep{rep}" for name in ("pd-1-1", "replicas-1") for rep in (0, 1)
    ]
    assert served.topologies["pd-1-1"].launch.argv[-2:] == ["--transport", "tcp"]


def test_rows_hold_both_sides_of_each_length(served):
    rows = serve_rows(served)
    assert [row.tokens for row in rows] == [64, 128]
    for row in rows:
        assert row.ttft.n == row.ttft_alone.n == 12
        assert row.ttft.repeats == 2
        assert row.prefill_ratio.value == pytest.approx(row.prefill.value / row.prefill_alone.value)
        assert row.hand_over.known and row.transfer_busy.known
        assert row.num_bytes > 0
    times = [
        prefill_ms(request)
        for case in served.select("ttft", "pd-1-1")
        for request in joined(served, case)
        if request.client.tag == "probe-128"
    ]
    assert rows[1].prefill.value == pytest.approx(statistics.median(times), rel=0.2)


def test_servers_that_do_not_start_are_a_note(tmp_path):
    class Refusing(FakeLauncher):
        async def start(self, *args, **kwargs):
            raise LaunchError("no room")

    config = dataclasses.replace(KV_CONFIG, out=tmp_path, serve=SERVE)
    assert "no room" in measure_servers(config, Refusing(), SilentReporter())
