"""The sections of the page of `pdrelay kv`, drawn from its summary alone."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence

from pdrelay.lab import fmt, plots
from pdrelay.lab.blocks import empty, note, plot_row
from pdrelay.lab.html import Markup, el, join, table
from pdrelay.lab.kv.columns import SERVE, SIDE_BY_SIDE, TRANSFERS
from pdrelay.lab.kv.exercise import corrections
from pdrelay.lab.kv.figures import KvSummary, LinkFigures, ServeRow, TransferRow
from pdrelay.lab.report.sections.environment import environment_table
from pdrelay.lab.stats import Estimate
from pdrelay.lab.table import Table, page_table

PLAIN_COPY = "plain copy"
_COPY_COLOUR = 3
FOREIGN_CORES = 0.25  # kept busy by others: figures are worse than they need to be


# ---- lead


def lead(summary: KvSummary) -> Markup:
    """Bytes a token, and the best of each transport, in sentences."""
    items = [summary.kv.arithmetic + "."]
    if summary.kv.remark:
        items.append(summary.kv.remark)
    items += measured_sentences(summary)
    items += [
        crossover_sentence(row) for row in summary.predictions if not row.shared or row.tp > 1
    ]
    return el(
        "section",
        el("p", "What a hand-over costs", class_="headline"),
        el("ul", *(el("li", item, class_="neutral") for item in items)),
        class_="verdict",
        id="verdict",
    )


def measured_sentences(summary: KvSummary) -> list[str]:
    """The longest contiguous prompt over each transport, beside the plain copy."""
    sentences = []
    for name in transports(summary):
        rows = [row for row in summary.transfers if row.transport == name]
        best = max(rows, key=lambda row: (row.tokens, row.gb_per_s.value or 0.0))
        if not best.bulk.known:
            continue
        sentences.append(
            f"{name}: {best.tokens:,} tokens ({fmt.num_bytes(best.num_bytes)}) in "
            f"{fmt.estimate(best.bulk)} ms, {fmt.number(best.gb_per_s.value)} GB/s, "
            f"{fmt.share(best.copy_share)} of a plain copy of the same bytes; layer by layer "
            f"{fmt.estimate(best.exposed)} ms are left after the last layer."
        )
    return sentences


def crossover_sentence(row: LinkFigures) -> str:
    """Where moving costs more than computing."""
    where = f"{model_name(row)} over {row.link}"
    if row.bulk_above is None:
        return f"{where}: moving never takes as long as prefill, at any length (predicted)."
    return (
        f"{where}: moving takes longer than prefill from {_tokens(row.bulk_above)} to "
        f"{_tokens(row.bulk_below)} tokens (predicted)."
    )


def _tokens(value: float | None) -> str:
    return fmt.NONE if value is None else f"{max(1, round(value)):,}"


def transports(summary: KvSummary) -> list[str]:
    return list(dict.fromkeys(row.transport for row in summary.transfers))


# ---- measured


def transfers_section(summary: KvSummary) -> Markup:
    if not summary.transfers:
        return empty("Transfers were not measured in this run.")
    size = min(row.block_size for row in summary.transfers)
    rows = [
        row
        for row in summary.transfers
        if row.block_size == size and row.placement == summary.transfers[0].placement
    ]
    where = f"pages of {size} tokens, {rows[0].placement}"
    time = _by_transport(summary, rows, lambda row: row.bulk)
    time.append(_copy_series([plots.Point(row.tokens, row.time) for row in summary.copies]))
    speed = _by_transport(summary, rows, lambda row: row.gb_per_s)
    speed.append(_copy_series([plots.Point(row.tokens, row.gb_per_s) for row in summary.copies]))
    charts = [
        _by_length(f"Whole prompt at once, {where}, ms (log)", time, "ms (log)", log_y=True),
        _by_length(f"Bandwidth, {where}, GB/s", speed, "GB/s"),
        _pages_chart(summary),
        _by_length(
            f"Layer by layer, {where}: left after the last layer, ms (log)",
            _by_transport(summary, rows, lambda row: row.exposed),
            "ms (log)",
            log_y=True,
        ),
    ]
    peak = summary.peak_gb_per_s
    return join(
        [
            note(
                "Between two processes, over the transports that the server uses. At once: from "
                "the first piece to the consumer knowing that all is there. Plain copy: the same "
                "bytes, one piece, between the same two pools, in turn with the transfers; its "
                f"best median is {fmt.number(peak)} GB/s. Layer by layer: each layer is sent after "
                "a stand-in for its computation (matrix products, as long as prefill; on a CPU at "
                "most 30 ms a prompt)."
            ),
            plot_row(*charts),
            page_table(Table(TRANSFERS, summary.transfers), "Medians with 95 % intervals."),
        ]
    )


def _by_transport(
    summary: KvSummary, rows: Sequence[TransferRow], pick: Callable[[TransferRow], Estimate]
) -> list[plots.Series]:
    return [
        plots.Series(
            name,
            index + (index >= _COPY_COLOUR),
            [plots.Point(row.tokens, pick(row)) for row in rows if row.transport == name],
        )
        for index, name in enumerate(transports(summary))
    ]


def _copy_series(points: Sequence[plots.Point]) -> plots.Series:
    return plots.Series(PLAIN_COPY, _COPY_COLOUR, points, dashed=True)


def _by_length(
    title: str, series: Sequence[plots.Series], y_label: str, *, log_y: bool = False
) -> Markup:
    return plots.line_chart(
        title, series, x_label="prompt tokens (log)", y_label=y_label, log_x=True, log_y=log_y
    )


def _pages_chart(summary: KvSummary) -> Markup:
    """The longest prompt by page size and placement."""
    longest = max(row.tokens for row in summary.transfers)
    rows = [row for row in summary.transfers if row.tokens == longest]
    keys = dict.fromkeys((row.block_size, row.placement) for row in rows)
    names = transports(summary)
    groups = [
        plots.Group(
            f"{size}, {placement}",
            [
                (names.index(row.transport), row.transport, row.gb_per_s)
                for row in rows
                if (row.block_size, row.placement) == (size, placement)
            ],
        )
        for size, placement in sorted(keys)
    ]
    title = f"{longest:,} tokens by page size and placement, GB/s"
    return plots.bar_chart(title, groups, y_label="GB/s")


# ---- servers


def side_by_side_section(summary: KvSummary) -> Markup:
    """How much slower a prefill is that hands its KV over."""
    if not summary.side_by_side:
        return empty("No servers ran side by side in this run.")
    return join(
        [
            note(
                "P/D and one replica run at the same time on the same devices, and each prompt "
                "goes to both, one right after the other in random order, while nothing else "
                "runs. Prefill: from its first chunk's launch to its last chunk's end, as the "
                "ranks saw it. Ratio: median over the pairs, so that drift cancels."
            ),
            page_table(Table(SIDE_BY_SIDE, summary.side_by_side), "Medians with 95 % intervals."),
        ]
    )


def serve_section(summary: KvSummary) -> Markup:
    if not summary.serve:
        return empty("Servers were not started in this run.")
    picks: tuple[tuple[str, int, Callable[[ServeRow], Estimate]], ...] = (
        ("P/D 1:1", 0, lambda row: row.ttft),
        ("1 replica", 1, lambda row: row.ttft_alone),
    )
    exposed: tuple[tuple[str, int, Callable[[ServeRow], Estimate]], ...] = (
        ("second token late by, P/D", 0, lambda row: row.hand_over),
        ("the same, 1 replica", 1, lambda row: row.hand_over_alone),
        ("transfer after prefill's end", 2, lambda row: row.transfer_tail),
    )
    ttft, parts = _serve_series(summary, picks), _serve_series(summary, exposed)
    return join(
        [
            note(
                "Real servers, one after the other in each repeat, one request at a time, distinct "
                "random prompts. The prefill side streams the first token itself, so a hand-over "
                "can show in TTFT only by slowing prefill; what is left to move delays the second "
                "token. The servers' own report lies in serve/report.html."
            ),
            plot_row(
                _by_length("TTFT p50, ms (log)", ttft, "ms (log)", log_y=True),
                _by_length("What is exposed, p50, ms", parts, "ms"),
            ),
            page_table(Table(SERVE, summary.serve), "Medians with 95 % intervals."),
            *(note(text) for text in summary.serve_notes),
        ]
    )


def _serve_series(
    summary: KvSummary, picks: Sequence[tuple[str, int, Callable[[ServeRow], Estimate]]]
) -> list[plots.Series]:
    return [
        plots.Series(label, colour, [plots.Point(row.tokens, pick(row)) for row in summary.serve])
        for label, colour, pick in picks
    ]


# ---- predicted


def prediction_section(summary: KvSummary) -> Markup:
    groups: dict[tuple[str, int, str], list[LinkFigures]] = {}
    for row in summary.predictions:
        groups.setdefault((row.model, row.tp, row.compute), []).append(row)
    charts = [_prediction_chart(rows) for rows in groups.values()]
    head = ["model", "on", "link", "GB/s", "moving exceeds prefill", "layer-wise"]
    rows = [
        [
            model_name(row),
            row.compute,
            row.link,
            f"{fmt.number(row.link_gb_per_s)} {'the host' if row.shared else 'a rank'}",
            span(row.bulk_above, row.bulk_below),
            span(row.layerwise_above, row.layerwise_below),
        ]
        for row in summary.predictions
    ]
    return join(
        [
            note(
                "Roofline: prefill = max(FLOP / rate, weights / memory bandwidth), with FLOP = "
                "2 × layer weights × T + 4 × L × H × D × T² / 2 (causal) + the last token's "
                "logits; transfer = bytes / link. Layer by layer, one layer is left after prefill "
                "while the link keeps up; a slower link has transfer − (L − 1)/L × prefill left."
            ),
            plot_row(*charts),
            table(
                head,
                rows,
                text_columns=3,
                caption="Prompt lengths at which the exposed part of the transfer exceeds prefill. "
                "Such a span has an end: prefill grows with the square of the length.",
            ),
            _points_table(summary),
            el("ul", *(el("li", text) for text in sources(summary))),
        ]
    )


def model_name(row: LinkFigures) -> str:
    return row.model + (f", TP={row.tp}" if row.tp > 1 else "")


def sources(summary: KvSummary) -> list[str]:
    """Where the predictions' rates are from, one line each."""
    return list(
        dict.fromkeys(
            text
            for row in summary.predictions
            for text in (f"{row.compute}: {row.compute_source}", f"{row.link}: {row.link_source}")
        )
    )


