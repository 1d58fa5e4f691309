"""The verdict in words, by explicit rules. Every sentence cites the figures it follows from.

Rivals of a P/D topology are the co-located ones on the same number of GPUs. Cases with a validity
error are left out.

    goodput       best good requests/s a GPU over the Poisson rates. Win or loss: the intervals do
                  not overlap and the figures differ by more than 5 %; otherwise a tie. Only rates
                  at which no topology's case is void are compared; unknown when that left out
                  rates and nobody misses the service level at those that remain.
    interference  P/D protects running streams when its busy p99 gap stays within 2x its quiet
                  median and less than 2 % of its streams' busy time is stalled, while every rival
                  is disturbed: busy gaps over 5x the quiet median (at the highest percentile that
                  the sample allows), or over 10 % of the streams' busy time stalled. It reduces
                  the disturbance when every rival is disturbed and it is not, but not calm either.

    goodput   interference   decision
    win       any            disaggregate
    tie       protects       disaggregate
    tie       reduces        depends
    tie       does not       do not disaggregate
    loss      protects, reduces   depends: smooth streams against goodput
    loss      does not       do not disaggregate
    unknown   protects, reduces   depends
    unknown   does not       no evidence
    unknown   unknown        no evidence
"""

from __future__ import annotations

from typing import Literal

from pdrelay.lab import fmt
from pdrelay.lab.report.figures import (
    CaseFlag,
    InterferenceRow,
    RatioRow,
    Sentence,
    TopologyFigures,
    TrafficRow,
    TtftRow,
    Verdict,
)
from pdrelay.lab.topology import engine_of, is_pd

MATERIAL = 1.05  # smaller differences are not called differences
PROTECTED = 2.0
DISTURBED = 5.0
CALM_SHARE = 0.02
DISTURBED_SHARE = 0.1
ATTAINMENT_TARGET = 0.9

Goodput = Literal["win", "loss", "tie", "unknown"]
Protection = Literal["protects", "reduces", "does not", "unknown"]
Decision = Literal["disaggregate", "do-not-disaggregate", "depends", "no-evidence"]

_HEADLINES: dict[Decision, str] = {
    "disaggregate": "Disaggregate here.",
    "do-not-disaggregate": "Do not disaggregate here.",
    "depends": "It depends on what you need.",
    "no-evidence": "No verdict: the run does not hold the evidence.",
}


def verdict(
    topologies: list[TopologyFigures],
    ttft: list[TtftRow],
    ratios: list[RatioRow],
    traffic: list[TrafficRow],
    interference: list[InterferenceRow],
    flags: list[CaseFlag],
) -> Verdict:
    """The verdict on the first P/D topology against its rivals, on as many GPUs and one engine."""
    pd = next((t for t in topologies if is_pd(t.name)), None)
    if pd is None:
        return _no_evidence("No P/D topology was measured.")
    engine = engine_of(pd.name)
    rivals = [
        t
        for t in topologies
        if not is_pd(t.name) and t.num_gpus == pd.num_gpus and engine_of(t.name) == engine
    ]
    if not rivals:
        return _no_evidence(
            f"No co-located topology on {pd.num_gpus} {pd.unit}s was measured beside {pd.label}, "
            "so there is nothing fair to compare it with."
        )
    labels = {t.name: t.label for t in topologies}
    names = [t.name for t in rivals]
    void = {(flag.experiment, flag.topology, flag.case) for flag in flags if is_void(flag)}
    voided = {case for kind, name, case in void if kind == "traffic" and name in {pd.name, *names}}
    compared = [row for row in traffic if row.case not in voided]
    interference = [
        row for row in interference if ("interference", row.topology, "interference") not in void
    ]
    ratios = [
        row
        for row in ratios
        if not {("ttft", name, row.case) for name in (row.topology, row.versus)} & void
    ]
    goodput, goodput_said = judge_goodput(pd.name, names, compared, labels, unit=pd.unit)
    if voided and not any(
        row.attainment.value is not None and row.attainment.value < ATTAINMENT_TARGET
        for row in compared
        if row.topology in {pd.name, *names}
    ):
        goodput = "unknown"
    protection, protection_said = judge_interference(pd.name, names, interference, labels)
    decision = decide(goodput, protection)
    said = [
        *goodput_said,
        *protection_said,
        *say_ttft(pd.name, names, ratios, labels),
        *say_hand_over(pd.name, ttft, labels),
        *say_saturation(pd.name, names, compared, labels),
        *say_flags(flags),
    ]
    return Verdict(
        decision=decision,
        headline=f"{_HEADLINES[decision]} {_because(goodput, protection, pd)}",
        sentences=said,
    )


def decide(goodput: Goodput, protection: Protection) -> Decision:
    """The table in the module's docstring."""
    if goodput == "win":
        return "disaggregate"
    if goodput == "unknown" and protection in ("does not", "unknown"):
        return "no-evidence"
    if protection == "protects":
        return "disaggregate" if goodput == "tie" else "depends"
    if protection == "reduces":
        return "depends"
    return "do-not-disaggregate"


