"""Figures of servers side by side: medians, and ratios pair by pair."""

from __future__ import annotations

from collections.abc import Sequence

from pdrelay.lab.kv.figures import SideBySideRow
from pdrelay.lab.kv.rundir import PairRecord
from pdrelay.lab.stats import Estimate, percentile_estimate


def side_by_side_rows(pairs: Sequence[PairRecord]) -> list[SideBySideRow]:
    """One row a prompt length."""
    return [
        _row(tokens, [pair for pair in pairs if pair.tokens == tokens])
        for tokens in sorted({pair.tokens for pair in pairs})
    ]


def _row(tokens: int, pairs: Sequence[PairRecord]) -> SideBySideRow:
    return SideBySideRow(
        tokens=tokens,
        prefill=_median_ms([pair.prefill_ns for pair in pairs]),
        prefill_alone=_median_ms([pair.prefill_alone_ns for pair in pairs]),
        prefill_ratio=_median([pair.prefill_ns / pair.prefill_alone_ns for pair in pairs]),
        ttft=_median_ms([pair.ttft_ns for pair in pairs]),
        ttft_alone=_median_ms([pair.ttft_alone_ns for pair in pairs]),
        ttft_ratio=_median([pair.ttft_ns / pair.ttft_alone_ns for pair in pairs]),
    )


def _median_ms(values: Sequence[int]) -> Estimate:
    return _median([value / 1e6 for value in values])


def _median(values: Sequence[float]) -> Estimate:
    return percentile_estimate([values])
