"""Findings and checks as a table for people, or as JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pdrelay.doctor.check import Check, Level
from pdrelay.doctor.diagnose import Finding

_STYLES = {
    Level.OK: "green",
    Level.NOTE: "cyan",
    Level.WARNING: "yellow",
    Level.FAILURE: "bold red",
}

Report = Sequence[tuple[str, Sequence[Finding]]]  # a log's path, what is in it


def print_checks(checks: Sequence[Check], console: Console) -> None:
    table = Table("check", "", "found", "fix", title="preflight", title_justify="left")
    for check in checks:
        level = Text(str(check.level), style=_STYLES[check.level])
        table.add_row(Text(check.what), level, Text(check.cause), Text(check.fix))
    console.print(table)


def print_findings(report: Report, console: Console) -> None:
    for path, findings in report:
        console.print(Text(path, style="bold"))
        if not findings:
            console.print(Text("  no known cause and no exception in this log"))
        for index, finding in enumerate(findings):
            word = "cause" if index == 0 else "also "
            console.print(Text(f"  {word}: {finding.cause}"), soft_wrap=True)
            console.print(Text(f"  fix  : {finding.fix}"), soft_wrap=True)
            where = f"  line {finding.line_number}: {finding.line}"
            console.print(Text(where, style="dim"), soft_wrap=True)


def checks_json(checks: Sequence[Check]) -> str:
    return _dump({"checks": [asdict(check) for check in checks]})


def findings_json(report: Report) -> str:
    logs = [
        {"path": path, "findings": [asdict(finding) for finding in findings]}
        for path, findings in report
    ]
    return _dump({"logs": logs})


def _dump(value: Any) -> str:
    return json.dumps(value, indent=2)
