"""P/D over real sockets and transports: same tokens as co-located, and every block comes back."""

from __future__ import annotations

import random
import threading

import pytest
from pd_harness import FrontDoor, Instance, socket_path
from pd_transports import TRANSPORTS, TransportKit

from pdrelay.core.events import EventKind
from pdrelay.core.messages import Meet
from pdrelay.engine.fake_runner import VOCAB_SIZE, expected_tokens

PHASES = ["queued", "layer-0", "layer-1", "layer-2", "after-first-token", "decoding"]


@pytest.fixture(params=TRANSPORTS)
def kit(request, tmp_path):
    with TransportKit(request.param, tmp_path) as kit:
        yield kit


def make_pair(kit, *, p=None, d=None, number=0):
    address = socket_path(kit.directory, f"d{number}.{random.randrange(10**9)}.sock")
    decode = Instance(
        f"decode-{number}", transport_factory=kit.factory, address=address, **(d or {})
    )
    prefill = Instance(f"prefill-{number}", transport_factory=kit.factory, **(p or {}))
    return prefill, decode, address


def random_prompt(rng, shared):
    prefix = shared[: rng.choice([0, 0, 5, 12, 24])]
    return prefix + [rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, 24))]


def test_two_by_two_equals_co_located_with_aborts_and_preemption(kit):
    rng = random.Random(1)
    pairs = [make_pair(kit, number=i, p={"num_blocks": 48}, d={"num_blocks": 40}) for i in range(2)]
    replica = Instance("replica-0", num_blocks=40)
    door = FrontDoor(*(i for p, d, _ in pairs for i in (p, d)), replica)
    shared = [rng.randrange(VOCAB_SIZE) for _ in range(24)]
    prompts, aborted = {}, set()
    for number in range(120):
        name = f"r{number}"
        prompts[name] = (random_prompt(rng, shared), rng.randint(1, 12))
        request = door.request(name, *prompts[name])
        producer = rng.choice(pairs)[0]
        _, consumer, address = rng.choice(pairs)
        order = rng.choice([("prefill", "expect"), ("expect", "prefill")])
        door.relay(producer, consumer, address, request, order)
        if rng.random() < 0.1:
            aborted.add(name)
            door.abort(name)
        door.submit(replica, door.request(f"c{number}", *prompts[name]))
        if number % 12 == 11:
            wanted = [n for n in prompts if n not in aborted]
            door.finish(*wanted, *[f"c{n[1:]}" for n in wanted])
    for name, (prompt, max_tokens) in prompts.items():
        expected = expected_tokens(prompt, max_tokens)
        assert door.seen[f"c{name[1:]}"].tokens() == expected
        if name not in aborted:
            assert not door.seen[name].failures
            if door.seen[name].tokens() != expected:
                raise AssertionError(f"{name}: {door.seen[name]} != {expected}")
    door.settle()
    door.drain()


def test_a_small_consumer_preempts_and_still_agrees(kit):
    prefill, decode, address = make_pair(kit, d={"num_blocks": 14, "seqs": 4})
    door = FrontDoor(prefill, decode)
    prompts = {f"r{i}": ([i * 7 + j for j in range(9)], 14) for i in range(6)}
    for name, (prompt, max_tokens) in prompts.items():
        door.relay(prefill, decode, address, door.request(name, prompt, max_tokens))
    door.finish()
    for name, (prompt, max_tokens) in prompts.items():
        assert door.seen[name].tokens() == expected_tokens(prompt, max_tokens)
    assert door.stats(decode).num_preemptions > 0
    door.settle()
    door.drain()


@pytest.mark.parametrize("order", [("prefill", "expect"), ("expect", "prefill")])
def test_late_slots_do_not_hold_up_prefill(kit, order):
    """Whichever message comes first: the first token leaves before any slot is known."""
    prefill, decode, address = make_pair(kit)
    door = FrontDoor(prefill, decode)
    request = door.request("a", list(range(30)), 5)
    door.relay(prefill, decode, address, request, order[:1])
    if order[0] == "prefill":
        door.pump(lambda: door.seen["a"].token_ids.get("prefill-0"))
    door.relay(prefill, decode, address, request, order[1:])
    door.finish()
    assert door.seen["a"].tokens() == expected_tokens(range(30), 5)
    door.settle()
    door.drain()


