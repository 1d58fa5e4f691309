from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdrelay.lab.report.interference import (
    interference_rows,
    merge,
    overlaps,
    split_gaps,
    thin_cdf,
)
from pdrelay.lab.rundir import read_run

spans = st.lists(
    st.tuples(st.integers(0, 200), st.integers(1, 30)).map(lambda t: (t[0], t[0] + t[1])),
    min_size=1,
    max_size=8,
)
gaps = st.tuples(st.integers(0, 230), st.integers(1, 20)).map(lambda t: (t[0], t[0] + t[1]))


@given(gaps, spans)
def test_overlaps_agrees_with_looking_at_every_unit(gap, raw):
    units = {unit for start, end in raw for unit in range(start, end)}
    slow = any(unit in units for unit in range(*gap))
    assert overlaps(gap, merge(raw)) == slow


@given(spans)
def test_merge_keeps_the_union(raw):
    merged = merge(raw)
    assert {u for a, b in merged for u in range(a, b)} == {u for a, b in raw for u in range(a, b)}
    assert all(a[1] < b[0] for a, b in itertools.pairwise(merged))


@given(st.lists(st.floats(0.01, 1e4), min_size=1, max_size=2000))
def test_thinned_cdf_is_a_subset_of_the_full_one(values):
    ordered = sorted(values)
    points = thin_cdf(values)
    assert points[0][0] == ordered[0]
    assert points[-1] == (ordered[-1], 1.0)
    for value, share in points:
        assert ordered[round(share * len(ordered)) - 1] == value
    assert len(points) <= 162


@pytest.fixture(scope="module")
def rows(run_dir):
    return {row.topology: row for row in interference_rows(read_run(run_dir))}


def test_quiet_and_busy_are_told_apart(run_dir):
    for name in ("replicas-1", "pd-1-1"):
        (case,) = read_run(run_dir).select("interference", name)
        quiet, busy, period = split_gaps(case)
        longs = [record for record in case.records if record.tag == "long"]
        first = min(record.intended_ns for record in longs)
        assert any(end <= first for _, end in quiet)
        assert any(start > first for start, _ in quiet), "quiet windows between the long prompts"
        assert not set(quiet) & set(busy)
        slow = [
            (start, end)
            for stream in case.streams
            for start, end in zip(stream.chunk_ns, stream.chunk_ns[1:], strict=False)
            if any(start < r.chunk_ns[-1] and end > r.intended_ns for r in longs)
        ]
        assert sorted(busy) == sorted(slow)
        assert set(busy) <= set(period)


def test_colocated_streams_stall_and_disaggregated_ones_do_not(rows):
    assert rows["pd-1-1"].busy.worst < 5
    assert rows["pd-1-1"].factor < 2
    assert rows["pd-1-1"].factor_percentile == 99
    assert rows["replicas-1"].busy.worst > 500
    assert rows["replicas-1"].factor > 5


def test_a_percentile_misses_replicas_half_stalled_but_stalled_time_does_not(rows):
    assert rows["replicas-2"].factor < 2
    assert rows["replicas-2"].stalled.value == pytest.approx(0.5, abs=0.05)
    assert rows["replicas-1"].stalled.value > 0.95
    assert rows["pd-1-1"].stalled.value == 0


def test_few_busy_gaps_give_a_lower_percentile_as_a_bound(rows):
    row = rows["replicas-1"]
    assert row.busy.n < 662
    assert row.busy.p99.value is None
    assert row.factor_percentile in (50.0, 90.0)


def test_steps_in_which_a_long_prompt_decodes_are_busy(run_dir):
    (case,) = read_run(run_dir).select("interference", "pd-1-1")
    long = next(record for record in case.records if record.tag == "long")
    assert long.first_token_ns < long.chunk_ns[-1]
    quiet, busy, _ = split_gaps(case)

    def inside(gaps):
        return [g for g in gaps if long.first_token_ns < g[0] and g[1] < long.chunk_ns[-1]]

    assert inside(busy)
    assert not inside(quiet)
