"""The scheduler's half: what each step tells the workers."""

from __future__ import annotations

import pytest

from pdrelay.core.clock import FakeClock
from pdrelay.integrations.vllm.bookkeeping import ConsumerBook, ProducerBook, Prompt
from pdrelay.integrations.vllm.params import RemoteDecode, RemotePrefill
from pdrelay.integrations.vllm.step import Interest, StepPlan, prompt_digest, prompt_digests

TOKENS = list(range(10))
PROMPT = Prompt(TOKENS)
TO_D = RemoteDecode("T")
FROM_P = RemotePrefill("T", "/p.sock")
HERE = Interest("T", "/p.sock")


class Preemptions:
    count = 0

    def __call__(self) -> int:
        return self.count


@pytest.fixture
def preempted():
    return Preemptions()


@pytest.fixture
def p_book(preempted):
    book = ProducerBook()
    book.admit("r", TO_D, PROMPT, preempted)
    return book


@pytest.fixture
def clock():
    return FakeClock()


@pytest.fixture
def d_book(clock):
    return ConsumerBook(block_size=4, lease_s=9.0, clock=clock)


def step(book: ConsumerBook) -> StepPlan:
    plan = StepPlan()
    book.take(plan)
    return plan


def test_chunks_grow_block_by_block(p_book):
    p_book.scheduled("r", [5], anew=True, num_computed=4)
    (chunk,) = p_book.take().chunks
    assert (chunk.transfer_id, chunk.num_tokens, chunk.blocks, chunk.num_ready) == ("T", 10, [5], 4)
    assert chunk.digest == prompt_digest(TOKENS)
    p_book.scheduled("r", [9, 2], anew=False, num_computed=10)
    (chunk,) = p_book.take().chunks
    assert (chunk.blocks, chunk.num_ready) == ([5, 9, 2], 10)
    p_book.scheduled("r", [], anew=False, num_computed=11)  # it decodes: nothing to hand over
    assert p_book.take() == StepPlan()


def test_requests_of_others_are_not_handed_over(p_book):
    p_book.scheduled("q", [1], anew=True, num_computed=4)
    assert p_book.take() == StepPlan()


def test_finished_is_held_until_freed(p_book):
    p_book.scheduled("r", [1, 2, 3], anew=True, num_computed=10)
    p_book.take()
    assert p_book.finished("r", TO_D, delivers=True)
    assert p_book.num_held == 1
    assert p_book.take().held == ["r"]
    p_book.freed("r")
    p_book.freed("r")
    assert p_book.num_held == 0


@pytest.mark.parametrize(("computed", "delivers"), [(4, True), (10, False), (0, True)])
def test_aborted_or_incomplete_is_dropped(p_book, computed, delivers):
    if computed:
        p_book.scheduled("r", [1, 2, 3], anew=True, num_computed=computed)
        p_book.take()
    assert not p_book.finished("r", TO_D, delivers=delivers)
    assert list(p_book.take().dropped) == ["r"]
    assert p_book.num_held == 0


def test_aborted_before_its_prefill_is_refused():
    book = ProducerBook()
    assert not book.finished("r", TO_D, delivers=False)
    assert list(book.take().refused) == ["T"]


def test_preemption_is_told_at_once_and_once(p_book, preempted):
    p_book.scheduled("r", [1, 2, 3], anew=True, num_computed=10)
    p_book.take()
    preempted.count += 1
    assert p_book.take().rewound == ["r"]
    assert p_book.take() == StepPlan()
    p_book.scheduled("r", [7, 8, 9], anew=True, num_computed=8)
    plan = p_book.take()
    assert plan.rewound == []
    assert plan.chunks[0].blocks == [7, 8, 9]


def test_preempted_and_resumed_in_one_step(p_book, preempted):
    p_book.scheduled("r", [1], anew=True, num_computed=4)
    p_book.take()
    preempted.count += 1
    p_book.scheduled("r", [7, 8], anew=True, num_computed=8)
    plan = p_book.take()
    assert plan.rewound == ["r"]
    assert plan.chunks[0].blocks == [7, 8]


def test_load_skips_what_is_cached(d_book):
    assert d_book.num_external_tokens(FROM_P, 10, 4) == 6
    d_book.reserve("r", FROM_P, PROMPT, [8, 6, 7, 99], 6)
    (load,) = step(d_book).loads
    assert (load.first_block, load.blocks, load.num_tokens) == (1, [6, 7], 10)
    assert load.digests == [prompt_digest(TOKENS), prompt_digest(TOKENS[:9])]
    d_book.reserve("r", FROM_P, PROMPT, [8, 6, 7, 99], 6)  # vLLM calls again when it is loaded
    assert step(d_book) == StepPlan()


def test_a_transfer_is_loaded_once(d_book):
    d_book.reserve("r", FROM_P, PROMPT, [1, 2, 3], 10)
    assert d_book.num_external_tokens(FROM_P, 10, 0) is None  # n > 1: wait for the first
    d_book.loaded("r")
    assert d_book.num_external_tokens(FROM_P, 10, 0) == 0
    d_book.want("q", FROM_P)
    assert step(d_book).waiting == []


def test_waiting_renews_the_lease(d_book, clock):
    d_book.want("r", FROM_P)
    assert step(d_book).waiting == [HERE]
    d_book.want("r", FROM_P)
    assert step(d_book).waiting == []
    clock.advance(3.1)
    assert step(d_book).waiting == [HERE]
    d_book.reserve("r", FROM_P, PROMPT, [1, 2, 3], 10)
    clock.advance(30)
    assert step(d_book).waiting == []  # its worker renews


def test_aborts_in_every_state(d_book):
    d_book.finished("unknown")
    d_book.want("r", FROM_P)
    d_book.finished("r")
    d_book.finished("r")
    assert step(d_book).released == [HERE]
    other = RemotePrefill("U", "/p.sock")
    d_book.reserve("q", other, PROMPT, [1, 2, 3], 10)
    d_book.finished("q")
    assert step(d_book).cancelled == ["q"]
    d_book.loaded("q")
    d_book.finished("q")
    assert step(d_book) == StepPlan()


def test_nothing_to_load_releases_the_producer(d_book):
    d_book.want("r", FROM_P)
    step(d_book)
    d_book.reserve("r", FROM_P, PROMPT, [1, 2, 3], 0)
    assert step(d_book).released == [HERE]
    assert d_book.num_external_tokens(FROM_P, 10, 0) == 0


def test_memory_of_used_transfers_is_bounded(d_book):
    for i in range(5000):
        params = RemotePrefill(f"T{i}", "/p.sock")
        d_book.reserve(f"r{i}", params, PROMPT, [1, 2, 3], 10)
        d_book.loaded(f"r{i}")
    assert d_book.num_external_tokens(RemotePrefill("T4999", "/p"), 10, 0) == 0
    assert len(d_book._used) <= 4096


@pytest.mark.parametrize("extra", [("lora a",), ("mm x", "mm y"), ("",)])
def test_digests_tell_prompts_apart(extra):
    digests = {
        prompt_digest(TOKENS),
        prompt_digest(TOKENS[:9]),
        prompt_digest([*TOKENS[:9], 10]),
        prompt_digest(TOKENS, extra),
    }
    assert len(digests) == 4
    for prompt in (TOKENS, TOKENS[:1]):
        both = [prompt_digest(prompt, extra), prompt_digest(prompt[:-1], extra)]
        assert prompt_digests(prompt, extra) == both
