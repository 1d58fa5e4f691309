from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import given

from pdrelay.core.hand_over import HandOver


def actions(num_layers, num_blocks):
    marks = [
        st.tuples(st.just("ready"), st.integers(0, num_layers - 1), st.integers(0, num_blocks))
        for _ in range(12)
    ]
    return st.tuples(*marks)


@given(st.data(), st.integers(1, 4), st.integers(1, 9), st.booleans())
def test_every_missing_page_goes_once_in_any_order(data, num_layers, num_blocks, needs_slots):
    first_block = data.draw(st.integers(0, num_blocks))
    steps = list(data.draw(actions(num_layers, num_blocks)))
    steps += [("ready", layer, num_blocks) for layer in range(num_layers)]
    for extra in ("slots", "link"):
        steps.insert(data.draw(st.integers(0, len(steps))), (extra,))
    hand_over = HandOver(num_layers, num_blocks, needs_slots=needs_slots)
    dst = [100 + i for i in range(first_block, num_blocks)]
    sent: list[tuple[int, int]] = []
    linked = slots = False
    for step in steps:
        if step[0] == "slots":
            slots = True
            pieces = hand_over.set_slots(first_block, dst)
        elif step[0] == "link":
            linked = True
            pieces = hand_over.link_ready()
        else:
            pieces = hand_over.mark_ready(step[1], step[2])
        assert not pieces or (linked and (slots or not needs_slots))
        for piece in pieces:
            sent += [(piece.layer, block) for block in range(piece.start, piece.stop)]
            if needs_slots:
                assert hand_over.destinations(piece) == [
                    100 + i for i in range(piece.start, piece.stop)
                ]
            else:
                assert hand_over.destinations(piece) == []
    assert hand_over.all_sent
    start = first_block if needs_slots else 0
    expected = [(layer, block) for layer in range(num_layers) for block in range(start, num_blocks)]
    assert sorted(sent) == expected


def test_nothing_to_send_when_the_consumer_has_it_all():
    hand_over = HandOver(2, 3, needs_slots=True)
    assert hand_over.link_ready() == []
    assert hand_over.set_slots(3, []) == []
    assert hand_over.all_sent
