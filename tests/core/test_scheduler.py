"""The scheduler against obvious rules, under random traffic in every role."""

from __future__ import annotations

import random

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from pdrelay.core.block_manager import BlockManager
from pdrelay.core.messages import EngineRequest
from pdrelay.core.request import Request, Status
from pdrelay.core.sampling_params import SamplingParams
from pdrelay.core.scheduler import Scheduler, SchedulerConfig
from pdrelay.core.token_ids import pack_ids

EOS = 999


def make_scheduler(num_blocks=32, *, budget=16, seqs=8, block_size=4, caching=True):
    return Scheduler(
        SchedulerConfig(seqs, budget, block_size),
        BlockManager(num_blocks, enable_prefix_caching=caching),
    )


def make_request(name, prompt, max_tokens=4, **kwargs):
    role = kwargs.pop("samples_only_first", False)
    params = SamplingParams(max_tokens=max_tokens, seed=0, eos_token_ids=(EOS,), **kwargs)
    source = EngineRequest(
        request_id=name, prompt_token_ids=pack_ids(prompt), params=params, arrived_ns=0
    )
    return Request(source, samples_only_first=role)


def token_of(request):
    """A model stand-in: the next token is a function of all tokens before it."""
    return (sum(request.token_ids) * 31 + len(request.token_ids)) % 900


def expected_output(prompt, max_tokens):
    tokens = list(prompt)
    for _ in range(max_tokens):
        tokens.append((sum(tokens) * 31 + len(tokens)) % 900)
    return tokens[len(prompt) :]


def run_step(scheduler, check=True):
    plan = scheduler.schedule()
    if check:
        check_plan(scheduler, plan)
    sampled = [token_of(c.request) for c in plan.chunks if c.samples]
    tokens = scheduler.update(plan, sampled)
    scheduler.check_integrity()
    return plan, tokens


def check_plan(scheduler, plan):
    config = scheduler.config
    assert sum(c.length for c in plan.chunks) <= config.max_num_batched_tokens
    assert len({c.request.request_id for c in plan.chunks}) == len(plan.chunks)
    assert len(scheduler.running) <= config.max_num_seqs
    decode_flags = [c.is_decode for c in plan.chunks]
    assert decode_flags == sorted(decode_flags, reverse=True), "decodes come first"
    for chunk in plan.chunks:
        assert chunk.length > 0
        capacity = len(chunk.request.block_table) * config.block_size
        assert capacity >= chunk.start + chunk.length, "a token without a slot"


def drain(scheduler, limit=2000):
    outputs: dict[str, list[int]] = {}
    for _ in range(limit):
        if not scheduler.has_work:
            return outputs
        _, tokens = run_step(scheduler)
        for token in tokens:
            outputs.setdefault(token.request.request_id, []).append(token.token_id)
    pytest.fail("the scheduler does not come to an end")


def test_chunked_prefill_then_decode():
    scheduler = make_scheduler(budget=8)
    scheduler.add(make_request("a", list(range(20)), max_tokens=3))
    lengths = []
    while scheduler.has_work:
        plan, _ = run_step(scheduler)
        lengths.append([(c.start, c.length, c.samples) for c in plan.chunks])
    assert lengths == [
        [(0, 8, False)],
        [(8, 8, False)],
        [(16, 4, True)],
        [(20, 1, True)],
        [(21, 1, True)],
    ]


