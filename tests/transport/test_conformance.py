"""What every transport keeps. One suite for all of them."""

from __future__ import annotations

import itertools
import os
import random
import select
import threading
import time

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transport_kit import (
    ALL,
    DEADLINE_S,
    Kit,
    Transfer,
    assert_canaries,
    make_keys,
    make_layout,
    open_fds,
)

from pdrelay.errors import TransportError
from pdrelay.transport.base import Arrived, Descriptor, Sent, TransferFailed
from pdrelay.transport.checksum import checksum


@pytest.fixture(params=ALL)
def kit(request):
    with Kit(request.param) as kit:
        yield kit


def test_a_transfer_moves_exactly_its_pages(kit):
    p, d = kit.pair()
    transfer = Transfer(p.connect(d), p, d, "a", [3, 4, 5, 9, 1], [7, 8, 2, 3, 20])
    sent, arrived = transfer.run()
    transfer.assert_moved()
    assert_canaries(d, transfer.dst)
    for mode in ("sample", "full"):
        assert checksum(p.pages, transfer.src, mode) == checksum(d.pages, transfer.dst, mode)
    expected = 5 * p.layout.block_bytes
    assert sent.num_bytes == arrived.num_bytes == expected
    assert sent.transport == arrived.transport == kit.name
    assert 0 < sent.start_ns <= sent.end_ns <= time.monotonic_ns()
    assert 0 < arrived.start_ns <= arrived.end_ns <= time.monotonic_ns()
    assert 0 < sent.busy_ns <= sent.end_ns - sent.start_ns
    assert sent.num_pieces >= p.layout.num_layers


def test_layer_by_layer_in_chunks(kit):
    p, d = kit.pair()
    transfer = Transfer(p.connect(d), p, d, "a", range(10), range(10, 20)).expect().begin()
    for start, stop in ((0, 3), (3, 4), (4, 10)):
        for layer in range(p.layout.num_layers):
            transfer.send(layer, start, stop)
    sent, arrived = transfer.finish().complete()
    transfer.assert_moved()
    assert_canaries(d, transfer.dst)
    assert sent.num_bytes == arrived.num_bytes == 10 * p.layout.block_bytes


def test_late_slots_whole_layers_at_the_end_in_any_order(kit):
    p, d = kit.pair()
    transfer = Transfer(p.connect(d), p, d, "a", range(6), [5, 3, 1, 0, 2, 4]).begin().expect()
    for layer in (2, 0, 1):
        transfer.send(layer)
    transfer.finish().complete()
    transfer.assert_moved()


def test_blocks_that_the_consumer_has_are_left_alone(kit):
    p, d = kit.pair()
    transfer = Transfer(p.connect(d), p, d, "a", range(8), [11, 12, 13], first=5)
    sent, arrived = transfer.run()
    transfer.assert_moved()
    assert_canaries(d, transfer.dst)
    assert sent.num_bytes == arrived.num_bytes == 3 * p.layout.block_bytes


def test_two_transfers_interleaved_on_one_link(kit):
    p, d = kit.pair()
    link = p.connect(d)
    a = Transfer(link, p, d, "a", range(4), range(8, 12)).expect().begin()
    b = Transfer(link, p, d, "b", range(4, 9), range(13, 18)).expect().begin()
    for layer in range(p.layout.num_layers):
        for transfer in (a, b):
            transfer.send(layer, 0, 2)
        for transfer in (b, a):
            transfer.send(layer, 2, None)
    b.finish()
    a.finish()
    for transfer in (a, b):
        sent, arrived = transfer.complete()
        transfer.assert_moved()
        assert sent.num_bytes == arrived.num_bytes == len(transfer.src) * p.layout.block_bytes
    assert_canaries(d, a.dst, b.dst)


def test_two_producers_to_one_consumer(kit):
    d = kit.side("decode-0")
    producers = [kit.side(f"prefill-{i}", seed=i) for i in range(2)]
    transfers = [
        Transfer(p.connect(d), p, d, f"t{i}", range(5), range(5 * i, 5 * i + 5)).expect().begin()
        for i, p in enumerate(producers)
    ]
    for layer in range(d.layout.num_layers):
        for transfer in transfers:
            transfer.send(layer)
    for transfer in transfers:
        transfer.finish().complete()
        transfer.assert_moved()
    assert_canaries(d, *(t.dst for t in transfers))


