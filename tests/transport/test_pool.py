"""Transport pool: deduplication, eviction, a full pool, deaths, and the prefix store."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import msgspec
import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from transport_kit import CANARY, Kit, Transfer, make_keys, make_layout, open_fds

from pdrelay.errors import ConfigError, TransportError
from pdrelay.transport.base import Sent, TransferFailed
from pdrelay.transport.pool import PoolHandle, PoolTransport, create_pool
from pdrelay.transport.registry import TransportOptions, create_transport


@pytest.fixture
def kit():
    with Kit("pool", num_slots=16) as kit:
        yield kit
        if kit.pool is not None:
            check(kit)


def forget(link):
    """Its process died: nothing of it is let go of in an orderly way."""
    for transfer in link._open.all():
        link._open.pop(transfer.transfer_id)


def check(kit):
    store = kit.pool.open()
    store.check_integrity()
    stats = store.stats()
    store.close()
    assert stats.num_free + stats.num_writing + stats.num_ready == stats.num_slots
    return stats


def test_what_the_pool_has_is_not_written_again(kit):
    p, d = kit.pair()
    link = p.connect(d)
    keys = make_keys("shared", 6)
    first, _ = Transfer(link, p, d, "a", range(6), range(6), keys=keys).run()
    second, arrived = Transfer(link, p, d, "b", range(6), range(6, 12), keys=keys).run()
    assert first.num_bytes == 6 * p.layout.block_bytes
    assert second.num_bytes == second.num_pieces == 0
    assert arrived.num_bytes == 6 * p.layout.block_bytes
    assert np.array_equal(d.pages.array[:, 6:12], p.pages.array[:, :6])
    longer = Transfer(link, p, d, "c", range(8), range(12, 20), keys=keys + make_keys("more", 2))
    third, _ = longer.run()
    assert third.num_bytes == 2 * p.layout.block_bytes
    longer.assert_moved()
    stats = check(kit)
    assert (stats.num_ready, stats.num_leases, stats.num_pinned) == (8, 0, 0)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_other_bytes_under_the_same_key_arrive_as_they_were_sent(kit, layer):
    """Rounding may differ between instances: the consumer still gets its producer's pages."""
    one, d = kit.pair()
    other = kit.side("prefill-1", seed=1)
    other.pages.array[layer, 2, 5] ^= 1
    keys = make_keys("shared", 4)
    Transfer(one.connect(d), one, d, "a", range(4), range(4), keys=keys).run()
    transfer = Transfer(other.connect(d), other, d, "b", range(4), range(4, 8), keys=keys)
    sent, _ = transfer.run()
    transfer.assert_moved()
    assert sent.num_bytes == 3 * d.layout.layer_block_bytes  # the one block, in all its layers
    stats = check(kit)
    assert (stats.num_ready, stats.num_pinned) == (4, 0)  # the odd one is gone with its transfer
    again = Transfer(one.links[0], one, d, "c", range(4), range(8, 12), keys=keys)
    assert again.run()[0].num_bytes == 0
    again.assert_moved()


def test_two_writers_of_one_key_do_not_wait_for_each_other(kit):
    one, d = kit.pair()
    other = kit.side("prefill-1", seed=2)
    keys = make_keys("shared", 4)
    a = Transfer(one.connect(d), one, d, "a", range(4), range(4), keys=keys).expect().begin()
    b = Transfer(other.connect(d), other, d, "b", range(4), range(4, 8), keys=keys)
    b.expect().begin()
    for side in (a, b):
        side.send(0)
    for side in (b, a):
        side.send(1)
        side.send(2)
        side.finish()
    for side in (a, b):
        side.complete()
        side.assert_moved()
    assert check(kit).num_ready == 4


def test_partial_last_blocks_leave_the_pool_with_their_transfer(kit):
    p, d = kit.pair()
    keys = make_keys("a", 3, tail=True)
    transfer = Transfer(p.connect(d), p, d, "a", range(3), range(3), keys=keys)
    transfer.run()
    transfer.assert_moved()
    assert check(kit).num_ready == 2
    assert d.transport.prefix_store.match(keys) == 2


