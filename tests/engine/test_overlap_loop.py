"""The loop on an asynchronous runner: plans ahead, and tells clients the same tokens."""

from __future__ import annotations

import random
import threading

import pytest
from pd_harness import FrontDoor, Instance, socket_path
from pd_transports import TRANSPORTS, TransportKit

from pdrelay.core.events import EventKind
from pdrelay.core.sampling_params import SamplingParams
from pdrelay.engine.fake_runner import VOCAB_SIZE, expected_tokens


@pytest.fixture(params=TRANSPORTS)
def kit(request, tmp_path):
    with TransportKit(request.param, tmp_path) as kit:
        yield kit


class Gate:
    """Holds the fake device before step `number` until the test opens it."""

    def __init__(self, runner, number):
        self.reached = threading.Event()
        self.go = threading.Event()
        self._number = number
        runner.before_step = self._hook

    def _hook(self, number):
        if number == self._number:
            self.reached.set()
            assert self.go.wait(20)


def after_a_turn(door, instance):
    """A ping is answered at the head of a turn: the second answer means the first turn is over."""
    door.stats(instance)
    door.stats(instance)


def test_the_next_step_is_launched_while_one_computes():
    replica = Instance("replica-0", overlap=True)
    door = FrontDoor(replica)
    gate = Gate(replica.runner, 2)
    door.submit(replica, door.request("a", [1, 2, 3], 8))
    assert gate.reached.wait(20)
    door.pump(lambda: replica.runner.num_launched == 4)
    after_a_turn(door, replica)  # the loop answers while the device computes
    assert replica.runner.num_launched == 4, "steps 2 and 3 are in flight, no further"
    gate.go.set()
    door.finish()
    assert door.seen["a"].tokens() == expected_tokens([1, 2, 3], 8)
    door.settle()
    door.drain()


def test_a_prompt_that_comes_during_a_step_joins_the_next():
    replica = Instance("replica-0", overlap=True)
    door = FrontDoor(replica)
    gate = Gate(replica.runner, 0)
    door.submit(replica, door.request("a", list(range(12)), 1))
    assert gate.reached.wait(20)
    door.submit(replica, door.request("b", [5, 6], 3))
    after_a_turn(door, replica)
    assert replica.runner.num_launched == 2
    gate.go.set()
    door.finish()
    assert door.seen["b"].tokens() == expected_tokens([5, 6], 3)
    door.drain()


def test_what_a_step_samples_after_a_stop_is_dropped():
    first, second = expected_tokens([1, 2, 3], 2)
    replica = Instance("replica-0", overlap=True)
    door = FrontDoor(replica)
    request = door.request("a", [1, 2, 3], 50, stop_token_ids=(second,))
    door.submit(replica, request)
    door.submit(replica, door.request("b", [4], 30))
    door.finish()
    assert door.seen["a"].tokens() == [first, second]
    assert door.seen["a"].finish_reason == "stop"
    assert door.seen["b"].tokens() == expected_tokens([4], 30)
    door.settle()
    door.drain()


@pytest.mark.parametrize("penalty", ["presence_penalty", "frequency_penalty", "repetition_penalty"])
def test_penalties_are_not_planned_ahead(penalty):
    replica = Instance("replica-0", overlap=True)
    door = FrontDoor(replica)
    launched = []
    replica.runner.before_step = lambda number: launched.append(replica.runner.num_launched)
    door.submit(replica, door.request("a", [1, 2, 3], 6, **{penalty: 1.5}))
    door.finish()
    assert launched == [1, 2, 3, 4, 5, 6], "each step is the last one launched when it begins"
    assert SamplingParams(max_tokens=1, seed=0).repetition_penalty == 1.0
    door.drain()


def test_random_traffic_with_aborts_and_preemption_equals_the_plain_loop():
    rng = random.Random(3)
    overlapped = Instance("replica-0", overlap=True, num_blocks=14)
    plain = Instance("replica-1", num_blocks=14)
    door = FrontDoor(overlapped, plain)
    shared = [rng.randrange(VOCAB_SIZE) for _ in range(24)]
    prompts, aborted = {}, set()
    for number in range(100):
        prompt = shared[: rng.choice([0, 5, 12, 24])] + [rng.randrange(VOCAB_SIZE) for _ in "abc"]
        prompts[number] = (prompt, rng.randint(1, 12))
        door.submit(overlapped, door.request(f"o{number}", *prompts[number]))
        door.submit(plain, door.request(f"p{number}", *prompts[number]))
        if rng.random() < 0.15:
            aborted.add(number)
            door.abort(f"o{number}")
        if number % 10 == 9:
            wanted = [n for n in prompts if n not in aborted]
            door.finish(*[f"{kind}{n}" for n in wanted for kind in "op"])
    for number, (prompt, max_tokens) in prompts.items():
        if number not in aborted:
            assert door.seen[f"o{number}"].tokens() == expected_tokens(prompt, max_tokens)
            assert door.seen[f"p{number}"].tokens() == expected_tokens(prompt, max_tokens)
    assert door.stats(overlapped).num_preemptions > 0
    door.settle()
    door.drain()


