"""Workers that die, fail, stall or answer out of order."""

from __future__ import annotations

import asyncio

import openai
import pytest
from router_harness import PD, REPLICA, FrontDoor, front_door, parse_sse, until

from pdrelay.core.messages import Abort, Expect, Meet, Output, Prefill, Role, StepResult
from pdrelay.errors import WorkerLostError
from pdrelay.router.config import RouterConfig

BODY = {"prompt": "hello", "max_tokens": 50}
STREAMED = pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
VICTIMS = pytest.mark.parametrize("victim", ["prefill-0", "decode-0"])


def ask(front: FrontDoor, **changes) -> asyncio.Task:
    return asyncio.create_task(front.post("/v1/completions", {**BODY, **changes}))


async def in_flight(front: FrontDoor, count: int = 1) -> None:
    await until(lambda: front.flow.num_requests == count)


@STREAMED
@VICTIMS
async def test_death_before_the_first_byte_is_a_503(stream, victim) -> None:
    async with front_door(PD, auto=False) as front:
        asking = ask(front, stream=stream)
        await in_flight(front)
        front.clients[victim].kill("was killed by SIGKILL")
        status, body, headers = await asking
        assert status == 503 and headers["Retry-After"] == "1"
        assert body["error"]["code"] == "worker_lost"
        assert victim in body["error"]["message"] and "SIGKILL" in body["error"]["message"]
        other = "decode-0" if victim == "prefill-0" else "prefill-0"
        assert len(front.sent(other, Abort)) == 1
        front.assert_idle()


@VICTIMS
async def test_death_in_mid_stream_is_an_error_event(victim) -> None:
    async with front_door(PD, auto=False) as front:
        asking = asyncio.create_task(
            front.session.post(front.url + "/v1/completions", json={**BODY, "stream": True})
        )
        await in_flight(front)
        front.step("prefill-0")
        async with await asking as response:
            first = await response.content.readuntil(b"\n\n")
            front.clients[victim].kill()
            events = parse_sse((first + await response.content.read()).decode())
        assert response.status == 200 and events[0]["choices"][0]["text"]
        assert events[-1]["error"]["code"] == "worker_lost" and "[DONE]" not in events
        front.assert_idle()


async def test_openai_client_raises_on_the_error_event() -> None:
    async with front_door(REPLICA, auto=False) as front:
        creating = asyncio.create_task(
            front.openai().completions.create(model="tiny", prompt="x", stream=True)
        )
        await in_flight(front)
        front.step("replica-0")
        stream = await creating
        front.clients["replica-0"].kill()
        with pytest.raises(openai.APIError, match="was lost"):
            async for _ in stream:
                pass


async def test_a_producer_may_die_once_the_consumer_has_all() -> None:
    async with front_door(PD, auto=False) as front:
        asking = ask(front, max_tokens=3)
        await in_flight(front)
        front.step("prefill-0")
        producer = front.flow._cluster.load_of("prefill-0")
        assert (producer.tokens, producer.requests) == (0, 1)
        front.step("decode-0")
        assert producer.requests == 0, "what the consumer holds is no load of the producer"
        front.clients["prefill-0"].kill()
        front.step("decode-0")
        status, body, _ = await asking
        assert status == 200 and len(body["choices"][0]["text"]) == 3
        front.assert_idle()


async def test_nobody_left_is_a_503_and_a_restart_heals() -> None:
    async with front_door(PD) as front:
        assert (await front.get("/health"))[0] == 200
        front.clients["decode-0"].kill("ran out of memory")
        status, body = await front.get("/health")
        assert status == 503 and body["instances"] == {"decode-0": "ran out of memory"}
        status, body, headers = await front.post("/v1/completions", BODY)
        assert status == 503 and "Retry-After" in headers
        assert "ran out of memory" in body["error"]["message"]
        front.clients["decode-0"].restart()
        assert (await front.get("/health"))[0] == 200
        assert (await front.post("/v1/completions", BODY))[0] == 200
        front.assert_idle()


async def test_the_supervisors_word_counts_for_health() -> None:
    down = {"replica-0": "restarting: killed"}
    async with front_door(REPLICA, down=lambda: down) as front:
        assert await front.get("/health") == (503, {"status": "unavailable", "instances": down})
        down.clear()
        assert (await front.get("/health"))[0] == 200


async def test_others_go_on_when_one_of_two_pairs_dies() -> None:
    topology = {
        "prefill-0": Role.PREFILL,
        "prefill-1": Role.PREFILL,
        "decode-0": Role.DECODE,
        "decode-1": Role.DECODE,
    }
    async with front_door(topology, auto=False) as front:
        asking = [ask(front, prompt=str(i) * 20, max_tokens=2) for i in range(4)]
        await in_flight(front, 4)
        assert all(len(c.engine.request_ids) == 2 for c in front.clients.values())
        front.clients["decode-1"].kill()
        front.step("prefill-0", "prefill-1", "decode-0")
        statuses = sorted([(await each)[0] for each in asking])
        assert statuses == [200, 200, 503, 503]
        front.assert_idle()


@VICTIMS
async def test_a_failure_from_one_side_aborts_the_other(victim) -> None:
    async with front_door(PD, auto=False) as front:
        asking = ask(front)
        await in_flight(front)
        (request_id,) = front.engine(victim).request_ids
        front.engine(victim).fail(request_id, 504, "deadline_exceeded", "hand-over took 30 s")
        status, body, _ = await asking
        assert (status, body["error"]["message"]) == (504, "hand-over took 30 s")
        other = "decode-0" if victim == "prefill-0" else "prefill-0"
        assert [m.request_id for m in front.sent(other, Abort)] == [request_id]
        assert front.sent(victim, Abort) == []
        front.assert_idle()