def span(above: float | None, below: float | None) -> str:
    return "never" if above is None else f"{_tokens(above)} to {_tokens(below)} tokens"


def _prediction_chart(rows: Sequence[LinkFigures]) -> Markup:
    series = [
        plots.Series(
            row.link,
            index,
            [plots.Point(p.tokens, Estimate(value=p.bulk)) for p in row.points],
        )
        for index, row in enumerate(rows)
    ]
    prefill = [plots.Point(p.tokens, Estimate(value=p.prefill)) for p in rows[0].points]
    series.append(plots.Series("prefill", len(rows), prefill, dashed=True))
    name = f"{model_name(rows[0])} on {rows[0].compute}"
    return _by_length(f"Predicted: {name}, ms (log)", series, "ms (log)", log_y=True)


def _points_table(summary: KvSummary) -> Markup:
    head = ["model", "link", "tokens", "bytes", "prefill, ms", "at once, ms", "of prefill"]
    head += ["layer-wise, ms", "prefill makes KV at"]
    rows = [
        [
            f"{model_name(row)} on {row.compute}",
            row.link,
            fmt.tokens(point.tokens),
            fmt.num_bytes(point.num_bytes),
            fmt.number(point.prefill),
            fmt.number(point.bulk),
            f"{point.bulk / point.prefill:.1%}",
            fmt.number(point.exposed),
            f"{fmt.number(point.kv_gb_per_s)} GB/s",
        ]
        for row in summary.predictions
        for point in row.points
    ]
    return el("details", el("summary", "All predicted points"), table(head, rows, text_columns=2))


# ---- the exercise, environment


def exercise_section(summary: KvSummary) -> Markup:
    rows = [list(pair) for pair in corrections()]
    return table(["the exercise", "in fact"], rows, text_columns=2)


def environment_section(summary: KvSummary) -> Markup:
    run = summary.run
    where = f"Measured on {run.device_words}. " if run.device_words else ""
    return join(
        [
            note(
                f"{where}pdrelay {run.pdrelay_version}, commit {run.git_commit or 'unknown'}, "
                f"{run.started} to {run.ended or '?'}."
            ),
            environment_table(summary.environment),
            el("pre", shlex.join(run.argv)),
            *(note(text) for text in warnings(summary)),
        ]
    )


def warnings(summary: KvSummary) -> list[str]:
    """What qualifies the figures."""
    cores = summary.run.foreign_cores
    busy = f"Other processes kept {cores:.1f} cores busy meanwhile." if cores is not None else ""
    loud = cores is not None and cores > FOREIGN_CORES
    return [*([busy] if loud else []), *summary.run.notes]
