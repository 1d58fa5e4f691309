"""Checksums of hand-overs between devices: read in step order, settled before tokens are told."""

from __future__ import annotations

import pytest
from device_rig import BLOCK_SIZE, Rig
from pd_harness import FrontDoor, Instance, socket_path
from pd_transports import TransportKit

from pdrelay.core.events import EventKind
from pdrelay.engine.fake_runner import expected_tokens

PROMPT = list(range(15))  # the first token that D computes fills the last block


@pytest.fixture
def rig(tmp_path):
    rig = Rig(tmp_path, manual_consumers=True)
    yield rig
    rig.decodes[0].device.run()
    rig.close()


@pytest.fixture
def decode(rig):
    return rig.decodes[0]


def arrive(rig, decode, name="a", prompt=PROMPT):
    """Hand over while a step of D is in flight. Returns a function that ends it."""
    over = []
    decode.device.launch_until(lambda: bool(over))
    rig.submit(name, prompt)
    for _ in range(8):
        decode.reserve()
        decode.consumer.poll()
        rig.device.run()
        rig.producer.poll()
        rig.launch()
        rig.read()
    assert not rig.producer.num_transferring

    def end():
        over.append(True)
        decode.device.run()

    return end


def decode_step(decode):
    """Plan and launch a step of D, which writes a row of the last block."""
    plan = decode.scheduler.schedule()
    (chunk,) = plan.chunks
    block = chunk.request.block_table[chunk.start // BLOCK_SIZE]
    decode.device.launch(lambda: decode.pages.array[:, block].fill(77))
    return plan


def failures(decode):
    result = decode.outbox.take(0, None)
    return [] if result is None else [(one.request_id, one.code) for one in result.failures]


def cached_blocks(decode):
    return decode.scheduler.counts().cached


def published(decode, request):
    keys = request.prompt_keys(BLOCK_SIZE)
    return len(decode.scheduler.blocks.match(keys))


def damage(decode, request):
    decode.pages.array[0, request.block_table[0], 0] ^= 1


def test_a_request_is_planned_while_its_pages_are_read(rig, decode):
    end = arrive(rig, decode)
    (request,) = decode.scheduler.waiting
    assert published(decode, request) == 0, "nobody else may use pages that are not verified"
    plan = decode_step(decode)
    end()
    decode.consumer.verify(plan)
    (token,) = decode.scheduler.update(plan, [5])
    assert token.request is request and not failures(decode)
    assert published(decode, request) == len(PROMPT) // BLOCK_SIZE
    decode.scheduler.finish(request)


def test_pages_are_read_in_front_of_the_requests_own_step(rig, decode):
    end = arrive(rig, decode)
    plan = decode_step(decode)  # changes the last block
    end()
    decode.consumer.verify(plan)
    assert len(decode.scheduler.update(plan, [5])) == 1 and not failures(decode)
    decode.scheduler.finish(plan.chunks[0].request)


def test_of_damaged_pages_no_token_is_told_and_no_block_is_shared(rig, decode):
    end = arrive(rig, decode)
    (request,) = decode.scheduler.waiting
    damage(decode, request)
    plan = decode_step(decode)
    end()
    decode.consumer.verify(plan)
    assert failures(decode) == [("a", "kv_damaged")] and decode.consumer.failures == 1
    assert not decode.scheduler.update(plan, [5])
    assert decode.scheduler.idle and cached_blocks(decode) == 0
    decode.scheduler.check_integrity()


def test_damage_is_told_before_any_step_of_the_request(rig, decode):
    end = arrive(rig, decode)
    (request,) = decode.scheduler.waiting
    damage(decode, request)
    decode.consumer.poll()
    assert not failures(decode), "not read yet"
    end()
    decode.consumer.poll()
    assert failures(decode) == [("a", "kv_damaged")]
    assert decode.scheduler.idle and cached_blocks(decode) == 0


def test_a_client_that_leaves_meanwhile_gets_no_failure(rig, decode):
    end = arrive(rig, decode)
    (request,) = decode.scheduler.waiting
    damage(decode, request)
    decode.consumer.abort("a", "left")
    assert decode.scheduler.idle
    end()
    decode.consumer.poll()
    assert not failures(decode)


def test_the_producer_reads_its_pages_behind_the_step_that_completes_them(rig, decode):
    rig.submit("first", range(3))
    rig.submit("a", PROMPT)
    for _ in range(8):
        decode.reserve()
        decode.device.run()
        decode.poll()
        rig.producer.poll()
    while rig.launch():
        pass
    outgoing = rig.producer._outgoing["a"]
    assert outgoing.checksum is not None and not outgoing.checksum.done()
    rig.device.run_compute()
    assert outgoing.checksum.done()
    for _ in range(8):
        rig.device.run()
        decode.device.run()
        rig.turn()
    rig.assert_arrived("a", PROMPT)


def test_pages_that_are_found_right_are_shared_before_the_request_has_a_step(rig, decode):
    end = arrive(rig, decode)
    (request,) = decode.scheduler.waiting
    end()
    assert published(decode, request) == 0
    decode.consumer.poll()
    assert published(decode, request) == len(PROMPT) // BLOCK_SIZE
    decode.scheduler.finish(request)


def test_pages_that_a_request_gave_back_are_not_judged(rig, decode):
    """They may be somebody else's by now; the request is computed again."""
    end = arrive(rig, decode)
    (request,) = decode.scheduler.waiting
    damage(decode, request)
    decode.scheduler._free(request)
    end()
    decode.consumer.poll()
    assert not failures(decode) and list(decode.scheduler.waiting) == [request]
    assert not decode.consumer._unverified and decode.scheduler.counts().cached == 0
    decode.scheduler.finish(request)


# ---- the loop


class Late:
    """A checksum that is never there unless it is waited for."""

    def __init__(self, value):
        self.value = value

    def begin(self):
        return self

    def done(self):
        return False

    def result(self):
        return self.value


@pytest.fixture
def pair(tmp_path):
    with TransportKit("mapped@host", tmp_path) as kit:
        address = socket_path(kit.directory, "d.sock")
        decode = Instance(
            "decode-0", transport_factory=kit.factory, address=address, verify="off", overlap=True
        )
        prefill = Instance("prefill-0", transport_factory=kit.factory, verify="off", overlap=True)
        door = FrontDoor(prefill, decode)
        yield door, prefill, decode, address
        door.settle()
        door.drain()


def hand_over(pair, name):
    """With blocks that are promised before the prompt is computed."""
    door, prefill, decode, address = pair
    request = door.request(name, PROMPT, 4)
    door.relay(prefill, decode, address, request, order=("expect",))
    door.pump(lambda: any(e.kind is EventKind.RESERVED for e in door.seen[name].events))
    door.relay(prefill, decode, address, request, order=("prefill",))
    door.finish(name)
    return door.seen[name]


@pytest.mark.parametrize("damaged", [False, True])
def test_the_loop_settles_a_checksum_before_it_tells_a_token(pair, damaged):
    _, _, decode, _ = pair
    decode.consumer._checksum = lambda blocks, in_order: Late(int(damaged))
    seen = hand_over(pair, "a")
    if damaged:
        assert [failure.code for failure in seen.failures] == ["kv_damaged"]
        assert not seen.token_ids.get("decode-0")
    else:
        assert seen.tokens() == expected_tokens(PROMPT, 4) and not seen.failures


def test_the_loop_begins_the_producers_checksum_with_the_step(pair):
    _, prefill, _, _ = pair
    asked = []
    begin = prefill.producer._checksum

    def checksum(blocks, in_order):
        asked.append(in_order)
        return begin(blocks, in_order)

    prefill.producer._checksum = checksum
    hand_over(pair, "first")  # connects
    hand_over(pair, "second")
    assert asked[-1] is True