def _because(goodput: Goodput, protection: Protection, pd: TopologyFigures) -> str:
    label, unit = pd.label, pd.unit
    by_goodput = {
        "win": f"{label} serves more good requests per {unit} than every rival",
        "loss": f"a co-located rival serves more good requests per {unit} than {label}",
        "tie": f"{label} and its best rival serve as many good requests per {unit}, within error",
        "unknown": "goodput cannot be judged",
    }[goodput]
    by_protection = {
        "protects": "its streams keep their pace while long prompts arrive, the rivals' do not",
        "reduces": "long prompts disturb its streams less than the rivals'",
        "does not": "its streams are not clearly steadier than the rivals' under long prompts",
        "unknown": "interference cannot be judged",
    }[protection]
    helps = protection in ("protects", "reduces")
    link = (
        "but"
        if (goodput == "loss" and helps) or (goodput, protection) == ("win", "does not")
        else "and"
    )
    text = f"{by_goodput}, {link} {by_protection}."
    return text[0].upper() + text[1:]


def _no_evidence(text: str) -> Verdict:
    sentence = Sentence(rule="rivals", tone="neutral", text=text)
    return Verdict(decision="no-evidence", headline=_HEADLINES["no-evidence"], sentences=[sentence])


# ---- goodput


def best_goodput(name: str, traffic: list[TrafficRow]) -> TrafficRow | None:
    """The Poisson rate at which a topology serves the most good requests."""
    rows = [
        row
        for row in traffic
        if row.topology == name and row.kind == "poisson" and row.goodput.known
    ]
    return max(rows, key=lambda row: row.goodput.value or 0.0, default=None)


def judge_goodput(
    pd: str, rivals: list[str], traffic: list[TrafficRow], labels: dict[str, str], *, unit: str
) -> tuple[Goodput, list[Sentence]]:
    ours = best_goodput(pd, traffic)
    theirs = [row for name in rivals if (row := best_goodput(name, traffic)) is not None]
    if ours is None or not theirs:
        return "unknown", []
    best = max(theirs, key=lambda row: row.goodput.value or 0.0)
    outcome = _compare(ours, best)
    tones: dict[Goodput, Literal["good", "bad", "neutral"]] = {"win": "good", "loss": "bad"}
    text = (
        f"Goodput: {labels[pd]} serves at best {fmt.estimate(ours.goodput)} good requests/s "
        f"a {unit} (at {fmt.number(ours.rate)} req/s offered, {fmt.share(ours.attainment)} "
        f"within the service level); the best rival, {labels[best.topology]}, "
        f"{fmt.estimate(best.goodput)} (at {fmt.number(best.rate)} req/s, "
        f"{fmt.share(best.attainment)})."
    )
    return outcome, [Sentence(rule="goodput", tone=tones.get(outcome, "neutral"), text=text)]


def _compare(ours: TrafficRow, best: TrafficRow) -> Goodput:
    a, b = ours.goodput, best.goodput
    assert a.value is not None and b.value is not None
    if a.lo is None or a.hi is None or b.lo is None or b.hi is None:
        return "tie"
    if a.lo > b.hi and a.value > MATERIAL * b.value:
        return "win"
    if a.hi < b.lo and b.value > MATERIAL * a.value:
        return "loss"
    return "tie"


# ---- interference


def judge_interference(
    pd: str, rivals: list[str], rows: list[InterferenceRow], labels: dict[str, str]
) -> tuple[Protection, list[Sentence]]:
    by_name = {row.topology: row for row in rows}
    ours = by_name.get(pd)
    theirs = [by_name[name] for name in rivals if name in by_name]
    if ours is None or ours.factor is None or not any(row.factor for row in theirs):
        return "unknown", []
    outcome = _protection(ours, theirs)
    text = (
        f"Interference: while {ours.long_input_len:,}-token prompts are prefilled beside "
        f"{ours.num_streams} streams, {_describe(ours, labels)}; "
        + "; ".join(_describe(row, labels) for row in theirs)
        + "."
    )
    tone: Literal["good", "bad", "neutral"] = (
        "good" if outcome in ("protects", "reduces") else "neutral"
    )
    if is_disturbed(ours):
        tone = "bad"
    return outcome, [Sentence(rule="interference", tone=tone, text=text)]


def _protection(ours: InterferenceRow, theirs: list[InterferenceRow]) -> Protection:
    if not all(map(is_disturbed, theirs)) or is_disturbed(ours):
        return "does not"
    if ours.factor_percentile != 99.0:
        return "unknown"
    return "protects" if is_calm(ours) else "reduces"


def is_calm(row: InterferenceRow) -> bool:
    """Long prompts leave the streams alone. Only a p99 can show it."""
    return (
        row.factor is not None
        and row.factor <= PROTECTED
        and row.factor_percentile == 99.0
        and (row.stalled.value or 0.0) < CALM_SHARE
    )