def test_one_producer_to_two_consumers_of_other_sizes(kit):
    p = kit.side("prefill-0", seed=1)
    consumers = [kit.side(f"decode-{i}", make_layout(num_blocks=n)) for i, n in enumerate((8, 40))]
    transfers = [
        Transfer(p.connect(d), p, d, d.name, [i, i + 1], [d.layout.num_blocks - 1, 2])
        .expect()
        .begin()
        for i, d in enumerate(consumers)
    ]
    for layer in range(p.layout.num_layers):
        for transfer in transfers:
            transfer.send(layer)
    for transfer, d in zip(transfers, consumers, strict=True):
        transfer.finish().complete()
        transfer.assert_moved()
        assert_canaries(d, transfer.dst)


def test_many_transfers_one_after_the_other(kit):
    p, d = kit.pair()
    link = p.connect(d)
    rng = random.Random(7)
    for number in range(40):
        count = rng.randint(1, 12)
        src, dst = (rng.sample(range(p.layout.num_blocks), count) for _ in range(2))
        transfer = Transfer(link, p, d, f"t{number}", src, dst)
        transfer.run()
        transfer.assert_moved()


@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
@pytest.mark.parametrize("name", ALL)
def test_random_permutations_equal_a_plain_copy(name, data):
    layout = make_layout(num_blocks=data.draw(st.integers(1, 16)))
    with Kit(name) as kit:
        p, d = kit.pair(p=layout, d=layout)
        src = data.draw(st.permutations(range(layout.num_blocks)))
        dst = data.draw(st.permutations(range(layout.num_blocks)))
        count = data.draw(st.integers(1, layout.num_blocks))
        src, dst = src[:count], dst[:count]
        first = data.draw(st.integers(0, count - 1))
        cuts = sorted(data.draw(st.sets(st.integers(first, count), max_size=3)) | {first, count})
        expected = d.pages.array.copy()
        expected[:, dst[first:]] = p.pages.array[:, src[first:]]
        transfer = Transfer(p.connect(d), p, d, "t", src, dst[first:], first=first)
        transfer.expect().begin()
        for start, stop in itertools.pairwise(cuts):
            for layer in range(layout.num_layers):
                transfer.send(layer, start, stop)
        transfer.finish().complete()
        assert np.array_equal(d.pages.array, expected)


# ---- abort


@pytest.mark.parametrize("side", ["producer", "consumer", "both"])
@pytest.mark.parametrize("phase", ["expected", "begun", "mid", "finished", "sent", "arrived"])
def test_abort_at_every_phase_is_silent_and_leaves_the_link_usable(kit, side, phase):
    p, d = kit.pair()
    link = p.connect(d)
    doomed = Transfer(link, p, d, "doomed", range(6), range(6)).expect()
    phases = ["expected", "begun", "mid", "finished", "sent", "arrived"]
    reached = phases.index(phase)
    if reached >= 1:
        doomed.begin()
    if reached >= 2:
        doomed.send(0)
    if reached >= 3:
        doomed.send(1)
        doomed.send(2)
        doomed.finish()
    if reached >= 4:
        p.wait(Sent, "doomed")
    if reached >= 5:
        doomed.commit()
        d.wait(Arrived, "doomed")
    p.news.clear()
    d.news.clear()
    for _ in range(2):  # idempotent
        if side in ("producer", "both"):
            link.abort("doomed")
        if side in ("consumer", "both"):
            d.transport.abort("doomed")
    doomed.commit()  # late: unknown by now, or never to be completed
    after = Transfer(link, p, d, "after", range(6, 12), range(12, 18))
    after.run()
    after.assert_moved()
    assert_canaries(d, doomed.dst, after.dst)
    if side in ("consumer", "both"):
        assert d.news_of("doomed") == []
    if side in ("producer", "both") and phase in ("expected", "begun", "mid"):
        assert p.news_of("doomed") == []


def test_abort_of_what_was_never_known(kit):
    p, d = kit.pair()
    link = p.connect(d)
    link.abort("nobody")
    d.transport.abort("nobody")
    d.transport.commit("nobody", 3)
    assert p.news_of("nobody") == d.news_of("nobody") == []