def test_a_pair_that_met_before_has_one_connection(kit):
    prefill, decode, address = make_pair(kit)
    door = FrontDoor(prefill, decode)
    prefill.control.send(Meet("decode-9", address + ".nowhere"))  # not an error
    prefill.control.send(Meet(decode.name, address))
    for name in ("a", "b"):
        door.relay(prefill, decode, address, door.request(name, list(range(20)), 4))
        door.finish(name)
        door.pump(lambda name=name: len(door.seen[name].tokens()) == 4)
        assert door.seen[name].tokens() == expected_tokens(range(20), 4)
    assert [peer.address for peer in prefill.producer._peers.values()] == [address]
    door.settle()
    door.drain()


def test_one_token_requests_end_at_the_producer(kit):
    prefill, decode, address = make_pair(kit)
    door = FrontDoor(prefill, decode)
    for i in range(8):
        name = f"r{i}"
        request = door.request(name, [i, i + 1, i + 2, i + 3, i + 4], 1)
        door.relay(prefill, decode, address, request)
    door.finish()
    for i in range(8):
        seen = door.seen[f"r{i}"]
        assert seen.finish_reason == "length"
        assert seen.tokens() == expected_tokens([i, i + 1, i + 2, i + 3, i + 4], 1)
        assert not seen.token_ids.get("decode-0")
        door.abort(f"r{i}")
    door.settle()
    door.drain()


def test_prefix_hits_on_the_consumer_move_only_what_is_missing(kit):
    prefill, decode, address = make_pair(kit)
    door = FrontDoor(prefill, decode)
    first = list(range(20))
    second = [*range(16), 500, 501, 502, 503, 504, 505]
    for name, prompt in (("a", first), ("b", second), ("c", second)):
        door.relay(prefill, decode, address, door.request(name, prompt, 4))
        door.finish(name)
        assert door.seen[name].tokens() == expected_tokens(prompt, 4)
    block_bytes = decode.pages.layout.block_bytes
    moved = [
        event.num_bytes
        for name in "abc"
        for event in door.seen[name].events
        if event.kind is EventKind.TRANSFER_END
    ]
    # 20 tokens are 5 blocks of 4. b shares 4 of its 6 blocks; c repeats b: 5 full blocks known.
    assert moved == [5 * block_bytes, 2 * block_bytes, 1 * block_bytes]
    door.settle()
    door.drain()


def test_events_tell_the_life_in_order(kit):
    prefill, decode, address = make_pair(kit)
    door = FrontDoor(prefill, decode)
    door.relay(prefill, decode, address, door.request("first", [1, 2], 2))  # the link stands now
    door.finish("first")
    gate = Gate(prefill.runner, 2)
    door.relay(prefill, decode, address, door.request("a", list(range(40)), 3))
    assert gate.reached.wait(20)
    door.pump(lambda: EventKind.RESERVED in {event.kind for event in door.seen["a"].events})
    gate.go.set()
    door.finish()
    times = {event.kind: event.t_ns for event in door.seen["a"].events}
    assert times[EventKind.PREFILL_START] <= times[EventKind.PREFILL_END]
    assert times[EventKind.PREFILL_END] <= times[EventKind.TRANSFER_END]
    assert times[EventKind.TRANSFER_END] <= times[EventKind.DECODE_ADMITTED]
    assert times[EventKind.RESERVED] <= times[EventKind.TRANSFER_END]
    if kit.name == "mapped":  # the others send from a thread of their own, or at the end
        assert times[EventKind.TRANSFER_START] < times[EventKind.PREFILL_END]
    door.drain()


class Gate:
    """Stops a runner at one point until the test lets it go on."""

    def __init__(self, runner, layer):
        self.reached = threading.Event()
        self.go = threading.Event()
        self._layer = layer
        runner.before_layer = self._hook

    def _hook(self, layer):
        if layer == self._layer and not self.reached.is_set():
            self.reached.set()
            assert self.go.wait(20)