@VICTIMS
async def test_an_instance_that_takes_no_message_leaves_nothing_at_the_other(
    monkeypatch, victim
) -> None:
    async with front_door(PD, auto=False) as front:

        def refuse(message) -> None:
            if not isinstance(message, Abort):
                raise WorkerLostError("its socket is full; try again")

        monkeypatch.setattr(front.clients[victim], "send", refuse)
        status, body, _ = await ask(front)
        assert status == 503 and "its socket is full" in body["error"]["message"]
        if victim == "prefill-0":  # it is told last
            (expected,), (aborted,) = (front.sent("decode-0", kind) for kind in (Expect, Abort))
            assert aborted.request_id == expected.request.request_id
        else:
            assert front.sent("prefill-0", Prefill) == []
        front.assert_idle()


async def test_failure_of_one_choice_ends_the_response() -> None:
    async with front_door(REPLICA, auto=False) as front:
        asking = ask(front, n=3)
        await in_flight(front, 3)
        request_id = front.engine("replica-0").request_ids[1]
        front.engine("replica-0").fail(request_id, 429, "overloaded", "no blocks")
        status, body, headers = await asking
        assert status == 429 and headers["Retry-After"] and body["error"]["code"] == "overloaded"
        await until(lambda: not front.flow.num_requests)
        front.assert_idle()


async def test_the_consumer_cannot_overtake_the_producer() -> None:
    """Its tokens wait at the front door for the first one."""
    async with front_door(PD, auto=False) as front:
        asking = ask(front, max_tokens=4, return_token_ids=True)
        await in_flight(front)
        (request_id,) = front.engine("decode-0").request_ids

        def say(instance: str, *token_ids: int, finish: str | None = None) -> None:
            output = Output(request_id=request_id, token_ids=list(token_ids), finish_reason=finish)
            front.flow.on_step(instance, StepResult(t_ns=1, outputs=[output]))

        say("decode-0", 98)
        say("decode-0", 99, 100, finish="length")
        assert front.flow.num_requests == 1
        say("prefill-0", 97)
        status, body, _ = await asking
        assert status == 200 and body["choices"][0]["token_ids"] == [97, 98, 99, 100]


async def test_late_outputs_of_a_finished_request_are_ignored() -> None:
    async with front_door(REPLICA) as front:
        late = Output(request_id="gone", token_ids=[1], finish_reason="length")
        front.flow.on_step("replica-0", StepResult(t_ns=1, outputs=[late]))
        assert (await front.post("/v1/completions", BODY))[0] == 200


@STREAMED
async def test_deadline_of_a_stalled_request(stream) -> None:
    async with front_door(PD, auto=False, config=RouterConfig(request_timeout_s=0.05)) as front:
        status, body, _ = await ask(front, stream=stream)
        assert status == 504 and body["error"]["code"] == "deadline_exceeded"
        for instance in PD:
            assert len(front.sent(instance, Abort)) == 1
        front.assert_idle()


async def test_deadline_of_the_first_token_only() -> None:
    config = RouterConfig(first_token_timeout_s=0.05)
    async with front_door(REPLICA, auto=False, config=config) as front:
        status, body, _ = await ask(front)
        assert status == 504 and "first token" in body["error"]["message"]
        asking = ask(front, max_tokens=2)
        await in_flight(front)
        front.step("replica-0")
        await asyncio.sleep(0.1)
        front.step("replica-0")
        assert (await asking)[0] == 200


async def test_a_stalled_worker_gets_nothing_new() -> None:
    async with front_door(["replica-0", "replica-1"], auto=False) as front:
        front.engine("replica-0").stalled = True
        assert (await front.get("/health"))[0] == 503
        asking = ask(front, max_tokens=1)
        await in_flight(front)
        front.step("replica-1")
        assert (await asking)[0] == 200


async def test_a_bug_in_one_stream_spares_the_others(monkeypatch) -> None:
    async with front_door(REPLICA, auto=False) as front:
        asking = [ask(front, max_tokens=1), ask(front, max_tokens=1)]
        await in_flight(front, 2)
        flights = list(front.flow._flights.values())
        monkeypatch.setattr(flights[0].sink, "on_output", lambda output: 1 / 0)
        front.step("replica-0")
        assert sorted([(await each)[0] for each in asking]) == [200, 500]
        front.assert_idle()


async def test_a_restarted_worker_has_no_prefix_cache() -> None:
    prompt = [97] * 200
    async with front_door(["replica-0", "replica-1"]) as front:
        index = front.flow._cluster._affinity._index
        await front.post("/v1/completions", {"prompt": prompt, "max_tokens": 1})
        (message,) = front.clients["replica-0"].sent
        keys = index.keys(message.request)
        assert index.longest(keys) == ("replica-0", 192)
        front.clients["replica-0"].kill()
        assert index.longest(keys) is None


async def test_producers_meet_consumers_before_prompts_come() -> None:
    async with front_door(PD) as front:
        await until(lambda: front.sent("prefill-0", Meet))
        ready = front.clients["decode-0"].ready
        assert ready is not None
        assert front.sent("prefill-0", Meet) == [Meet("decode-0", ready.peer_address)]
        assert not front.sent("decode-0", Meet)
        status, _, _ = await front.post("/v1/completions", BODY)
        assert status == 200
    async with front_door(REPLICA) as front:
        assert all(not front.sent(instance, Meet) for instance in front.clients)