def test_after_the_producers_abort_it_sends_no_more(kit):
    p, d = kit.pair()
    link = p.connect(d)
    transfer = Transfer(link, p, d, "a", range(6), range(6)).expect().begin()
    transfer.send(0)
    link.abort("a")
    with pytest.raises(TransportError):
        transfer.send(1)
    with pytest.raises(TransportError):
        transfer.finish()
    other = Transfer(link, p, d, "b", range(6), range(6, 12))
    other.run()  # whatever was on its way has passed by now
    assert (d.pages.array[1:, :6] == 0xA5).all()


def test_after_the_consumers_abort_nothing_writes_its_blocks(kit):
    """Blocks of an aborted transfer are reused at once, while its bytes are still coming."""
    big = make_layout(num_blocks=32, block_size=256)
    p, d = kit.pair(p=big, d=big)
    link = p.connect(d)
    for number in range(12):
        transfer = Transfer(link, p, d, f"t{number}", range(16), range(16)).expect().begin()
        transfer.send(0)
        if kit.name not in ("tcp",):
            # Here the engine's thread stores: its own abort ends it.
            link.abort(transfer.id)
        d.transport.abort(transfer.id)
        d.pages.array[:, :16] = number
        if kit.name == "tcp":
            transfer.send(1)
            transfer.send(2)
            transfer.finish()
            p.wait(Sent, transfer.id)
        fence = Transfer(link, p, d, f"fence{number}", [0], [31])
        fence.run()
        assert (d.pages.array[:, :16] == number).all()


def test_a_transfer_id_can_be_used_again_after_abort(kit):
    p, d = kit.pair()
    link = p.connect(d)
    transfer = Transfer(link, p, d, "a", range(6), range(6)).expect().begin()
    link.abort("a")
    d.transport.abort("a")
    transfer.run()
    transfer.assert_moved()


# ---- news


def test_commit_before_the_news_of_arrival_is_polled_once(kit):
    p, d = kit.pair()
    transfer = Transfer(p.connect(d), p, d, "a", range(6), range(6))
    transfer.run()
    transfer.commit()
    transfer.commit()
    assert len(d.news_of("a")) == 1
    assert len(p.news_of("a")) == 1


def test_fileno_is_readable_exactly_while_there_is_news(kit):
    p, d = kit.pair()
    links = [p.connect(d) for _ in range(2)]
    transfers = [
        Transfer(link, p, d, f"t{i}", range(3), range(3 * i, 3 * i + 3)).expect().begin()
        for i, link in enumerate(links)
    ]
    assert not readable(p) and not readable(d)
    for transfer in transfers:
        transfer.send_all().finish()
    seen = []
    while len(seen) < 2:
        assert select.select([p.transport.fileno()], [], [], DEADLINE_S)[0], "no news"
        # Poll one link only: the other one's news must keep the descriptor readable.
        seen += links[len(seen)].poll()
    assert not readable(p)
    for transfer in transfers:
        transfer.commit()
    arrived = []
    while len(arrived) < 2:
        assert select.select([d.transport.fileno()], [], [], DEADLINE_S)[0], "no news"
        arrived += d.transport.poll()
    assert not readable(d)


def readable(side):
    return bool(select.select([side.transport.fileno()], [], [], 0)[0])


# ---- refusals


@pytest.mark.parametrize("change", ["num_layers", "block_size", "num_kv_heads", "head_dim"])
def test_other_layouts_are_refused(kit, change):
    p, d = kit.pair()
    other = msgspec.structs.replace(d.layout, **{change: getattr(d.layout, change) * 2})
    descriptor = d.transport.descriptor()
    fds = tuple(os.dup(fd) for fd in descriptor.fds)
    before = open_fds()
    with pytest.raises(TransportError, match="layouts differ"):
        p.transport.connect(other, Descriptor(descriptor.data, fds))
    assert open_fds() <= before - {str(fd) for fd in fds}