def is_disturbed(row: InterferenceRow) -> bool:
    """Long prompts stop the streams. A lower percentile than p99 is evidence enough."""
    far = row.factor is not None and row.factor > DISTURBED
    return far or (row.stalled.value or 0.0) > DISTURBED_SHARE


def _describe(row: InterferenceRow, labels: dict[str, str]) -> str:
    if row.factor is None or row.factor_percentile is None:
        return f"on {labels[row.topology]} there are too few gaps to say (n={row.busy.n})"
    percentile = f"p{row.factor_percentile:g}"
    figure = {99.0: row.busy.p99, 90.0: row.busy.p90, 50.0: row.busy.p50}[row.factor_percentile]
    least = "" if row.factor_percentile == 99.0 else "at least "
    return (
        f"on {labels[row.topology]} the {percentile} gap is {least}{fmt.number(row.factor)}× the "
        f"quiet median ({fmt.estimate(figure)} against {fmt.estimate(row.quiet.p50)} ms), the "
        f"worst {fmt.number(row.busy.worst)} ms, and streams stand still for "
        f"{fmt.share(row.stalled)} of that time"
    )


# ---- what else the numbers say


def say_ttft(
    pd: str, rivals: list[str], ratios: list[RatioRow], labels: dict[str, str]
) -> list[Sentence]:
    """Idle TTFT against each rival, over all input lengths."""
    said = []
    for rival in rivals:
        rows = [
            row
            for row in ratios
            if (row.topology, row.versus, row.case) == (pd, rival, "idle") and row.ratio.known
        ]
        if not rows:
            continue
        slower = [row for row in rows if (row.ratio.lo or 0) > MATERIAL]
        faster = [row for row in rows if row.ratio.hi is not None and row.ratio.hi < 1 / MATERIAL]
        cited = ", ".join(f"{fmt.times(row.ratio)} at {row.input_len:,} tokens" for row in rows)
        word = "slower" if slower else "faster" if faster else "not measurably different"
        if slower and faster:
            word = "faster at some lengths, slower at others"
        said.append(
            Sentence(
                rule="idle_ttft",
                tone="bad" if slower else "good" if faster else "neutral",
                text=f"Idle TTFT: {labels[pd]} is {word} than {labels[rival]}: {cited}."
                if word in ("slower", "faster")
                else f"Idle TTFT: {labels[pd]} against {labels[rival]}, {word}: {cited}.",
            )
        )
    return said


def say_hand_over(pd: str, ttft: list[TtftRow], labels: dict[str, str]) -> list[Sentence]:
    """What the client sees between the first and the second token."""
    rows = [
        row
        for row in ttft
        if row.topology == pd and row.condition == "idle" and row.hand_over.known
    ]
    if not rows:
        return []
    cited = ", ".join(
        f"{fmt.estimate(row.hand_over)} ms after {row.input_len:,} tokens" for row in rows
    )
    text = (
        f"Hand-over: {labels[pd]}'s second token comes later than an ordinary gap by {cited} "
        "(median over requests)."
    )
    return [Sentence(rule="hand_over", tone="neutral", text=text)]


def say_saturation(
    pd: str, rivals: list[str], traffic: list[TrafficRow], labels: dict[str, str]
) -> list[Sentence]:
    """The highest offered rate that each topology kept up with."""
    cited = []
    for name in (pd, *rivals):
        rows = [
            row
            for row in traffic
            if row.topology == name and row.rate is not None and row.kind == "poisson"
        ]
        if not rows:
            continue
        kept = [row.rate for row in rows if row.sustained and row.rate is not None]
        highest = max(row.rate or 0.0 for row in rows)
        if not kept:
            cited.append(f"{labels[name]} none of the rates")
        else:
            more = " (the highest offered)" if max(kept) == highest else ""
            cited.append(f"{labels[name]} {fmt.number(max(kept))} req/s{more}")
    if not cited:
        return []
    text = f"Sustained load: {', '.join(cited)}."
    return [Sentence(rule="saturation", tone="neutral", text=text)]


def is_void(flag: CaseFlag) -> bool:
    """Whether the case's figures are left out of the verdict."""
    return flag.severity == "error"


def say_flags(flags: list[CaseFlag]) -> list[Sentence]:
    """Cautions: void cases, and a host that did other work."""
    return [*_say_void(flags), *_say_busy_host(flags)]


def _say_busy_host(flags: list[CaseFlag]) -> list[Sentence]:
    busy = [flag for flag in flags if flag.code == "busy_host"]
    if not busy:
        return []
    text = (
        f"Caution: other processes used the host during {len(busy)} cases, so differences between "
        "topologies may be theirs; run again on a quiet host."
    )
    return [Sentence(rule="busy_host", tone="bad", text=text)]


def _say_void(flags: list[CaseFlag]) -> list[Sentence]:
    errors = [flag for flag in flags if is_void(flag)]
    if not errors:
        return []
    codes = sorted({flag.code for flag in errors})
    text = (
        f"Caution: {len(errors)} validity errors ({', '.join(codes)}); those cases are left out "
        "of this verdict, see the validity table."
    )
    return [Sentence(rule="validity", tone="bad", text=text)]
