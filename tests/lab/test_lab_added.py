"""Going on with a run directory."""

from __future__ import annotations

import dataclasses

import pytest
from fake_launcher import FakeLauncher
from test_lab_run import config

from pdrelay.errors import ConfigError
from pdrelay.lab.progress import SilentReporter
from pdrelay.lab.report.build import build_report
from pdrelay.lab.run import run_lab
from pdrelay.lab.rundir import read_run

CHOSEN = {"experiments": ("shapes",), "cases": ("streams-1",)}


async def run(chosen):
    launcher = FakeLauncher()
    info = await run_lab(chosen, launcher, SilentReporter())
    return info, [server.topology.name for server in launcher.servers]


async def test_what_a_run_has_is_not_measured_again(tmp_path):
    await run(config(tmp_path, "replicas:2", **CHOSEN))
    more = config(tmp_path, "replicas:2,pd:1:1", add=True, argv=("pdrelay", "lab"), **CHOSEN)
    info, started = await run(more)
    assert started == ["pd-1-1"]
    assert info.topologies == ["replicas-2", "pd-1-1"]
    assert info.notes == ["added to by: pdrelay lab"]
    assert set(info.engines) == {"replicas-2", "pd-1-1"}
    assert [row.topology for row in build_report(more.out).summary.streams] == [
        "replicas-2", "pd-1-1"
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="nothing is left to do"):
        await run(more)


async def test_an_interrupted_topology_is_measured_anew(tmp_path):
    chosen = config(tmp_path, "replicas:2", **CHOSEN)
    await run(chosen)
    (chosen.out / "topologies" / "replicas-2" / "workers.json").unlink()
    stale = chosen.out / "experiments" / "shapes" / "replicas-2" / "old"
    stale.mkdir()
    _, started = await run(dataclasses.replace(chosen, add=True))
    assert started == ["replicas-2"]
    assert not stale.exists()
    assert len(read_run(chosen.out).cases) == 1


async def test_other_settings_and_no_run_at_all_are_refused(tmp_path):
    chosen = config(tmp_path, "replicas:2", **CHOSEN)
    with pytest.raises(ConfigError, match=r"run\.json"):
        await run(dataclasses.replace(chosen, add=True))
    await run(chosen)
    scale = dataclasses.replace(chosen.scale, num_streams=9)
    other = dataclasses.replace(chosen, add=True, seed=7, scale=scale)
    with pytest.raises(ConfigError, match="another scale, seed"):
        await run(other)
    budget = dataclasses.replace(chosen.scale, budget_s=600.0)
    longer = config(tmp_path, "pd:1:1", add=True, scale=budget, **CHOSEN)
    assert (await run(longer))[1] == ["pd-1-1"]