def test_decodes_keep_running_while_a_long_prompt_is_prefilled():
    scheduler = make_scheduler(budget=8)
    scheduler.add(make_request("short", [1, 2], max_tokens=6))
    run_step(scheduler)
    scheduler.add(make_request("long", list(range(40)), max_tokens=1))
    for _ in range(4):
        plan, _ = run_step(scheduler)
        assert plan.chunks[0].request.request_id == "short"
        assert [c.length for c in plan.chunks] == [1, 7]


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 10**6), st.integers(9, 40), st.integers(3, 40), st.integers(1, 6))
def test_outputs_do_not_depend_on_batching_preemption_or_caching(seed, num_blocks, budget, seqs):
    rng = random.Random(seed)
    scheduler = make_scheduler(num_blocks, budget=budget, seqs=seqs, caching=rng.random() < 0.7)
    shared = [rng.randrange(900) for _ in range(16)]
    requests = {}
    for i in range(10):
        prompt = shared[: rng.randrange(17)] + [
            rng.randrange(900) for _ in range(rng.randint(1, 8))
        ]
        requests[f"r{i}"] = (prompt, rng.randint(1, 8))
    outputs: dict[str, list[int]] = {}
    pending = list(requests)
    aborted = set()
    for _ in range(3000):
        if pending and rng.random() < 0.4:
            name = pending.pop()
            scheduler.add(make_request(name, *requests[name]))
        if scheduler.requests and rng.random() < 0.02:
            victim = rng.choice(sorted(scheduler.requests))
            scheduler.finish(scheduler.requests[victim])
            aborted.add(victim)
            scheduler.check_integrity()
        if scheduler.has_work:
            _, tokens = run_step(scheduler)
            for token in tokens:
                outputs.setdefault(token.request.request_id, []).append(token.token_id)
        elif not pending:
            break
    assert scheduler.idle
    for name, (prompt, max_tokens) in requests.items():
        if name not in aborted:
            assert outputs[name] == expected_output(prompt, max_tokens)
    counts = scheduler.counts()
    assert counts.used == counts.in_transfer == 0


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(10, 40), st.integers(3, 30))
def test_a_step_can_be_planned_before_the_previous_one_is_read(seed, num_blocks, budget):
    """Overlap scheduling: plan N+1 while the tokens of N are in flight; same outputs."""
    rng = random.Random(seed)
    scheduler = make_scheduler(num_blocks, budget=budget, seqs=4)
    requests = {
        f"r{i}": ([rng.randrange(900) for _ in range(rng.randint(1, 20))], rng.randint(1, 8))
        for i in range(8)
    }
    for name, (prompt, max_tokens) in requests.items():
        scheduler.add(make_request(name, prompt, max_tokens))
    outputs: dict[str, list[int]] = {}
    in_flight = []
    for _ in range(3000):
        if not scheduler.has_work and not in_flight:
            break
        plan = scheduler.schedule()
        check_plan(scheduler, plan)
        in_flight.append(plan)
        if len(in_flight) < 2 and plan.chunks:
            continue
        oldest = in_flight.pop(0)
        sampled = [token_of(c.request) for c in oldest.chunks if c.samples]
        for token in scheduler.update(oldest, sampled):
            outputs.setdefault(token.request.request_id, []).append(token.token_id)
        scheduler.check_integrity()
    for name, (prompt, max_tokens) in requests.items():
        assert outputs[name] == expected_output(prompt, max_tokens)


def test_prefix_hits_skip_computation_but_never_the_last_token():
    scheduler = make_scheduler()
    prompt = list(range(8))
    scheduler.add(make_request("a", prompt, max_tokens=1))
    drain(scheduler)
    second = make_request("b", prompt, max_tokens=1)
    scheduler.add(second)
    plan, _ = run_step(scheduler)
    assert [(c.start, c.length) for c in plan.chunks] == [(4, 4)]
    assert second.num_cached_tokens == 4
    assert (scheduler.prefix_queries, scheduler.prefix_hits) == (16, 4)


def test_prompt_logprobs_turn_prefix_hits_off():
    scheduler = make_scheduler()
    prompt = list(range(8))
    scheduler.add(make_request("a", prompt, max_tokens=1))
    drain(scheduler)
    scheduler.add(make_request("b", prompt, max_tokens=1, prompt_logprobs=1))
    plan, _ = run_step(scheduler)
    assert [(c.start, c.length) for c in plan.chunks] == [(0, 8)]


def test_eos_ends_a_request_unless_barred():
    for kwargs, reason in (({}, "stop"), ({"ignore_eos": True}, None)):
        scheduler = make_scheduler()
        scheduler.add(make_request("a", [1], max_tokens=3, **kwargs))
        plan = scheduler.schedule()
        (token,) = scheduler.update(plan, [EOS])
        assert token.finish_reason == reason
        assert scheduler.idle == (reason == "stop")


def test_producer_hands_over_instead_of_decoding():
    scheduler = make_scheduler()
    request = make_request("a", list(range(6)), max_tokens=5, samples_only_first=True)
    scheduler.add(request)
    _, (token,) = run_step(scheduler)
    assert token.finish_reason is None
    assert not scheduler.schedule().chunks
    scheduler.begin_hand_over(request)
    scheduler.check_integrity()
    assert scheduler.counts().in_transfer == 2
    scheduler.finish(request)
    counts = scheduler.counts()
    assert (counts.cached, counts.in_transfer, counts.used) == (1, 0, 0), "full block is reusable"


