"""When the next step is planned, on a clock of the test's own."""

from __future__ import annotations

import pytest

from pdrelay.core.messages import EngineRequest
from pdrelay.core.request import Request
from pdrelay.core.sampling_params import SamplingParams
from pdrelay.core.scheduler import Chunk, StepPlan
from pdrelay.core.token_ids import pack_ids
from pdrelay.engine.step_pacer import LEAD_NS, StepPacer

STEP_NS, LAUNCH_NS = 5_000_000, 300_000


def plan(num_decodes, prompt=0):
    request = Request(
        EngineRequest(
            request_id="r",
            prompt_token_ids=pack_ids([1] * 100),
            params=SamplingParams(max_tokens=9, seed=0),
            arrived_ns=0,
        )
    )
    chunks = [Chunk(request, 100, 1, True, False)] * num_decodes
    return StepPlan(chunks=chunks + [Chunk(request, 0, prompt, False, False)] * bool(prompt))


def steady(pacer, num_decodes, steps=30):
    """A pipeline of equal steps, each launched while the one before it runs. Returns its end."""
    end = STEP_NS
    pacer.launched(plan(num_decodes), -LAUNCH_NS, 0)
    for _ in range(steps):
        pacer.launched(plan(num_decodes), end - 2 * LAUNCH_NS, end - LAUNCH_NS)
        pacer.read(end)
        end += STEP_NS
    pacer.read(end)
    return end


def test_a_known_step_is_followed_just_before_its_end():
    pacer = StepPacer()
    now = steady(pacer, 16)
    pacer.launched(plan(16), now, now + LAUNCH_NS)
    start = now + LAUNCH_NS
    assert pacer.foreseen_end_ns() == pytest.approx(start + STEP_NS, abs=20_000)
    wanted = start + STEP_NS - LAUNCH_NS - LEAD_NS
    assert pacer.not_before_ns() == pytest.approx(wanted, abs=20_000)


def test_the_first_steps_and_steps_with_prompts_are_followed_at_once():
    pacer = StepPacer()
    assert pacer.not_before_ns() == 0
    pacer.launched(plan(16), 0, 10)
    assert pacer.not_before_ns() <= 10
    pacer.read(STEP_NS)
    now = steady(pacer, 16)
    pacer.launched(plan(16, prompt=50), now, now + 10)
    assert pacer.not_before_ns() == 0
    assert pacer.foreseen_end_ns() is None


def test_another_batch_size_is_learned_for_itself():
    pacer = StepPacer()
    now = steady(pacer, 16)
    pacer.launched(plan(100), now, now + 10)
    assert pacer.not_before_ns() == 0, "never seen"
    pacer.read(now + 4 * STEP_NS)
    now += 4 * STEP_NS
    pacer.launched(plan(100), now, now + 10)
    assert pacer.not_before_ns() > now + 2 * STEP_NS


def test_short_steps_are_followed_at_once():
    pacer = StepPacer()
    for i in range(20):
        pacer.launched(plan(1), 1000 * i, 1000 * i + 10)
        pacer.read(1000 * i + 900)
    pacer.launched(plan(1), 20_000, 20_010)
    assert pacer.not_before_ns() < 20_010
