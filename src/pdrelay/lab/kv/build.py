"""From the raw files of `pdrelay kv` to its page and summary. Nothing else is read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pdrelay.lab.kv.figures import KvSummary
from pdrelay.lab.kv.page import render
from pdrelay.lab.kv.rundir import SERVE_DIR, read_kv_run
from pdrelay.lab.kv.summarize import summarize_kv
from pdrelay.lab.report.build import build_report, writing
from pdrelay.lab.rundir import write_json


@dataclass(frozen=True)
class BuiltKvReport:
    summary: KvSummary
    report: Path
    summary_file: Path


def build_kv_report(root: Path) -> BuiltKvReport:
    """Write report.html and summary.json, also of the servers' run where there is one.

    Raises ConfigError when a file is damaged or cannot be written.
    """
    run = read_kv_run(root)
    summary = summarize_kv(run)
    built = BuiltKvReport(summary, root / "report.html", root / "summary.json")
    with writing():
        built.report.write_text(render(summary), encoding="utf-8")
        write_json(built.summary_file, summary)
    if run.serve is not None:
        build_report(root / SERVE_DIR)
    return built