def test_consumer_promises_only_what_it_has():
    scheduler = make_scheduler(num_blocks=6)
    for name in ("a", "b"):
        scheduler.expect(make_request(name, list(range(13)), max_tokens=3))
    plan, _ = run_step(scheduler)
    assert [r.request.request_id for r in plan.reservations] == ["a"]
    assert len(plan.reservations[0].blocks) == 4
    assert scheduler.counts().in_transfer == 4
    first = plan.reservations[0].request
    scheduler.commit(first, 7)
    scheduler.verified(first)
    scheduler.check_integrity()
    outputs = drain_consumer(scheduler)
    assert first.token_ids[13] == 7
    assert len(outputs["a"]) == 2


def test_a_promise_needs_no_step():
    """`reserve` may be called while steps are in flight, and again when blocks came back."""
    scheduler = make_scheduler(num_blocks=6)
    scheduler.add(make_request("r", [1, 2, 3], max_tokens=4))
    in_flight = scheduler.schedule()
    for name in "abc":
        scheduler.expect(make_request(name, list(range(7)), max_tokens=3))
    a, b = scheduler.reserve()  # one block is in use, one stays back for it, two for a, two for b
    assert [a.request.request_id, b.request.request_id] == ["a", "b"]
    promised = {*a.blocks, *b.blocks}
    assert len(promised) == 4 and not promised & set(in_flight.chunks[0].request.block_table)
    assert scheduler.reserve() == []
    scheduler.finish(a.request)
    (c,) = scheduler.reserve()
    assert c.request.request_id == "c" and c.blocks == a.blocks
    scheduler.check_integrity()
    assert scheduler.schedule().reservations == []


def drain_consumer(scheduler):
    """Run until nothing is left, committing every reservation at once."""
    outputs: dict[str, list[int]] = {}
    for _ in range(500):
        if not scheduler.has_work:
            return outputs
        plan, tokens = run_step(scheduler)
        for reservation in plan.reservations:
            scheduler.commit(reservation.request, token_of(reservation.request))
            scheduler.verified(reservation.request)
        for token in tokens:
            outputs.setdefault(token.request.request_id, []).append(token.token_id)
    pytest.fail("the consumer does not come to an end")


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(9, 30))
def test_consumer_under_pressure_finishes_everything(seed, num_blocks):
    rng = random.Random(seed)
    scheduler = make_scheduler(num_blocks, budget=rng.randint(4, 40), seqs=rng.randint(1, 6))
    shared = [rng.randrange(900) for _ in range(12)]
    requests = {}
    for i in range(9):
        prompt = shared[: rng.randrange(13)] + [
            rng.randrange(900) for _ in range(rng.randint(1, 8))
        ]
        requests[f"r{i}"] = (prompt, rng.randint(2, 12))
        scheduler.expect(make_request(f"r{i}", *requests[f"r{i}"]))
    reserved = []
    outputs: dict[str, list[int]] = {}
    for _ in range(3000):
        if scheduler.idle:
            break
        plan, tokens = run_step(scheduler)
        reserved += [r.request for r in plan.reservations]
        if reserved and (rng.random() < 0.5 or not plan.chunks):
            request = reserved.pop(rng.randrange(len(reserved)))
            scheduler.commit(request, token_of(request))
            scheduler.verified(request)
            scheduler.check_integrity()
        for token in tokens:
            outputs.setdefault(token.request.request_id, []).append(token.token_id)
    assert scheduler.idle
    for name, (prompt, max_tokens) in requests.items():
        assert outputs.get(name, []) == expected_output(prompt, max_tokens)[1:]


def test_consumer_skips_prompt_blocks_it_has():
    scheduler = make_scheduler()
    prompt = list(range(10))
    scheduler.expect(make_request("a", prompt, max_tokens=2))
    drain_consumer(scheduler)
    scheduler.expect(make_request("b", [*prompt, 50, 51, 52], max_tokens=2))
    plan = scheduler.schedule()
    (reservation,) = plan.reservations
    assert reservation.first_block == 2
    assert len(reservation.blocks) == 2, "13 tokens are 4 blocks; 2 are known"


def test_closing_keeps_blocks_until_the_producer_is_done():
    scheduler = make_scheduler(num_blocks=8)
    request = make_request("a", list(range(10)))
    scheduler.expect(request)
    run_step(scheduler)
    scheduler.begin_closing(request)
    scheduler.check_integrity()
    assert request.status is Status.CLOSING
    assert scheduler.counts().in_transfer == 3
    scheduler.finish(request)
    scheduler.finish(request)
    assert scheduler.counts().free == 8


def test_update_ignores_requests_aborted_during_the_step():
    scheduler = make_scheduler()
    scheduler.add(make_request("a", [1, 2, 3]))
    scheduler.add(make_request("b", [4, 5, 6]))
    plan = scheduler.schedule()
    scheduler.finish(scheduler.requests["a"])
    tokens = scheduler.update(plan, [10, 20])
    assert [(t.request.request_id, t.index, t.token_id) for t in tokens] == [("b", 1, 20)]
    scheduler.check_integrity()


