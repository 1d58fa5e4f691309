"""The topologies as they were started: commands, memory, KV layout."""

from __future__ import annotations

from pdrelay.lab.report.figures import TopologyFigures
from pdrelay.lab.rundir import Run, TopologyData
from pdrelay.lab.topology import label_of


def topology_figures(run: Run) -> list[TopologyFigures]:
    return [_figures(name, data) for name, data in run.topologies.items()]


def _figures(name: str, data: TopologyData) -> TopologyFigures:
    peaks: dict[str, int] = {}
    token_bytes: dict[str, int] = {}
    for worker in data.workers:
        peaks[worker.instance] = max(peaks.get(worker.instance, 0), worker.peak_rss_bytes)
        if worker.layout is not None:
            known = token_bytes.get(worker.instance, 0)
            token_bytes[worker.instance] = known + worker.layout.bytes_per_token
    return TopologyFigures(
        name=name,
        label=label_of(name),
        engine=data.launch.engine,
        num_gpus=data.launch.num_gpus,
        argv=data.launch.argv,
        startup_s=data.launch.startup_s,
        bytes_per_token=next(iter(token_bytes.values()), None),
        peak_rss_bytes=peaks,
        resolved={worker.instance: worker.resolved for worker in data.workers},
    )
