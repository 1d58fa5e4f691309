"""KV transfers."""

from __future__ import annotations

from pdrelay.lab import fmt
from pdrelay.lab.blocks import note
from pdrelay.lab.html import Markup, el, join, table
from pdrelay.lab.report.figures import Summary
from pdrelay.lab.report.sections.common import EXPERIMENT_TITLES, unmeasured


def transfers_section(summary: Summary) -> Markup:
    if not summary.transfers:
        return unmeasured("KV transfer")
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
