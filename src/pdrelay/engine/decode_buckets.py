"""Batch sizes that have a CUDA graph: a decode step runs the smallest that holds it."""

from __future__ import annotations

from bisect import bisect_left

_SMALL = (1, 2, 4, 8, 16, 24, 32, 48, 64)
_STEP = 32  # beyond: padding wastes at most 31 rows of 96 and more


def decode_buckets(max_num_seqs: int) -> tuple[int, ...]:
    """Ascending; the last is `max_num_seqs`."""
    assert max_num_seqs > 0
    sizes = [size for size in _SMALL if size < max_num_seqs]
    sizes += range(_SMALL[-1] + _STEP, max_num_seqs, _STEP)
    return (*sizes, max_num_seqs)


def bucket_of(buckets: tuple[int, ...], num_rows: int) -> int | None:
    """The smallest bucket that holds `num_rows`; None without one, or for no row."""
    index = bisect_left(buckets, num_rows)
    return buckets[index] if num_rows and index < len(buckets) else None
