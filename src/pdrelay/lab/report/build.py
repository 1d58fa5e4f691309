"""From a run directory to its report, summary and trace. Reads the raw files and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec

from pdrelay.errors import ConfigError
from pdrelay.lab.chrome_trace import chrome_trace
from pdrelay.lab.report.figures import Summary
from pdrelay.lab.report.gpu import gpu_figures
from pdrelay.lab.report.interference import interference_rows
from pdrelay.lab.report.page import render
from pdrelay.lab.report.phases import phase_rows
from pdrelay.lab.report.queues import queue_rows
from pdrelay.lab.report.shapes import shape_rows
from pdrelay.lab.report.streams import streams_rows
from pdrelay.lab.report.tables import summary_text
from pdrelay.lab.report.topologies import topology_figures
from pdrelay.lab.report.traffic import traffic_rows
from pdrelay.lab.report.transfers import transfer_rows
from pdrelay.lab.report.ttft import ttft_ratios, ttft_rows
from pdrelay.lab.report.validity import case_flags
from pdrelay.lab.rundir import Run, read_run, write_json
from pdrelay.lab.timeline import timelines
from pdrelay.lab.verdict import verdict


@dataclass(frozen=True)
class BuiltReport:
    summary: Summary
    report: Path
    summary_file: Path
    trace: Path


def summarize(run: Run) -> Summary:
    """Every figure of the report."""
    topologies = topology_figures(run)
    ttft, ratios = ttft_rows(run), ttft_ratios(run)
    traffic, interference = traffic_rows(run), interference_rows(run)
    flags = case_flags(run)
    return Summary(
        run=run.info,
        environment=run.environment,
        topologies=topologies,
        verdict=verdict(topologies, ttft, ratios, traffic, interference, flags),
        ttft=ttft,
        ratios=ratios,
        traffic=traffic,
        queues=queue_rows(run),
        interference=interference,
        shapes=shape_rows(run),
        streams=streams_rows(run),
        phases=phase_rows(run),
        transfers=transfer_rows(run),
        gpu=gpu_figures(run),
        timelines=timelines(run),
        flags=flags,
        num_cases=len(run.cases),
    )


def build_report(root: Path) -> BuiltReport:
    """Write report.html, summary.json, summary.txt and trace.json into a run directory.

    Raises ConfigError when the directory is no run, holds a damaged file, or cannot be written.
    """
    run = read_run(root)
    summary = summarize(run)
    built = BuiltReport(summary, root / "report.html", root / "summary.json", root / "trace.json")
    with writing():
        built.report.write_text(render(summary), encoding="utf-8")
        write_json(built.summary_file, summary)
        (root / "summary.txt").write_text(summary_text(summary), encoding="utf-8")
        built.trace.write_bytes(msgspec.json.encode(chrome_trace(run)))
    return built


@contextmanager
def writing() -> Iterator[None]:
    """Files of a report are written within. Raises ConfigError when one cannot be."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"{error.filename} cannot be written: {error.strerror}; free it, or copy the run"
        ) from error
