"""What to doubt in this run."""

from __future__ import annotations

from collections.abc import Iterable

from pdrelay.lab.blocks import note
from pdrelay.lab.html import Markup, el, join, table
from pdrelay.lab.report.figures import Summary
from pdrelay.lab.report.sections.common import EXPERIMENT_TITLES


def validity_section(summary: Summary) -> Markup:
    errors = [flag for flag in summary.flags if flag.severity == "error"]
    warnings = [flag for flag in summary.flags if flag.severity == "warning"]
    badge = "error" if errors else "warning" if warnings else "ok"
    words = f"{summary.num_cases} cases: {len(errors)} errors, {len(warnings)} warnings"
    parts: list[Markup] = [el("p", el("span", words, class_=f"flag {badge}"))]
    if summary.flags:
        rows: list[Iterable[object]] = [
            [
                el("span", flag.severity, class_=f"flag {flag.severity}"),
                summary.label(flag.topology),
                EXPERIMENT_TITLES.get(flag.experiment, flag.experiment),
                f"{flag.case} · repeat {flag.rep}" if flag.case else "",
                flag.message,
            ]
            for flag in sorted(summary.flags, key=lambda flag: flag.severity != "error")
        ]
        head = ["", "topology", "experiment", "case", "what"]
        parts.append(table(head, rows, text_columns=5))
    parts += [note(text) for text in summary.run.notes]
    return join(parts)