def touched_blocks(chunk):
    return chunk.request.block_table[: -(-(chunk.start + chunk.length) // 4)]


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 10**6), st.integers(9, 30), st.integers(3, 30))
def test_blocks_of_a_step_in_flight_stay_with_their_request(seed, num_blocks, budget):
    """Under aborts, stops and preemption: no such block is free, cached, or promised to a peer."""
    rng = random.Random(seed)
    scheduler = make_scheduler(num_blocks, budget=budget, seqs=5, caching=rng.random() < 0.5)
    waiting = [
        make_request(f"r{i}", [rng.randrange(9) for _ in range(rng.randint(1, 20))], 8)
        for i in range(10)
    ]
    outputs: dict[str, list[int]] = {}
    in_flight = []
    reserved = []
    for _ in range(3000):
        if not waiting and scheduler.idle and not in_flight:
            break
        if waiting and rng.random() < 0.3:
            (scheduler.add if rng.random() < 0.6 else scheduler.expect)(waiting.pop())
        if scheduler.requests and rng.random() < 0.05:
            scheduler.finish(scheduler.requests[rng.choice(sorted(scheduler.requests))])
        if reserved and rng.random() < 0.5:
            request = reserved.pop()
            if request.status is Status.RESERVED:
                scheduler.commit(request, 1)
                scheduler.verified(request)
        if rng.random() < 0.5:
            reserved += [r.request for r in scheduler.reserve()]
        if len(in_flight) < 2:
            plan = scheduler.schedule()
            check_plan(scheduler, plan)
            reserved += [r.request for r in plan.reservations]
            if plan.chunks:
                in_flight.append((plan, [(c, touched_blocks(c)) for c in plan.chunks]))
        scheduler.check_integrity()
        for _, touched in in_flight:
            for chunk, blocks in touched:
                assert chunk.request.block_table[: len(blocks)] == blocks
                assert scheduler.blocks._transfer_refs[blocks[-1]] == 0
        if in_flight and rng.random() < 0.6:
            plan, _ = in_flight.pop(0)
            sampled = [rng.choice([EOS, 5, 6]) for c in plan.chunks if c.samples]
            for token in scheduler.update(plan, sampled):
                outputs.setdefault(token.request.request_id, []).append(token.token_id)
    assert scheduler.idle and not in_flight
    counts = scheduler.counts()
    assert counts.used == counts.in_transfer == 0


def test_a_stop_in_the_step_before_keeps_the_blocks_until_the_next_is_read():
    scheduler = make_scheduler(num_blocks=4)
    scheduler.add(make_request("a", [1, 2, 3], max_tokens=5))
    first = scheduler.schedule()
    second = scheduler.schedule()
    (token,) = scheduler.update(first, [EOS])
    assert token.finish_reason == "stop" and not scheduler.requests
    assert not scheduler.idle and scheduler.counts().used == 1
    scheduler.check_integrity()
    assert scheduler.update(second, [7]) == []
    assert scheduler.idle and scheduler.counts().free == 4


def test_hashing_ahead_publishes_the_same():
    """Whether or not the caller hashes while a step computes: the same hits."""
    prompt = list(range(30))
    for ahead in (False, True):
        scheduler = make_scheduler(budget=7)
        for name in "ab":
            scheduler.add(make_request(name, prompt, max_tokens=2))
            while scheduler.has_work:
                plan = scheduler.schedule()
                if ahead:
                    scheduler.hash_ahead(c.request for c in plan.chunks)
                    keys = [len(c.request.block_keys) for c in plan.chunks if c.length > 1]
                    assert keys == [30 // 4] * len(keys)
                scheduler.update(plan, [token_of(c.request) for c in plan.chunks if c.samples])
                scheduler.check_integrity()
        assert scheduler.prefix_hits == 28


def test_preemption_waits_for_the_victims_step():
    scheduler = make_scheduler(num_blocks=4, budget=16)
    for name in ("a", "b"):
        scheduler.add(make_request(name, list(range(8)), max_tokens=6))
    first = scheduler.schedule()
    assert [c.length for c in first.chunks] == [8, 8]
    second = scheduler.schedule()
    assert second.blocked and not second.chunks and not second.preempted
    scheduler.update(first, [1, 2])
    third = scheduler.schedule()
    assert [r.request_id for r in third.preempted] == ["b"]
    assert [c.request.request_id for c in third.chunks] == ["a"]
