"""ITL of many streams: only where (nearly) all of them decode."""

from __future__ import annotations

import pytest

from pdrelay.bench.record import ClientRecord
from pdrelay.lab.report.streams import full_gaps_ms, full_windows
from pdrelay.lab.rundir import Case, CaseInfo

MS = 1_000_000


def case(num_streams: int, *token_times_ms: list[int]) -> Case:
    info = CaseInfo(
        experiment="shapes", topology="x", case=f"streams-{num_streams}", rep=0, seed=0,
        mode="closed", window_start_ns=0, window_end_ns=0,
        parameters={"num_streams": num_streams},
    )  # fmt: skip
    records = [
        ClientRecord(
            request_id=str(index),
            intended_ns=0,
            end_ns=times[-1] * MS,
            chunk_ns=[time * MS for time in times],
        )
        for index, times in enumerate(token_times_ms)
    ]
    return Case(info, records)


def test_gaps_count_only_while_all_decode():
    # The second stream begins at 10 and the first ends at 20.
    one = list(range(0, 21, 2))
    two = list(range(10, 31, 5))
    found = case(2, one, two)
    assert full_windows(found) == [(10 * MS, 20 * MS)]
    assert sorted(full_gaps_ms(found)) == [2.0] * 5 + [5.0] * 2


def test_a_single_stream_counts_from_its_first_to_its_last_token():
    found = case(1, [1, 2, 3], [10, 12, 14])
    assert full_windows(found) == [(1 * MS, 3 * MS), (10 * MS, 14 * MS)]
    assert sorted(full_gaps_ms(found)) == [1.0, 1.0, 2.0, 2.0]


def test_streams_that_never_decode_together_give_nothing():
    assert full_gaps_ms(case(2, [0, 5], [6, 9])) == []
    assert full_gaps_ms(case(2, [0, 5], [5, 9])) == []


@pytest.mark.parametrize(("num_streams", "running"), [(32, 29), (64, 58), (8, 7)])
def test_nine_tenths_are_enough(num_streams, running):
    late = [[100, 101]] * (num_streams - running)
    assert full_gaps_ms(case(num_streams, *[[0, 50, 99]] * running, *late))
    one_less = case(num_streams, *[[0, 50, 99]] * (running - 1), [100, 101], *late)
    assert full_gaps_ms(one_less) == []