def test_hand_over_between_asynchronous_instances(kit):
    """Blocks that a step in flight still writes are never promised to a producer."""
    rng = random.Random(5)
    address = socket_path(kit.directory, "d.sock")
    decode = Instance(
        "decode-0", transport_factory=kit.factory, address=address, num_blocks=24, overlap=True
    )
    prefill = Instance("prefill-0", transport_factory=kit.factory, num_blocks=32, overlap=True)
    door = FrontDoor(prefill, decode)
    prompts, aborted = {}, set()
    for number in range(80):
        name = f"r{number}"
        prompt = [rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, 30))]
        stop = expected_tokens(prompt, 3)[-1] if rng.random() < 0.4 else VOCAB_SIZE + 1
        prompts[name] = (prompt, rng.randint(1, 12), stop)
        request = door.request(name, prompt, prompts[name][1], stop_token_ids=(stop,))
        door.relay(prefill, decode, address, request)
        if rng.random() < 0.2:
            aborted.add(name)
            door.abort(name)
        if number % 8 == 7:
            door.finish(*[n for n in prompts if n not in aborted])
    for name, (prompt, max_tokens, stop) in prompts.items():
        if name in aborted:
            continue
        expected = expected_tokens(prompt, max_tokens)
        if stop in expected:
            expected = expected[: expected.index(stop) + 1]
        assert not door.seen[name].failures
        assert door.seen[name].tokens() == expected
    door.settle()
    door.drain()


def reserved(door, name):
    return any(event.kind is EventKind.RESERVED for event in door.seen[name].events)


def test_blocks_are_promised_while_no_step_may_be_planned(tmp_path):
    """Steps fill the device: promises leave all the same, also those that wait for blocks."""
    with TransportKit("mapped", tmp_path) as kit:
        address = socket_path(kit.directory, "d.sock")
        decode = Instance(
            "decode-0", transport_factory=kit.factory, address=address, num_blocks=20, overlap=True
        )
        prefill = Instance("prefill-0", transport_factory=kit.factory)
        door = FrontDoor(prefill, decode)
        gate = Gate(decode.runner, 2)
        door.relay(prefill, decode, address, door.request("a", [1, 2, 3], 8))
        assert gate.reached.wait(20)
        door.pump(lambda: decode.runner.num_launched == 4)
        for name in ("b", "c"):  # expected, and not prefilled yet: too large to fit both
            request = door.request(name, [ord(name) + i for i in range(40)], 3)
            door.relay(prefill, decode, address, request, order=("expect",))
        door.pump(lambda: reserved(door, "b"))
        after_a_turn(door, decode)
        assert not reserved(door, "c")
        door.abort("b")
        door.pump(lambda: reserved(door, "c"))
        assert decode.runner.num_launched == 4
        gate.go.set()
        door.relay(prefill, decode, address, request, order=("prefill",))
        door.finish("a", "c")
        assert door.seen["c"].tokens() == expected_tokens([ord("c") + i for i in range(40)], 3)
        door.settle()
        door.drain()


def test_a_producer_may_wait_for_slots_only_on_an_idle_device(tmp_path):
    with TransportKit("mapped@host", tmp_path) as kit:
        prefill = Instance("prefill-0", transport_factory=kit.factory, overlap=True)
        address = socket_path(kit.directory, "d.sock")
        decode = Instance("decode-0", transport_factory=kit.factory, address=address)
        door = FrontDoor(prefill, decode)
        calls = []
        prefill.producer.await_slots = lambda plan, *, idle: calls.append(("wait", idle))
        prefill.loop._remote_of = lambda plan: calls.append("remote_of")  # returns None
        gate = Gate(prefill.runner, 0)
        door.relay(prefill, decode, address, door.request("a", list(range(20)), 3))
        assert gate.reached.wait(20)
        door.pump(lambda: prefill.runner.num_launched == 2)
        after_a_turn(door, prefill)
        assert calls == [("wait", True), "remote_of", ("wait", False), "remote_of"]
        gate.go.set()
        door.finish()
        assert door.seen["a"].tokens() == expected_tokens(range(20), 3)
        door.settle()
        door.drain()


def test_idle_work_waits_until_no_step_is_in_flight(monkeypatch):
    replica = Instance("replica-0", overlap=True)
    door = FrontDoor(replica)
    kind, left, done = type(replica.runner), [3], threading.Event()

    def do_idle_work(runner):
        assert not replica.loop._in_flight
        left[0] -= 1
        if not left[0]:
            done.set()

    gate = Gate(replica.runner, 1)
    door.submit(replica, door.request("a", [1, 2, 3], 8))
    assert gate.reached.wait(20)
    monkeypatch.setattr(kind, "has_idle_work", property(lambda runner: left[0] > 0))
    monkeypatch.setattr(kind, "do_idle_work", do_idle_work)
    after_a_turn(door, replica)
    assert left == [3], "a step computes"
    gate.go.set()
    door.finish()
    assert door.seen["a"].tokens() == expected_tokens([1, 2, 3], 8)
    assert done.wait(20), "the loop is idle"
    door.drain()
