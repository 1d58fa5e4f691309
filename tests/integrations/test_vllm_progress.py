"""Which blocks are given out, against bookkeeping page by page."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdrelay.core.hand_over import HandOver
from pdrelay.integrations.vllm.progress import Piece, Progress

LAYERS, BLOCKS = 3, 5


class Both:
    """Progress, and the native engine's HandOver, which keeps a number a layer."""

    def __init__(self) -> None:
        self.progress = Progress(LAYERS, BLOCKS)
        self.slow = HandOver(LAYERS, BLOCKS, needs_slots=True)
        self.slow.link_ready()
        self.given: list[tuple[int, int]] = []
        self.expected: list[tuple[int, int]] = []
        self.written: list[int] = []

    def give(self, piece: Piece | None) -> None:
        if piece is not None:
            blocks = range(piece.start, piece.stop)
            self.given += [(layer, block) for layer in piece.layers for block in blocks]

    def expect(self, pieces) -> None:
        for piece in pieces:
            self.expected += [(piece.layer, b) for b in range(piece.start, piece.stop)]

    def announce(self, first: int) -> None:
        if self.progress.first_block is None:
            blocks = list(range(50 + first, 50 + BLOCKS))
            self.progress.announce(first, blocks)
            self.expect(self.slow.set_slots(first, blocks))
            if not self.progress.in_step:
                self.give(self.progress.take_rest())

    def check(self) -> None:
        assert sorted(self.given) == sorted(self.expected)
        assert len(set(self.given)) == len(self.given)
        assert self.progress.all_ready == self.slow.all_ready
        assert self.progress.all_sent == (self.slow.slots_known and self.slow.all_sent)


STEP = st.tuples(
    st.just("step"),
    st.integers(0, BLOCKS),
    st.permutations(range(LAYERS)),
    st.lists(st.booleans(), min_size=LAYERS, max_size=LAYERS),  # taken behind this layer
    st.one_of(st.none(), st.tuples(st.integers(0, LAYERS - 1), st.integers(0, BLOCKS))),
)
EVENTS = st.lists(
    st.one_of(STEP, st.tuples(st.just("announce"), st.integers(0, BLOCKS)), st.just(("rewind",))),
    max_size=8,
)


@settings(max_examples=300)
@given(events=EVENTS)
def test_as_page_by_page(events):
    both = Both()
    for event in events:
        if event[0] == "announce":
            both.announce(event[1])
        elif event[0] == "rewind":
            both.progress.rewind()
            both.slow.rewind()
        else:
            _, ready, order, takes, announced = event
            both.progress.begin_step(ready)
            for i, layer in enumerate(order):
                if announced is not None and announced[0] == i:
                    both.announce(announced[1])
                both.expect(both.slow.mark_ready(layer, ready))
                if takes[i]:
                    due = both.progress.num_due(i + 1)
                    before = len(both.given)
                    both.give(both.progress.take(order[: i + 1]))
                    assert len(both.given) - before == due
            both.give(both.progress.end_step(order))
        both.check()


def test_a_step_that_never_ends_counts_for_nothing():
    progress = Progress(LAYERS, BLOCKS)
    progress.announce(0, list(range(BLOCKS)))
    progress.begin_step(BLOCKS)
    assert progress.take([0]) == Piece([0], 0, BLOCKS)
    progress.abandon_step()
    assert progress.take_rest() is None
    assert not progress.all_sent and not progress.all_ready
    progress.begin_step(BLOCKS)
    assert progress.end_step([0, 1, 2]) == Piece([0, 1, 2], 0, BLOCKS)
    assert progress.all_sent and progress.all_ready


@pytest.mark.parametrize("first", [0, 2])
def test_destinations_are_those_of_the_announced_blocks(first):
    progress = Progress(LAYERS, BLOCKS)
    progress.announce(first, list(range(70 + first, 70 + BLOCKS)))
    assert progress.destinations(3, 5) == [73, 74]
