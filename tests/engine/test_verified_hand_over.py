"""Checksums of hand-overs between devices: read in step order, settled before tokens are told."""

from __future__ import annotations

import pytest
from device_rig import BLOCK_SIZE, Rig

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
    assert outgoing.summed is not None and not outgoing.summed.checksum.done()
    rig.device.run_compute()
    assert outgoing.summed.checksum.done()
    for _ in range(8):
        rig.device.run()
        decode.device.run()
        rig.turn()
    rig.assert_arrived("a", PROMPT)
