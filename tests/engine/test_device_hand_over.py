"""Hand-overs whose stores are asynchronous, on devices that complete only what they are told to."""

from __future__ import annotations

import random

import pytest
from device_rig import Rig
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pdrelay.core.request import Status


@pytest.fixture
def rig(tmp_path):
    rig = Rig(tmp_path)
    yield rig
    rig.close()


def connect(rig, count=4):
    """The link stands: the first request of a pair always finds it missing."""
    for _ in range(count):
        for decode in rig.decodes:
            decode.reserve()
            decode.poll()
        rig.producer.poll()


def promised(rig, name, prompt, decode=None):
    """Submit, and let the producer know the slots before its first step."""
    rig.submit(name, prompt, decode)
    connect(rig)


def num_copied(rig):
    return rig.device.num_runs


def test_known_slots_are_stored_by_the_step_itself_and_only_the_tail_is_copied(rig):
    prompt = list(range(14))
    promised(rig, "a", prompt)
    rig.launch()
    assert rig.fused_rows == 12
    rig.settle()
    rig.assert_arrived("a", prompt)
    assert num_copied(rig) == rig.layout.num_layers  # the last block, a layer each
    assert rig.device.num_copies == 1


def test_what_is_sent_and_has_not_left_is_copying(rig):
    promised(rig, "a", range(14))
    assert rig.producer.num_copying == 0
    rig.launch()
    assert rig.producer.num_copying == 0, "the step's own stores come first"
    rig.device.run_compute()
    assert rig.read() and rig.producer.num_copying == 1
    rig.settle()
    assert rig.producer.num_copying == 0
    rig.assert_arrived("a", list(range(14)))


def test_a_hand_over_ends_while_another_prompt_is_being_launched(rig):
    promised(rig, "a", range(14))
    rig.launch()
    rig.device.run_compute()
    assert rig.read() and rig.producer.num_copying == 1
    rig.device.run_copies()
    rig.watch()
    promised_later = list(range(100, 114))
    rig.submit("b", promised_later)
    rig.launch()
    assert rig.producer.num_copying == 0 and rig.producer.num_transferring == 1
    rig.settle()
    rig.assert_arrived("a", list(range(14)))
    rig.assert_arrived("b", promised_later)


def test_a_prompt_of_whole_blocks_needs_no_copy(rig):
    promised(rig, "a", range(16))
    rig.settle()
    rig.assert_arrived("a", range(16))
    assert num_copied(rig) == 0


def test_late_slots_are_copied_behind_the_layers_that_are_written(rig):
    rig.submit("a", range(14), order=("prefill",))
    rig.launch()
    rig.submit("b", range(5), order=())
    decode = rig.decodes[0]
    rig.device.run_compute(1)  # layer 0 is written
    submit_expect(rig, "a", range(14))
    connect(rig)
    before = decode.pages.array.copy()
    rig.device.run_copies()
    assert (decode.pages.array == before).all()  # one batch, behind the last layer
    rig.settle()
    rig.assert_arrived("a", range(14))
    assert rig.fused_rows == 0


def submit_expect(rig, name, prompt):
    rig.submit(name, prompt, order=("expect",))


@pytest.fixture
def linked(rig):
    """The pair has handed over before."""
    promised(rig, "first", range(3))
    rig.settle()
    rig.fused_rows = rig.num_waits = 0
    return rig


def now(decode):
    """For `during_wait`: the consumer answers within the time."""

    def reserve():
        decode.reserve()
        return True

    return reserve


def settled(rig, name, prompt):
    rig.settle()
    rig.assert_arrived(name, list(prompt))


def test_a_step_on_an_idle_device_waits_for_slots_that_come_in_time(linked):
    linked.submit("a", range(14))
    linked.during_wait = now(linked.decodes[0])
    linked.launch()
    assert linked.num_waits == 1 and linked.fused_rows == 12
    settled(linked, "a", range(14))


def test_a_step_is_launched_without_slots_that_do_not_come(linked):
    linked.submit("a", range(14))
    linked.launch()
    assert linked.num_waits == 1 and linked.fused_rows == 0
    settled(linked, "a", range(14))