def test_the_least_recently_used_leaves_and_of_a_prefix_its_end(kit):
    p, d = kit.pair()
    link = p.connect(d)
    old, new = make_keys("old", 6), make_keys("new", 6)
    Transfer(link, p, d, "a", range(6), range(6), keys=old).run()
    Transfer(link, p, d, "b", range(6), range(6), keys=new).run()
    d.transport.prefix_store.load(old, range(12, 18))  # a use: now `new` is the older one
    Transfer(link, p, d, "c", range(8), range(8), keys=make_keys("third", 8)).run()
    assert d.transport.prefix_store.match(old) == 6
    assert d.transport.prefix_store.match(new) == 2


def test_a_full_pool_fails_the_transfer_with_a_reason_and_recovers(kit):
    p, d = kit.pair()
    link = p.connect(d)
    holder = Transfer(link, p, d, "holder", range(12), range(12)).expect().begin()
    holder.send_all().finish()
    p.wait(Sent, "holder")  # pinned until taken
    extra = Transfer(link, p, d, "extra", range(5), range(12, 17)).expect().begin()
    for layer in range(3):
        extra.send(layer)
    extra.finish()
    failed = p.wait(TransferFailed, "extra")
    assert "full" in failed.message and "16 slots" in failed.message
    assert len(p.news_of("extra")) == 1
    d.transport.abort("extra")
    holder.complete()
    holder.assert_moved()
    again = Transfer(link, p, d, "again", range(5), range(12, 17))
    again.run()
    again.assert_moved()


def test_a_prompt_larger_than_the_pool_fails(kit):
    p, d = kit.pair()
    transfer = Transfer(p.connect(d), p, d, "a", range(17), range(17)).expect().begin()
    transfer.send(0)
    assert "full" in p.wait(TransferFailed, "a").message
    assert check(kit).num_free == 16


def test_a_waiting_prompt_holds_nothing(kit):
    p, d = kit.pair()
    Transfer(p.connect(d), p, d, "a", range(6), range(6)).expect().begin()
    stats = check(kit)
    assert (stats.num_free, stats.num_leases) == (16, 0)


def test_finished_pages_stay_pinned_until_the_consumer_took_them(kit):
    p, d = kit.pair()
    link = p.connect(d)
    slow = Transfer(link, p, d, "slow", range(6), range(6)).expect().begin().send_all().finish()
    p.wait(Sent, "slow")
    for number in range(8):
        Transfer(link, p, d, f"t{number}", range(6, 14), range(6, 14)).run()
    slow.complete()
    slow.assert_moved()


def test_the_consumer_skipped_a_prefix_the_producer_sent(kit):
    """Without slots the producer cannot know: it puts everything, the consumer takes the rest."""
    p, d = kit.pair()
    keys = make_keys("a", 8)
    link = p.connect(d)
    transfer = (
        Transfer(link, p, d, "a", range(8), [20, 21, 22], first=5, keys=keys).expect().begin()
    )
    for layer in range(3):
        link.send("a", layer, 0, range(8), [])
    transfer.finish()
    sent, arrived = transfer.complete()
    transfer.assert_moved()
    assert sent.num_bytes == 8 * p.layout.block_bytes
    assert arrived.num_bytes == 3 * p.layout.block_bytes
    assert check(kit).num_pinned == 0


def test_abort_after_the_producer_finished_lets_go(kit):
    """The engine's consumer aborts a second time when the producer answered."""
    p, d = kit.pair()
    link = p.connect(d)
    transfer = Transfer(link, p, d, "a", range(6), range(6)).expect().begin()
    transfer.send(0)
    d.transport.abort("a")  # nothing to let go of yet but the lease
    transfer.send_all()
    transfer.finish()
    p.wait(TransferFailed, "a")
    late = Transfer(link, p, d, "b", range(6), range(6)).expect().begin()
    d.transport.abort("b")
    late.send_all().finish()
    p.wait(Sent, "b")
    d.transport.abort("b")
    stats = check(kit)
    assert (stats.num_pinned, stats.num_leases, stats.num_writing) == (0, 0, 0)


def test_abort_while_the_pages_are_being_taken(kit):
    """The blocks are reused as soon as `abort` returned: the taking thread must keep off."""
    p, d = kit.pair()
    link = p.connect(d)
    transfer = Transfer(link, p, d, "a", range(6), range(6)).expect().begin().send_all().finish()
    p.wait(Sent, "a")
    reached, go = threading.Event(), threading.Event()
    take = d.transport._store.take

    def slow_take(*arguments):
        slots = take(*arguments)
        reached.set()
        assert go.wait(10)
        return slots

    d.transport._store.take = slow_take
    transfer.commit()
    assert reached.wait(10)
    d.transport.abort("a")
    d.pages.array[:, :6] = 77
    go.set()
    Transfer(link, p, d, "fence", [0], [10]).run()
    assert (d.pages.array[:, :6] == 77).all()
    assert d.news_of("a") == []
    assert check(kit).num_pinned == 0


