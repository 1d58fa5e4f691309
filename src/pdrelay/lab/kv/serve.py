"""The hand-over inside real servers: a small lab run, P/D beside one replica."""

from __future__ import annotations

from dataclasses import replace

from pdrelay.bench.slo import Slo
from pdrelay.errors import LaunchError
from pdrelay.lab.config import LabConfig
from pdrelay.lab.kv.config import KvConfig, ServeConfig
from pdrelay.lab.kv.rundir import SERVE_DIR
from pdrelay.lab.progress import Reporter
from pdrelay.lab.run import run_lab_blocking
from pdrelay.lab.scale import QUICK, Scale
from pdrelay.lab.server import Launcher
from pdrelay.lab.topology import parse_topologies

TOPOLOGIES = "pd:1:1,replicas:1"
_NO_SLO = Slo(None, None)  # nothing is offered at a rate


def measure_servers(config: KvConfig, launcher: Launcher, reporter: Reporter) -> str:
    """Write DIR/serve; returns why nothing was measured, or nothing."""
    assert config.serve is not None
    try:
        run_lab_blocking(lab_config(config, config.serve), launcher, reporter)
    except LaunchError as error:
        return f"servers: {error}"
    return ""


def lab_config(config: KvConfig, serve: ServeConfig) -> LabConfig:
    return LabConfig(
        model=config.model,
        topologies=tuple(parse_topologies(TOPOLOGIES)),
        out=config.out / SERVE_DIR,
        scale=_scale(serve),
        quick=True,
        slo=_NO_SLO,
        experiments=("ttft",),
        repeats=serve.repeats,
        seed=config.seed,
        serve_args=serve.args,
        startup_timeout_s=serve.startup_timeout_s,
        argv=config.argv,
    )


def _scale(serve: ServeConfig) -> Scale:
    """Idle probes only."""
    probes = tuple((length, serve.requests) for length in serve.lengths)
    return replace(QUICK, probes=probes, busy_probes=(), budget_s=None)