def test_a_consumer_that_was_late_is_waited_for_again_after_a_timely_promise(linked):
    late = 1_000_000
    for name, waits in ("a", 1), ("b", 0):  # the promise comes after the time
        linked.num_waits = 0
        linked.submit(name, range(14))
        linked.launch()
        assert linked.num_waits == waits and linked.fused_rows == 0
        linked.clock.now_ns += late
        settled(linked, name, range(14))
    linked.submit("c", range(100, 114))
    linked.launch()
    assert linked.num_waits == 0
    connect(linked)  # too late for its step, but it would have been worth to wait
    settled(linked, "c", range(100, 114))
    linked.submit("d", range(200, 214))
    linked.during_wait = now(linked.decodes[0])
    linked.launch()
    assert linked.num_waits == 1 and linked.fused_rows == 12
    settled(linked, "d", range(200, 214))


def test_nothing_is_waited_for_while_a_step_is_in_flight(linked):
    linked.submit("a", range(16))
    linked.submit("b", range(100, 110), order=("prefill",))
    linked.decodes[0].reserve()
    linked.launch()
    assert linked.fused_rows == 16 and not linked.num_waits
    linked.launch()
    assert linked.fused_rows == 16 and not linked.num_waits
    linked.submit("b", range(100, 110), order=("expect",))
    settled(linked, "a", range(16))
    settled(linked, "b", range(100, 110))


def test_only_the_first_step_of_a_prompt_waits(linked):
    prompt = list(range(40))  # three steps
    linked.submit("a", prompt)
    linked.launch()
    assert linked.num_waits == 1
    linked.device.run()
    linked.read()
    linked.producer._peers[linked.decodes[0].address].punctual = True
    linked.launch()
    assert linked.num_waits == 1 and not linked.steps[0].done[0]
    settled(linked, "a", prompt)


def test_the_first_request_of_a_pair_waits_for_no_link(rig):
    rig.submit("a", range(14))
    rig.launch()
    assert not rig.num_waits
    settled(rig, "a", range(14))


def test_only_the_consumer_of_most_rows_is_waited_for(tmp_path):
    rig = Rig(tmp_path, consumers=2, budget=64)
    few, many = rig.decodes
    for number, decode in enumerate(rig.decodes):
        promised(rig, f"first{number}", range(3), decode)
    rig.settle()
    rig.fused_rows = rig.num_waits = 0
    rig.submit("a", range(8), few)
    rig.submit("b", range(100, 120), many)
    rig.during_wait = now(many)
    rig.launch()
    assert rig.num_waits == 1 and rig.fused_rows == 20
    rig.settle()
    rig.submit("c", range(300, 308), few)
    rig.submit("d", range(200, 220), many)
    many.reserve()  # the other's slots do not matter
    rig.launch()
    assert rig.num_waits == 1 and rig.fused_rows == 40
    rig.settle()
    rig.assert_arrived("c", list(range(300, 308)), few)
    rig.assert_arrived("d", list(range(200, 220)), many)
    rig.close()


@pytest.mark.parametrize("how", ["cancel", "end"])
def test_a_consumer_that_leaves_during_the_wait_ends_it(linked, how):
    linked.submit("a", range(14))
    decode = linked.decodes[0]

    def leave():
        if how == "cancel":
            decode.reserve()
            decode.consumer.abort("a", "the client left")
        else:
            decode.consumer.close()
        return True

    linked.during_wait = leave
    linked.launch()
    assert linked.num_waits == 1 and linked.fused_rows == 0
    linked.producer.poll()
    linked.device.run()
    linked.read()
    decode.watch()
    if how == "cancel":
        decode.poll()
        assert not decode.promised()
    assert not linked.scheduler.requests
    linked.scheduler.check_integrity()


def test_commit_waits_for_the_copy_and_for_the_step(rig):
    promised(rig, "a", range(14))
    decode = rig.decodes[0]
    rig.launch()
    for _ in range(3):
        assert rig.device.run_compute(2)
        rig.producer.poll()
        decode.poll()
        assert not rig.read() and not decode.arrived
    rig.device.run_compute()
    rig.read()  # token 1 is there; the tail still copies
    rig.producer.poll()
    decode.poll()
    assert not decode.arrived and rig.scheduler.requests["a"].status is Status.HANDING_OVER
    rig.device.run_copies()
    rig.producer.poll()
    decode.poll()
    rig.assert_arrived("a", range(14))


