"""Runs as tables of numbers, against loops; and what of them reaches the driver."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdrelay.core.kv_layout import KVLayout, contiguous_runs
from pdrelay.errors import TransportError
from pdrelay.transport.cuda.driver import Driver
from pdrelay.transport.device import (
    BlockPairs,
    PageMove,
    PagePool,
    Run,
    RunTable,
    latest,
    move_runs,
    page_runs,
)


def make_layout(num_blocks):
    return KVLayout(
        num_layers=5,
        num_blocks=num_blocks,
        block_size=4,
        num_kv_heads=2,
        head_dim=4,
        dtype="float32",
    )


SOURCE = PagePool(make_layout(40), 1 << 46)
TARGET = PagePool(make_layout(50), (1 << 47) - (1 << 30))


@st.composite
def block_lists(draw):
    """Source and destination blocks with runs in them."""
    src, dst = [], []
    for _ in range(draw(st.integers(1, 6))):
        length = draw(st.integers(1, 6))
        a, b = draw(st.integers(0, 34)), draw(st.integers(0, 44))
        src += range(a, a + length)
        dst += range(b, b + length)
    return src, dst


@given(blocks=block_lists())
def test_pairs_find_the_runs_that_a_loop_finds(blocks):
    pairs = BlockPairs(*blocks)
    wanted = list(contiguous_runs(*blocks))
    assert pairs.runs.T.tolist() == [list(run) for run in wanted]
    assert (pairs.num_runs, len(pairs)) == (len(wanted), len(blocks[0]))


@given(
    parts=st.lists(
        st.tuples(st.lists(st.integers(0, 4), min_size=1, max_size=4), block_lists()), max_size=3
    )
)
def test_moves_are_the_runs_of_their_layers(parts):
    moves, wanted = [], []
    for layers, blocks in parts:
        pairs = BlockPairs(*blocks)
        moves += [PageMove(layer, pairs) for layer in layers]
        for layer in layers:
            wanted += page_runs(
                SOURCE.layout, SOURCE.address, TARGET.layout, TARGET.address, layer, *blocks
            )
    assert list(move_runs(SOURCE, TARGET, moves)) == wanted


def test_a_table_is_its_runs():
    runs = [Run(1 << 47, 3, 5), Run(2, 1 << 47, 1 << 40), Run(7, 8, 9)]
    table = RunTable.of(runs)
    assert (list(table), len(table), table[1], table[1:]) == (runs, 3, runs[1], runs[1:])
    assert RunTable.of(table) is table
    assert list(RunTable.of([])) == [] and len(RunTable.of([])) == 0


@given(
    order=st.permutations(range(6)),
    wanted=st.lists(st.integers(0, 7), min_size=1, max_size=8),
    missing=st.integers(0, 5),
)
def test_latest_is_the_last_in_order(order, wanted, missing):
    events = dict.fromkeys(layer for layer in order if layer != missing)
    places = list(events)
    expected = None
    if all(layer in places for layer in wanted):
        expected = max(wanted, key=places.index)
    assert latest(events, wanted) == expected


class Library:
    """A driver's batched copy, in either form, that reads what it is given."""

    def __init__(self, result=0):
        self.result = result
        self.batches = []

    def batch(self, dsts, srcs, sizes, count, attributes, first, num_attributes, *rest):
        columns = [(ctypes.c_uint64 * count).from_address(at)[:] for at in (dsts, srcs, sizes)]
        self.batches.append(([*zip(*columns, strict=True)], num_attributes, rest[-1]))
        return self.result

    def cuGetErrorString(self, code, text):
        return 1


def make_driver(library, form):
    driver = Driver.__new__(Driver)
    driver._lib = library
    driver._batch_13 = library.batch if form == 13 else None
    driver._batch_12 = library.batch if form == 12 else None
    driver._batch_attributes, driver._batch_first = ctypes.c_int(), ctypes.c_size_t()
    return driver


@pytest.mark.parametrize("form", [12, 13])
def test_the_driver_reads_a_batch_where_it_lies(form):
    library = Library()
    runs = [Run(1 << 47, 3, 5), Run(2, (1 << 47) + 1, 1 << 40)]
    driver = make_driver(library, form)
    for given_runs in (runs, RunTable(np.array([[8], [9], [10]], np.int64))):
        assert driver.copy_batch(given_runs, 77)
    assert library.batches == [
        ([(1 << 47, 3, 5), (2, (1 << 47) + 1, 1 << 40)], 1, 77),
        ([(8, 9, 10)], 1, 77),
    ]


def test_a_driver_without_batches_says_so_and_one_that_fails_raises():
    runs = [Run(1, 2, 3), Run(4, 5, 6)]
    assert not make_driver(Library(), None).copy_batch(runs, 0)
    assert not make_driver(Library(801), 13).copy_batch(runs, 0)
    with pytest.raises(TransportError, match="cuMemcpyBatchAsync failed: CUDA error 700"):
        make_driver(Library(700), 13).copy_batch(runs, 0)
