"""Experiment 4: the handout's three shapes."""

from __future__ import annotations

from pdrelay.lab.report.figures import ShapeRow
from pdrelay.lab.report.samples import by_repeat, e2e, group_by_case, itls_by_repeat, ttft
from pdrelay.lab.report.traffic import output_rate
from pdrelay.lab.rundir import STREAMS_CASE, Case, Run
from pdrelay.lab.stats import percentile_estimate, repeats_estimate


def shape_rows(run: Run) -> list[ShapeRow]:
    return [
        _row(name, cases)
        for name in run.topologies
        for case, cases in group_by_case(run.select("shapes", name)).items()
        if not case.startswith(STREAMS_CASE)
    ]


def _row(name: str, cases: list[Case]) -> ShapeRow:
    info = cases[0].info
    return ShapeRow(
        topology=name,
        case=info.case,
        input_len=info.input_len or 0,
        output_len=info.output_len or 0,
        rate=info.rate,
        ttft=percentile_estimate(by_repeat(cases, ttft)),
        itl=percentile_estimate(itls_by_repeat(cases)),
        e2e=percentile_estimate(by_repeat(cases, e2e)),
        output_rate=repeats_estimate([output_rate(case) for case in cases]),
    )