@pytest.mark.parametrize("who", ["consumer", "producer"])
@pytest.mark.parametrize("stage", ["launched", "half", "computed", "read"])
def test_blocks_stay_promised_until_every_launched_store_is_complete(rig, who, stage):
    """Closed (to a consumer that cancels) and Cancel (of a producer that does) are held back."""
    promised(rig, "a", range(14))
    decode = rig.decodes[0]
    blocks = list(decode.scheduler.requests["a"].block_table)
    rig.launch()
    if stage == "half":
        rig.device.run_compute(2)
    if stage in ("computed", "read"):
        rig.device.run_compute()
    if stage == "read":
        rig.read()
    if who == "consumer":
        decode.consumer.abort("a", "the client left")
    else:
        rig.producer.abort("a", "the client left")
    for _ in range(3):
        rig.producer.poll()
        decode.poll()
        rig.watch()
        assert decode.promised() == set(blocks), "given back while stores are under way"
    rig.settle()
    assert not decode.promised() and not decode.arrived
    assert decode.scheduler.counts().free + decode.scheduler.counts().cached == 48


def test_what_was_only_queued_is_given_up_at_once(rig):
    """Nothing was launched for it: nothing is waited for."""
    promised(rig, "a", range(14))
    decode = rig.decodes[0]
    decode.consumer.abort("a", "the client left")
    rig.producer.poll()
    decode.poll()
    assert not decode.promised()
    rig.settle()


def test_both_sides_give_up_at_the_same_time(rig):
    promised(rig, "a", range(14))
    decode = rig.decodes[0]
    rig.launch()
    rig.producer.abort("a", "the client left")
    decode.consumer.abort("a", "the client left")
    rig.producer.poll()
    decode.poll()
    assert decode.promised()
    rig.settle()


def test_blocks_of_the_prefix_cache_are_copied_and_the_rest_is_fused(rig):
    shared = list(range(16))
    promised(rig, "a", [*shared, 900], None)
    rig.settle()
    decode = rig.decodes[0]
    decode.scheduler.blocks = type(decode.scheduler.blocks)(48)  # the consumer forgot it all
    rig.fused_rows, copied = 0, num_copied(rig)
    prompt = [*shared, *range(500, 508)]
    promised(rig, "b", prompt)
    rig.settle()
    rig.assert_arrived("b", prompt)
    assert rig.fused_rows == 8
    assert num_copied(rig) == copied + rig.layout.num_layers  # four blocks in one run


def test_one_consumer_is_fused_and_the_others_copied(tmp_path):
    rig = Rig(tmp_path, consumers=2, budget=64)
    prompts = {"a": range(8), "b": range(100, 120), "c": range(200, 212)}
    where = {"a": rig.decodes[0], "b": rig.decodes[1], "c": rig.decodes[0]}
    for name, prompt in prompts.items():
        rig.submit(name, prompt, where[name])
    connect(rig)
    rig.launch()
    assert rig.fused_rows == 20  # of b, or of a and c together
    rig.settle()
    for name, prompt in prompts.items():
        rig.assert_arrived(name, list(prompt), where[name])
    rig.close()


def test_a_lost_consumers_mapping_is_closed_behind_the_last_store(rig):
    promised(rig, "a", range(14))
    rig.launch()
    decode = rig.decodes[0]
    decode.consumer.close()
    rig.producer.poll()
    assert rig.fabric.opened and not rig.producer.channels()
    assert not rig.pools.open, "graphs with its address go first"
    rig.device.run()
    rig.transport.poll()
    assert not rig.fabric.opened
    assert rig.read()
    assert not rig.scheduler.requests


class Process:
    def __init__(self, pid):
        self.pid, self.over, self.closed = pid, False, False

    def gone(self):
        return self.over

    def close(self):
        self.closed = True