def at_phase(door, prefill, decode, address, phase, then):
    """Bring request `a` to `phase`, run `then`, let everything go on."""
    request = door.request("a", list(range(22)), 400)
    gate = None
    if phase == "queued":
        gate = Gate(prefill.runner, 0)
        door.relay(prefill, decode, address, door.request("blocker", [1, 2, 3], 2))
        assert gate.reached.wait(20)
    elif phase.startswith("layer"):
        gate = Gate(prefill.runner, int(phase[-1]))
    elif phase == "after-first-token":
        gate = Gate(decode.runner, 0)
    door.relay(prefill, decode, address, request)
    if phase == "decoding":
        door.pump(lambda: len(door.seen["a"].token_ids.get("decode-0", [])) > 3)
    elif phase != "queued":
        assert gate.reached.wait(20)
    then()
    if gate is not None:
        gate.go.set()


def next_request_agrees(door, prefill, decode, address):
    """The pair serves on, gives the expected tokens, and ends with clean books."""
    door.relay(prefill, decode, address, door.request("next", list(range(22)), 6))
    door.finish("next")
    assert door.seen["next"].tokens() == expected_tokens(range(22), 6)
    door.settle()
    door.drain()


@pytest.mark.parametrize("phase", PHASES)
def test_a_client_that_leaves_frees_both_sides(kit, phase):
    prefill, decode, address = make_pair(kit, d={"num_blocks": 200})
    door = FrontDoor(prefill, decode)
    at_phase(door, prefill, decode, address, phase, lambda: door.abort("a"))
    door.settle()
    next_request_agrees(door, prefill, decode, address)


@pytest.mark.parametrize("phase", PHASES)
def test_a_dead_producer_costs_its_requests_and_nothing_else(kit, phase):
    prefill, decode, address = make_pair(kit, d={"num_blocks": 200})
    door = FrontDoor(prefill, decode)
    at_phase(door, prefill, decode, address, phase, prefill.control.close)
    prefill.stop()
    del door.instances["prefill-0"]
    kit.reclaim(prefill)
    door.abort("a")
    door.abort("blocker")
    door.settle()
    again = Instance("prefill-0", transport_factory=kit.factory)
    door.add(again)
    next_request_agrees(door, again, decode, address)


@pytest.mark.parametrize("phase", PHASES)
def test_a_dead_consumer_costs_its_requests_and_nothing_else(kit, phase):
    prefill, decode, address = make_pair(kit, d={"num_blocks": 200})
    door = FrontDoor(prefill, decode)
    at_phase(door, prefill, decode, address, phase, decode.control.close)
    decode.stop()
    del door.instances["decode-0"]
    kit.reclaim(decode)
    door.abort("a")
    door.abort("blocker")
    door.settle()
    address = socket_path(kit.directory, "second.sock")
    again = Instance("decode-0", transport_factory=kit.factory, address=address)
    door.add(again)
    next_request_agrees(door, prefill, again, address)


def test_a_consumer_that_is_not_there_is_a_clear_failure(kit):
    prefill = Instance("prefill-0", transport_factory=kit.factory)
    door = FrontDoor(prefill)
    request = door.request("a", [1, 2, 3], 4)
    missing = type("Missing", (), {"name": "decode-9"})
    door.relay(prefill, missing, socket_path(kit.directory, "nowhere"), request, ("prefill",))
    door.finish()
    (failure,) = door.seen["a"].failures
    assert failure.status == 503
    assert "decode-9" in failure.message
    door.settle()
    door.drain()


def test_a_full_consumer_ends_in_a_deadline_not_a_hang(kit):
    """Nothing can ever be promised: the producer gives up, and both sides are clean."""
    prefill, decode, address = make_pair(kit, p={"timeout_s": 0.3}, d={"num_blocks": 4})
    door = FrontDoor(prefill, decode)
    door.relay(prefill, decode, address, door.request("a", list(range(30)), 4))
    door.finish()
    (failure,) = door.seen["a"].failures
    assert (failure.status, failure.code) == (504, "deadline_exceeded")
    assert "--kv-transfer-timeout" in failure.message
    door.abort("a")
    door.settle()
    door.drain()
