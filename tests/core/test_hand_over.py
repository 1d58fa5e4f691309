from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import given

from pdrelay.core.hand_over import HandOver, Piece


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


@given(st.data(), st.integers(1, 3), st.integers(1, 30), st.integers(1, 5))
def test_each_page_goes_once_and_by_one_way(data, num_layers, num_tokens, block_size):
    """Chunks of any size, slots and link at any time, steps fused or not, and read late; a
    preemption starts over behind any known prefix."""
    num_blocks = -(-num_tokens // block_size)
    first_block = data.draw(st.integers(0, num_blocks))
    dst = [100 + i for i in range(first_block, num_blocks)]
    hand_over = HandOver(num_layers, num_blocks, needs_slots=True)
    sent, stored_tokens, fused_blocks = [], [], []
    when = {what: data.draw(st.integers(0, 8)) for what in ("slots", "link")}
    unread = []

    def note(pieces):
        sent.extend((p.layer, block) for p in pieces for block in range(p.start, p.stop))

    def turn(number):
        if number == when["link"]:
            note(hand_over.link_ready())
        if number == when["slots"]:
            note(hand_over.set_slots(first_block, dst))

    computed, number, preempted = 0, 0, data.draw(st.booleans())
    while computed < num_tokens:
        turn(number)
        stop = data.draw(st.integers(computed + 1, num_tokens))
        fused = None
        if data.draw(st.booleans()):
            fused = hand_over.fuse(computed, stop, num_tokens, block_size)
        if fused is not None:
            assert computed <= fused.start < fused.stop <= stop
            assert hand_over.slots(fused, block_size).tolist() == [
                (100 + token // block_size) * block_size + token % block_size
                for token in range(fused.start, fused.stop)
            ]
            stored_tokens.extend(range(fused.start, fused.stop))
            fused_blocks.extend(fused.blocks)
            unread.append(fused)
            assert not hand_over.all_sent
        ready = num_blocks if stop == num_tokens else stop // block_size
        for layer in range(num_layers):
            note(hand_over.mark_ready(layer, ready))
        while unread and data.draw(st.booleans()):
            unread.pop()
            hand_over.stored()
        computed, number = stop, number + 1
        if preempted and number == 3:
            hand_over.rewind()
            # A prefix leaves a token to compute.
            known = min(computed, num_tokens - 1) // block_size
            computed = data.draw(st.integers(0, known)) * block_size
    for later in range(number, 9):
        turn(later)
    assert hand_over.all_sent is not bool(unread)
    for _ in unread:
        hand_over.stored()
    assert hand_over.all_sent
    fused = [(layer, block) for layer in range(num_layers) for block in fused_blocks]
    expected = [(layer, b) for layer in range(num_layers) for b in range(first_block, num_blocks)]
    assert sorted(sent + fused) == expected
    for block in fused_blocks:  # all of its tokens, and only full blocks
        tokens = range(block * block_size, (block + 1) * block_size)
        assert set(tokens) <= set(stored_tokens)
        assert tokens.stop <= num_tokens


def test_a_prompt_in_one_step_is_fused_but_for_its_last_part():
    hand_over = HandOver(2, 3, needs_slots=True)
    hand_over.link_ready()
    hand_over.set_slots(0, [7, 5, 3])
    fused = hand_over.fuse(0, 11, 11, 4)
    assert (fused.start, fused.stop, fused.blocks) == (0, 8, range(2))
    assert hand_over.slots(fused, 4).tolist() == [28, 29, 30, 31, 20, 21, 22, 23]
    assert [hand_over.mark_ready(layer, 3) for layer in range(2)] == [
        [Piece(layer, 2, 3)] for layer in range(2)
    ]
    assert not hand_over.all_sent
    hand_over.stored()
    assert hand_over.all_sent


def test_a_block_over_two_steps_is_fused_only_if_both_do():
    for both in (True, False):
        hand_over = HandOver(1, 2, needs_slots=True)
        hand_over.link_ready()
        hand_over.set_slots(0, [0, 1])
        assert hand_over.fuse(0, 6, 8, 4).blocks == range(1)
        assert hand_over.mark_ready(0, 1) == []
        if both:
            assert hand_over.fuse(6, 8, 8, 4).blocks == range(1, 2)
        assert hand_over.mark_ready(0, 2) == ([] if both else [Piece(0, 1, 2)])


def test_a_chunk_that_starts_in_a_block_of_which_nothing_was_fused_leaves_it():
    hand_over = HandOver(1, 2, needs_slots=True)
    hand_over.link_ready()
    hand_over.mark_ready(0, 0)
    hand_over.set_slots(0, [0, 1])
    fused = hand_over.fuse(2, 8, 8, 4)
    assert (fused.start, fused.blocks) == (4, range(1, 2))
    assert hand_over.mark_ready(0, 2) == [Piece(0, 0, 1)]
