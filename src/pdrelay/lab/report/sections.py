"""The report's sections, drawn from the summary alone."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence

from pdrelay.lab import fmt, lanes, plots
from pdrelay.lab.blocks import empty, note, plot_row
from pdrelay.lab.html import Markup, el, join, table
from pdrelay.lab.report.figures import (
    STALL,
    Distribution,
    InterferenceRow,
    Summary,
    TrafficKind,
    TrafficRow,
    TtftRow,
)
from pdrelay.lab.report.methodology import HANDOUT, METHODS
from pdrelay.lab.report.queue_section import queue_table
from pdrelay.lab.report.streams_section import streams_table
from pdrelay.lab.stats import Estimate

EXPERIMENT_TITLES = {
    "ttft": "1 TTFT",
    "traffic": "2 traffic",
    "interference": "3 interference",
    "shapes": "4 shapes",
}
_PHASES = (
    ("k-route", "send, tokenize, route"),
    ("k-wait", "wait for prefill"),
    ("k-prefill", "prefill"),
    ("k-transfer", "transfer, exposed"),
    ("k-return", "first token's return"),
)


def _order(summary: Summary) -> dict[str, int]:
    """Colour index of each topology."""
    return {topology.name: index for index, topology in enumerate(summary.topologies)}


def _unmeasured(what: str) -> Markup:
    return empty(f"{what} was not measured in this run.")


# ---- verdict


def verdict_section(summary: Summary) -> Markup:
    verdict = summary.verdict
    items = (el("li", sentence.text, class_=sentence.tone) for sentence in verdict.sentences)
    return el(
        "section",
        el("p", verdict.headline, class_="headline"),
        el("ul", *items),
        note(
            "Each sentence follows from the tables below by the rules in pdrelay/lab/verdict.py. "
            "Brackets are 95 % intervals. Service level: " + _slo_text(summary) + "."
        ),
        class_=f"verdict {verdict.decision}",
        id="verdict",
    )


def _slo_text(summary: Summary) -> str:
    slo = summary.run.service_level
    limits = (("TTFT", slo.ttft_ms), ("TPOT", slo.tpot_ms), ("end to end", slo.e2el_ms))
    return " and ".join(f"{name} ≤ {fmt.number(ms)} ms" for name, ms in limits if ms is not None)


# ---- experiment 1


def ttft_section(summary: Summary) -> Markup:
    if not summary.ttft:
        return _unmeasured("TTFT against input length")
    body: list[Markup] = []
    titles = {"idle": "on an idle server", "busy": "while other streams decode"}
    for condition, words in titles.items():
        rows = [row for row in summary.ttft if row.condition == condition]
        if rows:
            series = _ttft_series(summary, rows)
            body.append(
                plots.line_chart(
                    f"TTFT p50 {words}, ms",
                    series,
                    x_label="input tokens (log)",
                    y_label="TTFT, ms (log)",
                    log_x=True,
                    log_y=True,
                )
            )
    return join(
        [
            plot_row(*body),
            note(
                "Bars are 95 % intervals. Hollow dots are single requests, where too few were "
                "sent for a median."
            ),
            *(_ttft_table(summary, c, w) for c, w in titles.items()),
            _ratio_table(summary),
        ]
    )


def _ttft_series(summary: Summary, rows: list[TtftRow]) -> list[plots.Series]:
    return [
        plots.Series(
            summary.label(name),
            colour,
            [plots.Point(r.input_len, r.ttft, r.samples) for r in rows if r.topology == name],
        )
        for name, colour in _order(summary).items()
    ]


def _ttft_table(summary: Summary, condition: str, words: str) -> Markup:
    rows = [row for row in summary.ttft if row.condition == condition]
    if not rows:
        return Markup("")
    return table(
        ["topology", "input tokens", "n", "TTFT p50, ms", "p90", "TTST p50", "hand-over, ms"],
        [
            [
                summary.label(row.topology),
                fmt.tokens(row.input_len),
                row.ttft.n,
                fmt.estimate(row.ttft),
                fmt.estimate(row.ttft_p90) if row.ttft_p90.known else row.ttft_p90.note,
                fmt.estimate(row.ttst),
                fmt.estimate(row.hand_over),
            ]
            for row in rows
        ],
        caption=f"TTFT {words}. Hand-over: first gap less the request's median later gap, the "
        "second token's delay as the client sees it.",
    )


def _ratio_table(summary: Summary) -> Markup:
    if not summary.ratios:
        return Markup("")
    rows = [
        [
            f"{summary.label(row.topology)} / {summary.label(row.versus)}",
            row.case,
            fmt.tokens(row.input_len or 0),
            fmt.times(row.ratio),
        ]
        for row in summary.ratios
    ]
    methods = sorted({row.ratio.method for row in summary.ratios if row.ratio.method})
    return table(
        ["ratio of", "server", "input tokens", "TTFT p50 ratio"],
        rows,
        caption=f"P/D against the others ({'; '.join(methods) or 'too few samples'}).",
        text_columns=2,
    )


# ---- experiment 2


def traffic_section(summary: Summary) -> Markup:
    if not summary.traffic:
        return _unmeasured("Traffic")
    rated = [row for row in summary.traffic if row.kind == "poisson"]
    charts = [
        _rate_chart(summary, rated, "TTFT p50, ms (log)", lambda row: row.ttft, log_y=True),
        _rate_chart(summary, rated, "ITL p50 (solid) and p99 (dashed), ms (log)", None, log_y=True),
        _rate_chart(summary, rated, "Goodput, good req/s a GPU", lambda row: row.goodput),
        _rate_chart(
            summary, rated, "Requests within the service level", lambda row: row.attainment, top=1.0
        ),
    ]
    capacity = summary.run.capacity_rps
    basis = (
        f"Rates are shares of {fmt.number(capacity)} req/s, which "
        f"{summary.label(summary.run.baseline)} completed in a closed loop with the same lengths. "
        if capacity
        else ""
    )
    return join(
        [
            note(f"{basis}Service level: {_slo_text(summary)}."),
            plot_row(*charts) if rated else "",
            _traffic_table(summary, rated, "Poisson arrivals, chat-like lengths") if rated else "",
            *(
                _traffic_table(summary, rows, f"Trace: {workload}")
                for workload, rows in _by_workload(summary, "trace").items()
            ),
            *(
                _traffic_table(summary, rows, f"Requests of one size: {workload}")
                for workload, rows in _by_workload(summary, "fixed").items()
            ),
            queue_table(summary),
        ]
    )


def _by_workload(summary: Summary, kind: TrafficKind) -> dict[str, list[TrafficRow]]:
    groups: dict[str, list[TrafficRow]] = {}
    for row in summary.traffic:
        if row.kind == kind:
            groups.setdefault(row.workload, []).append(row)
    return groups


def _rate_chart(
    summary: Summary,
    rows: list[TrafficRow],
    title: str,
    pick: Callable[[TrafficRow], Estimate] | None,
    *,
    log_y: bool = False,
    top: float | None = None,
) -> Markup:
    series = []
    for name, colour in _order(summary).items():
        own = sorted((r for r in rows if r.topology == name), key=lambda row: row.rate or 0.0)
        label = summary.label(name)
        if pick is not None:
            points = [plots.Point(row.rate or 0.0, pick(row)) for row in own]
            series.append(plots.Series(label, colour, points))
            continue
        p50 = [plots.Point(row.rate or 0.0, row.itl) for row in own]
        p99 = [plots.Point(row.rate or 0.0, row.itl_p99) for row in own if row.itl_p99.known]
        series.append(plots.Series(label, colour, p50))
        if p99:
            series.append(plots.Series(f"{label} p99", colour, p99, dashed=True))
    return plots.line_chart(
        title, series, x_label="offered, req/s", y_label=title, log_y=log_y, y_max=top
    )


def _traffic_table(summary: Summary, rows: Sequence[TrafficRow], caption: str) -> Markup:
    return table(
        [
            "topology",
            "req/s",
            "n",
            "TTFT p50, ms",
            "p90",
            "p99",
            "ITL p50, ms",
            "p99",
            "TPOT p50",
            "within SLO",
            "goodput, req/s/GPU",
            "completed, req/s",
            "tok/s",
            "sustained",
        ],
        [
            [
                summary.label(row.topology),
                fmt.number(row.rate),
                f"{row.num_requests}" + (f" ({row.num_failed} failed)" if row.num_failed else ""),
                fmt.estimate(row.ttft),
                fmt.estimate(row.ttft_p90) if row.ttft_p90.known else row.ttft_p90.note,
                fmt.estimate(row.ttft_p99) if row.ttft_p99.known else row.ttft_p99.note,
                fmt.estimate(row.itl),
                fmt.estimate(row.itl_p99) if row.itl_p99.known else row.itl_p99.note,
                fmt.estimate(row.tpot),
                fmt.share(row.attainment),
                fmt.estimate(row.goodput),
                fmt.estimate(row.completed_rate),
                fmt.estimate(row.output_rate),
                "yes" if row.sustained else "no",
            ]
            for row in rows
        ],
        caption=caption,
    )


# ---- experiment 3


def interference_section(summary: Summary) -> Markup:
    if not summary.interference:
        return _unmeasured("Interference")
    order = _order(summary)
    curves = []
    for row in summary.interference:
        label, colour = summary.label(row.topology), order[row.topology]
        curves.append(plots.Curve(f"{label} quiet", colour, row.quiet.cdf, dashed=True))
        curves.append(plots.Curve(f"{label} busy", colour, row.busy.cdf))
    worst = [
        plots.Group(
            words,
            [
                (order[row.topology], summary.label(row.topology), _plain(pick(row).worst))
                for row in summary.interference
            ],
        )
        for words, pick in (("quiet", _quiet), ("busy", _busy))
    ]
    first = summary.interference[0]
    return join(
        [
            note(
                f"{first.num_streams} streams decode; after a quiet time {first.num_long} prompts "
                f"of {first.long_input_len:,} tokens arrive at fixed times. Busy gaps overlap the "
                "time from a long prompt's sending to its last token; quiet ones lie before and "
                "between, so that both meet the same context lengths; the period is everything "
                "from the first long prompt to the last one's last token."
            ),
            plot_row(
                plots.cdf_chart("ITL while quiet and busy", curves, x_label="ITL, ms (log)"),
                plots.bar_chart("Worst gap, ms (log)", worst, y_label="ms (log)", log_y=True),
            ),
            _interference_table(summary),
        ]
    )


def _quiet(row: InterferenceRow) -> Distribution:
    return row.quiet


def _busy(row: InterferenceRow) -> Distribution:
    return row.busy


def _plain(value: float | None) -> Estimate:
    return Estimate(value=value)


def _interference_table(summary: Summary) -> Markup:
    rows = []
    for row in summary.interference:
        least = "" if row.factor_percentile in (99.0, None) else "≥ "
        rows.append(
            [
                summary.label(row.topology),
                row.quiet.n,
                fmt.estimate(row.quiet.p50),
                fmt.estimate(row.quiet.p99) if row.quiet.p99.known else row.quiet.p99.note,
                row.busy.n,
                fmt.estimate(row.busy.p50),
                fmt.estimate(row.busy.p99) if row.busy.p99.known else row.busy.p99.note,
                fmt.number(row.busy.worst),
                f"{least}{fmt.number(row.factor)}×" if row.factor else fmt.NONE,
                fmt.share(row.stalled),
                fmt.estimate(row.period.p99) if row.period.p99.known else row.period.p99.note,
                fmt.estimate(row.long_ttft),
            ]
        )
    return table(
        [
            "topology",
            "quiet gaps",
            "quiet p50, ms",
            "p99",
            "busy gaps",
            "busy p50, ms",
            "p99",
            "worst gap",
            "busy p99 / quiet p50",
            "stalled time",
            "period p99",
            "long prompt's TTFT p50",
        ],
        rows,
        caption="ITL of the running streams, ms. “≥”: too few busy gaps for a p99, so the highest "
        "percentile that the sample allows stands in for it from below. Stalled: share of the "
        f"streams' busy time in gaps over {STALL:g}× the quiet median, which a percentile of gaps "
        "misses where some streams stall and others go on.",
    )


# ---- experiment 4


def shapes_section(summary: Summary) -> Markup:
    if not summary.shapes and not summary.streams:
        return _unmeasured("The three shapes")
    picks: tuple[tuple[str, Callable[..., Estimate]], ...] = (
        ("TTFT p50, ms (log)", lambda row: row.ttft),
        ("ITL p50, ms", lambda row: row.itl),
        ("End to end p50, ms (log)", lambda row: row.e2e),
    )
    cases = list(dict.fromkeys(row.case for row in summary.shapes))
    order = _order(summary)
    charts = [
        plots.bar_chart(
            title,
            [
                plots.Group(
                    case,
                    [
                        (order[r.topology], summary.label(r.topology), pick(r))
                        for r in summary.shapes
                        if r.case == case
                    ],
                )
                for case in cases
            ],
            y_label="ms",
            log_y="log" in title,
        )
        for title, pick in picks
    ]
    rows = [
        [
            f"{row.case} ({row.input_len:,}/{row.output_len:,})",
            summary.label(row.topology),
            row.ttft.n,
            fmt.number(row.rate),
            fmt.estimate(row.ttft),
            fmt.estimate(row.itl),
            fmt.estimate(row.e2e),
            fmt.estimate(row.output_rate),
        ]
        for case in cases
        for row in summary.shapes
        if row.case == case
    ]
    head = [
        "shape (in/out)",
        "topology",
        "n",
        "req/s",
        "TTFT p50, ms",
        "ITL p50",
        "E2E p50",
        "tok/s",
    ]
    return join([plot_row(*charts), table(head, rows, text_columns=2), streams_table(summary)])


# ---- phases, transfers, timelines


def phases_section(summary: Summary) -> Markup:
    if not summary.phases:
        return _unmeasured("TTFT by phase")
    charts = []
    keys = sorted(
        {(row.condition != "idle", row.condition, row.input_len) for row in summary.phases}
    )
    for _, condition, length in keys:
        stacks = [
            plots.Stack(
                summary.label(row.topology),
                list(
                    zip(
                        (css for css, _ in _PHASES),
                        (row.route, row.wait, row.prefill, row.transfer, row.return_),
                        strict=True,
                    )
                ),
                f"{fmt.number(row.total)} ms",
            )
            for row in summary.phases
            if row.condition == condition and row.input_len == length
        ]
        title = f"{length:,} tokens, {condition} server: mean TTFT by phase"
        charts.append(plots.stack_chart(title, _PHASES, stacks))
    rows = [
        [
            summary.label(row.topology),
            row.condition,
            fmt.tokens(row.input_len),
            row.n,
            *map(fmt.number, (row.route, row.wait, row.prefill, row.transfer, row.return_)),
            fmt.number(row.total),
            fmt.number(row.hidden_transfer),
        ]
        for row in summary.phases
    ]
    head = ["topology", "server", "input tokens", "n", "send to routed", "wait", "prefill"]
    head += ["transfer, exposed", "return", "TTFT, mean", "transfer after prefill, hidden"]
    return join(
        [
            note(
                "Means, so that the phases add up to the mean TTFT. A hand-over delays TTFT only "
                "where the decode side makes the first token; here the prefill side sends it, so "
                "what is still to move then shows in the last column and in the second token."
            ),
            plot_row(*charts),
            table(head, rows, caption="All in ms.", text_columns=2),
        ]
    )


def transfers_section(summary: Summary) -> Markup:
    if not summary.transfers:
        return _unmeasured("KV transfer")
    rows = [
        [
            summary.label(row.topology),
            EXPERIMENT_TITLES.get(row.experiment, row.experiment),
            row.transport,
            row.input_len if "–" in row.input_len else fmt.tokens(int(row.input_len)),
            row.n,
            fmt.num_bytes(row.num_bytes),
            fmt.number(row.num_pieces),
            fmt.number(row.busy_ms),
            fmt.number(row.gb_per_s),
            fmt.number(row.wall_ms),
            fmt.NONE if row.overlap is None else f"{row.overlap:.0%}",
            fmt.number(row.tail_ms),
            _bytes_verdict(row.bytes_matched, row.bytes_wrong, row.bytes_unverified),
        ]
        for row in summary.transfers
    ]
    head = ["topology", "experiment", "transport", "input tokens", "n", "bytes", "pieces"]
    head += ["busy, ms", "GB/s", "wall, ms", "within prefill", "after prefill, ms", "bytes check"]
    wrong = [row.first_wrong for row in summary.transfers if row.first_wrong]
    return join(
        [
            note(
                "Medians over the transfers. Busy is time inside copies or socket calls, GB/s is "
                "bytes over busy time of what was copied: pages that the kernels of prefill stored "
                "into the consumer's memory cost no time of their own. Wall is first piece to "
                "verified. The check compares bytes moved with whole blocks of the prompt less "
                "those that the consumer had cached."
            ),
            table(head, rows, text_columns=3),
            *(el("p", text, class_="bad") for text in wrong),
        ]
    )


def _bytes_verdict(matched: int, wrong: int, unverified: int) -> Markup:
    if wrong:
        return el("span", f"{wrong} wrong", class_="flag error")
    if unverified:
        return el("span", f"{matched} right, {unverified} not verifiable", class_="flag warning")
    return el("span", f"all {matched} right", class_="flag ok")


def timelines_section(summary: Summary) -> Markup:
    if not summary.timelines:
        return _unmeasured("A request's timeline")
    until = max(timeline.until for timeline in summary.timelines)
    keys = [(f"k-{kind}", words) for kind, words in lanes.KINDS]
    charts = [
        lanes.draw(timeline, summary.label(timeline.topology), until)
        for timeline in summary.timelines
    ]
    return join(
        [
            note(
                "The request of median TTFT among the idle probes nearest to 2,048 tokens, all on "
                "one scale; dots are tokens. trace.json holds every request: open it in Perfetto."
            ),
            plots.legend(keys),
            plot_row(*charts),
        ]
    )


# ---- validity, methods, environment


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


def methodology_section(summary: Summary) -> Markup:
    items = (el("li", text) for text in METHODS)
    rows = (list(pair) for pair in HANDOUT)
    return join(
        [
            el("ul", *items),
            el("h3", "What the exercise this lab grew from gets wrong"),
            table(["the exercise", "in fact, and here"], rows, text_columns=2),
        ]
    )


def environment_table(environment: Mapping[str, object]) -> Markup:
    """What the run ran on."""
    rows = [[key, _value(value)] for key, value in environment.items()]
    return table(["", "value"], rows, text_columns=2)


def environment_section(summary: Summary) -> Markup:
    servers = []
    for topology in summary.topologies:
        peaks = topology.peak_rss_bytes
        servers.append(
            [
                topology.label,
                topology.engine or fmt.NONE,
                topology.num_gpus,
                ", ".join(f"{fmt.number(seconds)}" for seconds in topology.startup_s),
                fmt.num_bytes(topology.bytes_per_token) if topology.bytes_per_token else fmt.NONE,
                "; ".join(f"{name} {fmt.num_bytes(size)}" for name, size in peaks.items()),
            ]
        )
    head = ["topology", "engine", "ranks", "start-up, s", "KV a token", "peak memory of a rank"]
    return join(
        [
            environment_table(summary.environment),
            table(head, servers, caption="The servers as they ran.", text_columns=2),
            _resolved(summary),
        ]
    )


def _resolved(summary: Summary) -> Markup:
    rows = [
        [topology.label, instance, ", ".join(f"{k}={v}" for k, v in settings.items())]
        for topology in summary.topologies
        for instance, settings in topology.resolved.items()
        if settings
    ]
    if not rows:
        return Markup("")
    return table(
        ["topology", "instance", "resolved settings"],
        rows,
        caption="What “auto” became.",
        text_columns=3,
    )


def _value(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {inner}" for key, inner in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return str(value)


def commands_section(summary: Summary) -> Markup:
    run = summary.run
    commands = [shlex.join(run.argv), *(shlex.join(t.argv) for t in summary.topologies)]
    return join(
        [
            note(
                f"pdrelay {run.pdrelay_version}, commit {run.git_commit or 'unknown'}, "
                f"seeds {', '.join(map(str, run.seeds))}, {run.started} to {run.ended or '?'}."
            ),
            el("pre", "\n\n".join(command for command in commands if command)),
        ]
    )