@pytest.mark.parametrize("data", [b"", b"\xc1", b"\x80", b"\x81\xa4type\xa7unknown", b"\xff" * 99])
def test_bad_descriptors_are_refused_and_their_fds_closed(kit, data):
    p, d = kit.pair()
    fd = os.open(os.devnull, os.O_RDONLY)
    with pytest.raises(TransportError):
        p.transport.connect(d.layout, Descriptor(data, (fd,)))
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_bad_arguments_are_refused_and_write_nothing(kit):
    p, d = kit.pair()
    link = p.connect(d)
    transfer = Transfer(link, p, d, "a", range(4), range(4)).expect().begin()
    slots = p.transport.capabilities.needs_slots
    with pytest.raises(TransportError):
        link.send("a", 3, 0, [0], [0] if slots else [])
    with pytest.raises(TransportError):
        link.send("a", -1, 0, [0], [0] if slots else [])
    with pytest.raises(TransportError):
        link.send("a", 0, 0, [24], [0] if slots else [])
    with pytest.raises(TransportError):
        link.send("a", 0, 0, [-1], [0] if slots else [])
    if slots:
        with pytest.raises(TransportError):
            link.send("a", 0, 0, [0, 1], [0])
    with pytest.raises(TransportError):
        link.begin("a", transfer.keys)
    with pytest.raises(TransportError):
        link.send("unknown", 0, 0, [0], [0] if slots else [])
    with pytest.raises(TransportError):
        link.finish("unknown")
    with pytest.raises(TransportError):
        transfer.expect()
    with pytest.raises(TransportError):
        d.transport.expect("b", 0, [24], make_keys("b", 1))
    assert_canaries(d)
    transfer.send_all().finish().complete()
    transfer.assert_moved()


@pytest.mark.parametrize("num_pages", [0, 11, 13, 10**9, -1])
def test_a_commit_of_another_number_of_pages_fails(kit, num_pages):
    p, d = kit.pair()
    transfer = Transfer(p.connect(d), p, d, "a", range(4), range(4)).expect().begin().send_all()
    transfer.finish()
    p.wait(Sent, "a")
    d.transport.commit("a", num_pages)
    failed = d.wait(TransferFailed, "a")
    assert "12" in failed.message
    assert len(d.news_of("a")) == 1


# ---- ends


def test_a_closed_consumer_fails_or_is_survived(kit):
    """The producer goes on until it is told, or hears of it by itself; it never crashes."""
    p, d = kit.pair()
    link = p.connect(d)
    warm = Transfer(link, p, d, "warm", [0], [0])
    warm.run()
    transfer = Transfer(link, p, d, "a", range(6), range(6)).expect().begin()
    transfer.send(0)
    d.close()
    if kit.name == "mapped":
        transfer.send(1)
        transfer.send(2)
        transfer.finish()
        p.wait(Sent, "a")
    else:
        try:
            for layer in (1, 2):
                transfer.send(layer)
            transfer.finish()
        except TransportError:
            pass
        else:
            threaded = kit.name == "tcp" or kit.where  # it may have been sent before
            p.wait((TransferFailed, Sent) if threaded else TransferFailed, "a")
    link.abort("a")
    other = kit.side("decode-1")
    again = Transfer(p.connect(other), p, other, "b", range(6), range(6))
    again.run()
    again.assert_moved()


def test_a_closed_producer_leaves_the_consumer_usable(kit):
    p, d = kit.pair()
    transfer = Transfer(p.connect(d), p, d, "a", range(6), range(6)).expect().begin()
    transfer.send(0)
    p.close()
    d.poll()
    d.transport.abort("a")
    other = kit.side("prefill-1", seed=5)
    again = Transfer(other.connect(d), other, d, "b", range(6), range(6, 12))
    again.run()
    again.assert_moved()


def test_use_after_close_raises_or_is_ignored(kit):
    p, d = kit.pair()
    link = p.connect(d)
    transfer = Transfer(link, p, d, "a", range(6), range(6)).expect().begin()
    transfer.send(0)
    link.close()
    link.close()
    with pytest.raises(TransportError):
        link.begin("b", make_keys("b", 1))
    with pytest.raises(TransportError):
        transfer.send(1)
    link.abort("a")
    assert link.poll() == []
    d.transport.close()
    d.transport.close()


@pytest.mark.parametrize("name", ALL)
def test_nothing_is_left_open(name):
    before_fds, before_threads = open_fds(), set(threading.enumerate())
    for _ in range(3):
        with Kit(name) as kit:
            p, d = kit.pair()
            link = p.connect(d)
            Transfer(link, p, d, "a", range(6), range(6)).run()
            p.connect(d)
            Transfer(link, p, d, "open", range(6), range(6, 12)).expect().begin().send(0)
    assert open_fds() <= before_fds
    assert set(threading.enumerate()) == before_threads
