from __future__ import annotations

import copy

import pytest
from synthetic import write_run

from pdrelay.lab.report.build import summarize
from pdrelay.lab.rundir import read_run
from pdrelay.lab.stats import Estimate
from pdrelay.lab.verdict import decide, judge_goodput, judge_interference, verdict

LABELS = {"pd-1-1": "P/D 1:1", "replicas-2": "2 replicas", "tp-2": "TP=2"}


@pytest.fixture(scope="module")
def summary(run_dir):
    return summarize(read_run(run_dir))


def again(summary, **changes):
    parts = {
        name: changes.get(name, getattr(summary, name))
        for name in ("topologies", "ttft", "ratios", "traffic", "interference", "flags")
    }
    return verdict(**parts)


def with_goodput(summary, **values):
    """The traffic with the same goodput interval at every rate of a topology."""
    rows = summary.traffic
    for row in rows:
        if row.topology in values:
            low, value, high = values[row.topology]
            row.goodput = Estimate(value=value, lo=low, hi=high, n=10)
    return rows


@pytest.mark.parametrize(
    ("goodput", "protection", "decision"),
    [
        ("win", "protects", "disaggregate"),
        ("win", "does not", "disaggregate"),
        ("win", "unknown", "disaggregate"),
        ("tie", "protects", "disaggregate"),
        ("win", "reduces", "disaggregate"),
        ("tie", "reduces", "depends"),
        ("loss", "reduces", "depends"),
        ("unknown", "reduces", "depends"),
        ("tie", "does not", "do-not-disaggregate"),
        ("tie", "unknown", "do-not-disaggregate"),
        ("loss", "protects", "depends"),
        ("loss", "does not", "do-not-disaggregate"),
        ("loss", "unknown", "do-not-disaggregate"),
        ("unknown", "protects", "depends"),
        ("unknown", "does not", "no-evidence"),
        ("unknown", "unknown", "no-evidence"),
    ],
)
def test_decision_table(goodput, protection, decision):
    assert decide(goodput, protection) == decision


def test_goodput_needs_disjoint_intervals_and_a_material_gap(run_dir):
    summary = summarize(read_run(run_dir))
    cases = {
        (4.0, 5.0, 6.0): "win",
        (2.9, 3.5, 4.0): "tie",  # overlap
        (1.0, 1.5, 1.9): "loss",
        (3.005, 3.01, 3.02): "tie",  # disjoint, but within 5 %
    }
    for interval, outcome in cases.items():
        rows = with_goodput(
            summary,
            **{"pd-1-1": interval, "replicas-2": (2.8, 2.95, 3.0), "tp-2": (0.1, 0.2, 0.3)},
        )
        judged, said = judge_goodput("pd-1-1", ["replicas-2", "tp-2"], rows, LABELS, unit="core")
        assert judged == outcome
        assert "2 replicas" in said[0].text and "requests/s a core (at" in said[0].text


def test_protection_needs_every_rival_disturbed(summary):
    rivals = ["replicas-2", "tp-2"]
    judged, said = judge_interference("pd-1-1", rivals, summary.interference, LABELS)
    assert judged == "protects"
    assert "at least" in said[0].text  # TP=2 has too few gaps for a p99
    calm = [row for row in summary.interference if row.topology == "pd-1-1"]
    twin = [
        type(calm[0])(**{**{f: getattr(calm[0], f) for f in calm[0].__struct_fields__},
                         "topology": "tp-2"})
    ]  # fmt: skip
    judged, _ = judge_interference("pd-1-1", ["tp-2"], calm + twin, LABELS)
    assert judged == "does not"


def test_says_do_not_disaggregate_when_the_numbers_do(run_dir):
    summary = summarize(read_run(run_dir))
    rows = with_goodput(summary, **{"pd-1-1": (1, 1.1, 1.2), "tp-2": (5, 5.1, 5.2)})
    result = again(summary, traffic=rows, interference=[])
    assert result.decision == "do-not-disaggregate"
    assert result.headline.startswith("Do not disaggregate here.")


def test_every_sentence_cites_figures(summary):
    rules = [sentence.rule for sentence in summary.verdict.sentences]
    assert rules[:2] == ["goodput", "interference"]
    assert {"idle_ttft", "hand_over", "saturation"} <= set(rules)
    for sentence in summary.verdict.sentences:
        assert any(character.isdigit() for character in sentence.text)


def test_one_gpu_is_no_rival_of_two(tmp_path):
    write_run(tmp_path, topologies="replicas:1,pd:1:1")
    result = summarize(read_run(tmp_path)).verdict
    assert result.decision == "no-evidence"
    assert "on 2 GPUs" in result.sentences[0].text


def test_no_disaggregation_no_verdict(tmp_path):
    write_run(tmp_path, topologies="replicas:2")
    assert summarize(read_run(tmp_path)).verdict.decision == "no-evidence"


def test_void_rates_are_compared_for_nobody(run_dir):
    """A rival must not lose because its cases at higher rates are void."""
    run = read_run(run_dir)
    late = [c for c in run.select("traffic", "tp-2") if c.info.case != "poisson-0"]
    for case in late:
        for record in case.records:
            record.sent_ns = record.intended_ns + 50_000_000  # the client was late
    summary = summarize(run)
    (said,) = [s for s in summary.verdict.sentences if s.rule == "goodput"]
    assert said.text.count("at 6.00 req/s") == 2  # the one rate that nobody's case voids
    assert "validity" in [sentence.rule for sentence in summary.verdict.sentences]
    assert summary.verdict.decision == "depends"
    assert "goodput cannot be judged" in summary.verdict.headline.lower()


def test_less_than_calm_is_not_called_protection(summary):
    rows = {row.topology: copy.copy(row) for row in summary.interference}
    rows["pd-1-1"].factor = 3.0
    rivals = ["replicas-2", "tp-2"]
    judge = [rows[name] for name in ("pd-1-1", *rivals)]
    assert judge_interference("pd-1-1", rivals, judge, LABELS)[0] == "reduces"
    rows["pd-1-1"].factor_percentile = 90.0  # a p90 cannot show that p99 is calm
    assert judge_interference("pd-1-1", rivals, judge, LABELS)[0] == "unknown"
    rows["pd-1-1"].factor = 8.0
    assert judge_interference("pd-1-1", rivals, judge, LABELS)[0] == "does not"


def test_a_busy_host_is_said(run_dir):
    run = read_run(run_dir)
    run.cases[0].info.foreign_cores = 0.5
    summary = summarize(run)
    assert [flag.code for flag in summary.flags] == ["busy_host"]
    (said,) = [s for s in summary.verdict.sentences if s.rule == "busy_host"]
    assert "1 cases" in said.text