def test_a_killed_producers_blocks_wait_for_its_process(rig):
    rig.process = Process(77)
    promised(rig, "a", range(14))
    decode = rig.decodes[0]
    rig.launch()
    blocks = set(decode.scheduler.requests["a"].block_table)
    for channel in rig.producer.channels():
        channel.close()  # as the kernel does for a killed process, before its device is quiet
    decode.poll()
    assert decode.promised() == blocks
    assert decode.consumer.failures == 1  # the client knows already
    rig.device.run()
    decode.watch()
    rig.process.over = True
    decode.poll()
    assert not decode.promised() and rig.process.closed
    rig.read()
    rig.producer.poll()


def test_a_producer_that_connects_again_is_quiet(rig):
    rig.process = Process(77)
    promised(rig, "a", range(14))
    decode = rig.decodes[0]
    rig.launch()
    for channel in rig.producer.channels():
        channel.close()
    decode.poll()
    rig.producer.poll()
    rig.submit("b", range(5), order=("prefill",))
    assert "b" not in rig.producer._outgoing  # refused: its last stores are not over
    rig.process = Process(77)
    rig.device.run()
    rig.watch()
    rig.read()
    rig.submit("c", range(5))
    connect(rig)
    assert decode.scheduler.requests.keys() == {"c"}
    rig.settle()
    rig.assert_arrived("c", range(5))


def random_prompt(rng, shared):
    return shared[: rng.choice([0, 0, 4, 9, 16])] + [
        rng.randrange(900) for _ in range(rng.randint(1, 22))
    ]


@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(seed=st.integers(0, 2**32), consumers=st.integers(1, 2), small=st.booleans())
def test_any_interleaving_stores_into_promised_blocks_only(
    tmp_path_factory, seed, consumers, small
):
    """Steps, copies, messages and departures in any order; what arrives is right."""
    rng = random.Random(seed)
    directory = tmp_path_factory.mktemp("rig")
    rig = Rig(
        directory, num_blocks=20 if small else 48, consumers=consumers, budget=rng.choice([7, 16])
    )
    shared = [rng.randrange(900) for _ in range(16)]
    prompts, where, gone = {}, {}, set()

    def during_wait():
        decode = rng.choice(rig.decodes)
        decode.reserve()
        decode.poll()
        told = [name for name, each in decode.consumer._incoming.items() if each.channel]
        if told and rng.random() < 0.2:  # the producer hears of it while it waits
            name = rng.choice(told)
            gone.add(name)
            decode.consumer.abort(name, "left")
        return rng.random() < 0.8

    rig.during_wait = during_wait
    actions = ["submit", "launch", "compute", "copy", "read", "poll", "d-poll", "cancel", "abort"]
    for _ in range(120):
        action = rng.choice(actions)
        decode = rng.choice(rig.decodes)
        if action == "submit" and len(prompts) < 12:
            name = f"r{len(prompts)}"
            prompts[name], where[name] = random_prompt(rng, shared), decode
            order = rng.choice([("prefill", "expect"), ("expect", "prefill")])
            rig.submit(name, prompts[name], decode, order)
        elif action == "launch":
            rig.launch()
        elif action == "compute":
            rig.device.run_compute(rng.randint(1, 4))
        elif action == "copy":
            rig.device.run_copies(rng.randint(1, 4))
        elif action == "read":
            rig.read()
        elif action == "poll":
            rig.producer.poll()
        elif action == "d-poll":
            decode.reserve()
            decode.poll()
        elif action in ("cancel", "abort") and prompts and rng.random() < 0.3:
            name = rng.choice(list(prompts))
            gone.add(name)
            rig.producer.abort(name, "left")  # as the front door does, on both sides
            where[name].consumer.abort(name, "left")
        rig.watch()
    rig.settle()
    for name, prompt in prompts.items():
        if name not in gone:
            rig.assert_arrived(name, prompt, where[name])
    assert not rig.producer.failures
    rig.close()


def test_a_consumer_that_cannot_be_reached_fails_requests_with_the_reason(rig):
    rig.fabric.shared.clear()  # as where the driver or a container forbids IPC
    rig.submit("a", range(14))
    connect(rig)
    failures = rig.outbox.take(0, None).failures
    assert [failure.request_id for failure in failures] == ["a"]
    assert "decode-0 cannot be reached: the peer's memory" in failures[0].message
    assert not rig.scheduler.requests