def test_keys_of_other_pages_are_refused(kit):
    p, d = kit.pair()
    transfer = Transfer(p.connect(d), p, d, "a", range(4), range(4))
    d.transport.expect("a", 0, range(4), make_keys("something else", 4))
    transfer.begin().send_all().finish()
    p.wait(Sent, "a")
    transfer.commit()
    assert "other pages" in d.wait(TransferFailed, "a").message
    assert (d.pages.array == CANARY).all()
    assert check(kit).num_pinned == 0


def test_a_commit_before_the_pages_are_there_fails(kit):
    p, d = kit.pair()
    transfer = Transfer(p.connect(d), p, d, "a", range(4), range(4)).expect().begin()
    transfer.send(0)
    transfer.commit()
    assert "not in the shared pool" in d.wait(TransferFailed, "a").message


@pytest.mark.parametrize("keys", [[b"short"], [bytes(33)]])
def test_keys_of_another_length_are_refused(kit, keys):
    p, d = kit.pair()
    with pytest.raises(TransportError, match="32 bytes"):
        p.connect(d).begin("a", keys)
    with pytest.raises(TransportError):
        d.transport.expect("a", 0, [0], keys)


# ---- the prefix store


def test_prefixes_are_found_and_loaded_by_any_instance(kit):
    p, d = kit.pair()
    other = kit.side("prefill-1")
    keys = make_keys("a", 6)
    Transfer(p.connect(d), p, d, "a", range(6), range(6), keys=keys).run()
    store = other.transport.prefix_store
    assert store.match(keys) == 6
    assert store.match([*keys, *make_keys("b", 2)]) == 6
    assert store.match(make_keys("b", 2)) == store.match([]) == 0
    assert store.load(keys[:4], [9, 3, 4, 5]) == 4
    assert np.array_equal(other.pages.array[:, [9, 3, 4, 5]], p.pages.array[:, :4])
    assert store.load([*keys, *make_keys("b", 1)], range(7, 14)) == 6
    assert store.load(make_keys("b", 2), [0, 1]) == 0
    assert (other.pages.array[:, 14:] == CANARY).all()
    stats = check(kit)
    assert (stats.num_pinned, stats.num_leases) == (0, 0)


def test_pages_being_written_are_no_prefix_yet(kit):
    p, d = kit.pair()
    transfer = Transfer(p.connect(d), p, d, "a", range(3), range(3)).expect().begin().send_all()
    assert d.transport.prefix_store.match(transfer.keys) == 0
    transfer.finish().complete()
    assert d.transport.prefix_store.match(transfer.keys) == 3


# ---- deaths


@pytest.mark.parametrize("phase", ["mid", "finished"])
def test_a_dead_producers_slots_come_back(kit, phase):
    p, d = kit.pair()
    transfer = Transfer(p.connect(d), p, d, "a", range(6), range(6)).expect().begin()
    transfer.send(0)
    if phase == "finished":
        transfer.send(1)
        transfer.send(2)
        transfer.finish()
        p.wait(Sent, "a")
    kit.pool.reclaim(p.index)
    if phase == "mid":
        stats = check(kit)
        assert (stats.num_free, stats.num_leases) == (16, 0)
        forget(p.links[0])  # it is dead
    else:  # finished pages are the consumer's to take
        transfer.complete()
        transfer.assert_moved()
        assert check(kit).num_pinned == 0


def test_a_dead_consumers_pins_come_back(kit):
    p, d = kit.pair()
    transfer = Transfer(p.connect(d), p, d, "a", range(6), range(6)).expect().begin()
    transfer.send_all().finish()
    p.wait(Sent, "a")
    assert check(kit).num_pinned == 6
    kit.pool.reclaim(d.index)
    stats = check(kit)
    assert (stats.num_pinned, stats.num_ready, stats.num_leases) == (0, 6, 0)


def test_a_new_incarnation_frees_what_the_old_one_held(kit):
    p, d = kit.pair()
    transfer = Transfer(p.connect(d), p, d, "a", range(6), range(6)).expect().begin()
    transfer.send_all()
    again = PoolTransport(p.pages, kit.pool, p.index)
    assert check(kit).num_free == 16
    again.close()
    forget(p.links[0])


VICTIM = """
import os, sys
from pdrelay.core.kv_layout import KVLayout
from pdrelay.transport.base import Descriptor
from pdrelay.transport.pages import SharedPages
from pdrelay.transport.pool import PoolHandle, PoolTransport
import msgspec
fd, where = int(sys.argv[1]), sys.argv[4]
description, descriptor = map(bytes.fromhex, sys.argv[2:4])
handle = PoolHandle(fd, description)
store = handle.open()
layout = store.layout
pages = SharedPages.create(layout)
transport = PoolTransport(pages, handle, 7)
link = transport.connect(layout, Descriptor(descriptor))
keys = [bytes([i]) * 32 for i in range(6)]
link.begin("victim", keys)
link.send("victim", 0, 0, range(6), [])
if where == "inside":  # dies holding the lock, in the middle of a change
    inner = transport._store
    inner._touch = lambda slots: os.kill(os.getpid(), 9)
    link.send("victim", 1, 0, range(6), [])
    link.finish("victim")
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("where", ["inside", "outside"])
def test_a_killed_process_leaves_the_pool_usable(kit, where):
    p, d = kit.pair()
    Transfer(p.connect(d), p, d, "before", range(4), range(4)).run()
    descriptor = d.transport.descriptor().data
    arguments = [str(kit.pool.fd), kit.pool.description.hex(), descriptor.hex(), where]
    victim = subprocess.Popen(
        [sys.executable, "-c", VICTIM, *arguments],
        pass_fds=[kit.pool.fd],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        line = victim.stdout.readline()
        assert line == (b"" if where == "inside" else b"ready\n")
    finally:
        victim.kill()
        victim.communicate(timeout=10)
    kit.pool.reclaim(7)
    stats = check(kit)
    assert (stats.num_pinned, stats.num_leases, stats.num_writing) == (0, 0, 0)
    assert d.transport.prefix_store.match(make_keys("before", 4)) == 4
    for number in range(4):
        transfer = Transfer(p.links[0], p, d, f"after{number}", range(8), range(8))
        transfer.run()
        transfer.assert_moved()


# ---- the handle


def test_handles_that_do_not_fit_are_refused(kit):
    p = kit.side("prefill-0", seed=1)
    other = create_pool(make_layout(block_size=8), 4)
    before = open_fds()
    with pytest.raises(TransportError, match="layouts differ"):
        PoolTransport(p.pages, other, 0)
    with pytest.raises(TransportError, match="size"):
        PoolTransport(p.pages, PoolHandle(p.pages.fd, kit.pool.description), 0)
    with pytest.raises(TransportError, match="damaged"):
        PoolTransport(p.pages, PoolHandle(kit.pool.fd, b"\xc1"), 0)
    with pytest.raises(TransportError, match="cannot open"):
        PoolTransport(p.pages, PoolHandle(10**6, kit.pool.description), 0)
    empty = os.memfd_create("empty")
    os.ftruncate(empty, os.fstat(kit.pool.fd).st_size)
    with pytest.raises(TransportError, match="not a shared pool"):
        PoolTransport(p.pages, PoolHandle(empty, kit.pool.description), 0)
    os.close(empty)
    assert open_fds() <= before
    other.close()


@pytest.mark.parametrize("num_slots", [0, -1])
def test_pools_without_slots_are_refused(num_slots):
    with pytest.raises(ConfigError):
        create_pool(make_layout(), num_slots)


def test_impossible_pools_are_refused():
    with pytest.raises(TransportError, match="fewer slots"):
        create_pool(make_layout(), 2**60)


def test_the_registry_names_what_is_missing(kit):
    p = kit.side("prefill-0", seed=1)
    with pytest.raises(ConfigError, match="shared pool"):
        create_transport("pool", p.pages, "x", TransportOptions())


def test_a_locked_pool_is_an_error_after_the_deadline(kit):
    kit.pair()
    store = kit.pool.open(timeout_s=0.05)
    holder = kit.pool.open()
    with holder._locked(), pytest.raises(TransportError, match="locked"):
        store.match([bytes(32)])
    assert store.match([bytes(32)]) == 0
    store.close()
    holder.close()


# ---- any order of everything


class PoolMachine(RuleBasedStateMachine):
    """Random transfers of few keys over a small pool: what arrives is what was sent."""

    def __init__(self):
        super().__init__()
        self.kit = Kit("pool", num_slots=10)
        layout = make_layout(num_blocks=8, num_layers=2)
        self.producers = [self.kit.side(f"prefill-{i}", layout, seed=i) for i in range(2)]
        # Mostly the same bytes under the same keys, but not always.
        self.producers[1].pages.array[:, :6] = self.producers[0].pages.array[:, :6]
        self.consumer = self.kit.side("decode-0", layout)
        self.links = [p.connect(self.consumer) for p in self.producers]
        self.open = []
        self.count = 0

    def teardown(self):
        self.kit.__exit__()

    @rule(which=st.integers(0, 1), count=st.integers(1, 6), tail=st.booleans())
    def begin(self, which, count, tail):
        if len(self.open) >= 3:
            return
        self.count += 1
        keys = make_keys("machine", count)
        if tail:
            keys[-1] = make_keys(f"t{self.count}", count, tail=True)[-1]
        src = list(range(8 - count, 8)) if count < 3 else list(range(count))
        transfer = Transfer(
            self.links[which],
            self.producers[which],
            self.consumer,
            f"t{self.count}",
            src,
            range(count),
            keys=keys,
        )
        transfer.expect().begin()
        transfer.next_layer = 0
        self.open.append(transfer)

    @precondition(lambda self: self.open)
    @rule(which=st.integers(0, 2))
    def send(self, which):
        transfer = self.open[which % len(self.open)]
        if transfer.next_layer < transfer.num_layers:
            transfer.send(transfer.next_layer)
            transfer.next_layer += 1
        else:
            self.open.remove(transfer)
            transfer.finish()
            sent = [n for n in transfer.producer.news_of(transfer.id) if isinstance(n, Sent)]
            if sent:
                transfer.complete()
                transfer.assert_moved()
            else:
                transfer.consumer.transport.abort(transfer.id)

    @precondition(lambda self: self.open)
    @rule(which=st.integers(0, 2), first=st.booleans(), both=st.booleans())
    def abort(self, which, first, both):
        transfer = self.open.pop(which % len(self.open))
        sides = [transfer.link, transfer.consumer.transport]
        for side in sides if first else reversed(sides):
            side.abort(transfer.id)

    @rule()
    def reclaim_and_restart(self):
        """The second producer dies."""
        old = self.producers[1]
        self.kit.pool.reclaim(old.index)
        for transfer in [t for t in self.open if t.producer is old]:
            self.open.remove(transfer)
            self.consumer.transport.abort(transfer.id)
        forget(self.links[1])

    @invariant()
    def books_balance(self):
        if self.kit.pool is not None:
            stats = check(self.kit)
            if not self.open:
                assert (stats.num_pinned, stats.num_leases, stats.num_writing) == (0, 0, 0)


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=30, stateful_step_count=30, deadline=None)


def test_threads_hammer_one_pool(kit):
    """Two engines' worth of operations at once, from two views of the pool."""
    p, d = kit.pair()
    other = kit.side("prefill-1", seed=4)

    def work(side, seed):
        store = kit.pool.open()
        rng = random.Random(seed)
        name = f"w{seed}"
        for number in range(60):
            transfer_id = f"{name}.{number}"
            lease = store.open_lease(transfer_id, side.index, d.index)
            keys = make_keys("common", 4)[: rng.randint(1, 4)]
            placed = store.place(lease, 0, keys, side.index, private=[False] * len(keys))
            store.finish(lease, [place.slot for place in placed if not place.shared])
            assert store.take(transfer_id, 0, keys) == [place.slot for place in placed]
            store.release(transfer_id)
        store.close()

    with ThreadPoolExecutor(2) as executor:
        for future in [executor.submit(work, p, 1), executor.submit(work, other, 2)]:
            future.result(timeout=20)
    assert check(kit).num_pinned == 0


def test_the_description_is_msgpack(kit):
    kit.pair()
    assert msgspec.msgpack.decode(kit.pool.description)["layout"]["num_blocks"] == 16
