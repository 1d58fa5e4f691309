"""Prefill and decode on two vLLM instances: handshakes, the seam after token 1, failures."""

from __future__ import annotations

import asyncio
import itertools

import pytest
from http_harness import vllm_front_door
from router_harness import PD, until

from pdrelay.core.messages import Abort, EngineRequest, Role
from pdrelay.core.sampling_params import SamplingParams
from pdrelay.core.token_ids import pack_ids
from pdrelay.errors import WorkerLostError
from pdrelay.router.engines.http_pd import HandOvers
from pdrelay.router.fakes.server import expected_tokens, token_at

PROMPT = [1, 2, 3, 4]
WAYS = [
    {"connector": "nixl"},
    {"connector": "pdrelay", "dispatch": "sequential"},
    {"connector": "pdrelay", "dispatch": "sequential", "announced": False},
    {"connector": "pdrelay", "dispatch": "concurrent"},
    {"connector": "pdrelay", "dispatch": "auto"},
    # by /v1/completions, where /inference/v1/generate is switched off
    {"connector": "nixl", "scale_out": False},
    {"connector": "pdrelay", "dispatch": "auto", "scale_out": False},
]
PENALTIES = {"presence_penalty": 0.5}


def ids(way):
    return "-".join(str(value) for value in way.values())


@pytest.fixture(params=WAYS, ids=ids)
def way(request):
    return request.param


def engine_request(prompt):
    params = SamplingParams(max_tokens=3, seed=0)
    return EngineRequest(
        request_id="a", prompt_token_ids=pack_ids(prompt), params=params, arrived_ns=0
    )


def kv(sent):
    return sent.get("kv_transfer_params")


async def test_same_tokens_by_every_way_and_nothing_is_held(way):
    async with vllm_front_door(PD, **way) as door:
        for temperature, extra in itertools.product((0, 1), ({}, PENALTIES)):
            for num in (1, 2, 7):
                choice = await door.complete(
                    PROMPT, max_tokens=num, temperature=temperature, **extra
                )
                assert choice["token_ids"] == expected_tokens(PROMPT, num)
                assert choice["finish_reason"] == "length"
        await door.idle()
        assert door.fakes["prefill-0"].world.held == {}


async def test_the_first_token_leaves_before_the_consumer_says_anything(way):
    async with vllm_front_door(PD, **way) as door:
        door.fakes["decode-0"].stall()
        body = {"prompt": PROMPT, "max_tokens": 3, "stream": True, "temperature": 0}
        async with door.session.post(door.url + "/v1/completions", json=body) as response:
            chunk = await response.content.readuntil(b"\n\n")
            assert chr(expected_tokens(PROMPT, 1)[0]).encode() in chunk
            door.fakes["decode-0"].resume()
            assert (await response.read()).endswith(b"data: [DONE]\n\n")
        await door.idle()


async def test_nixl_handshake():
    async with vllm_front_door(PD, connector="nixl") as door:
        await door.complete(PROMPT, max_tokens=5, min_tokens=3, temperature=0.5)
        (first,), (second,) = door.fakes["prefill-0"].requests, door.fakes["decode-0"].requests
        assert (first["max_tokens"], first["min_tokens"], first["stream"]) == (1, 1, False)
        assert kv(first) == {
            "do_remote_decode": True,
            "do_remote_prefill": False,
            "remote_engine_id": None,
            "remote_block_ids": None,
            "remote_host": None,
            "remote_port": None,
        }
        assert (second["max_tokens"], second["min_tokens"], second["stream"]) == (5, 3, True)
        assert second["prompt"] == PROMPT
        assert kv(second)["do_remote_prefill"] is True
        assert kv(second)["remote_block_ids"] == [1, 2]
        assert first["seed"] == second["seed"], "both are to draw the same token 1"


async def test_pdrelay_sequential_continues_after_token_one():
    async with vllm_front_door(PD, connector="pdrelay", dispatch="sequential") as door:
        await door.complete(PROMPT, max_tokens=5, min_tokens=3, temperature=0.5, seed=7)
        (first,), (second,) = door.fakes["prefill-0"].requests, door.fakes["decode-0"].requests
        transfer = kv(first)["pdrelay_transfer_id"]
        assert kv(first) == {"pdrelay_transfer_id": transfer, "do_remote_decode": True}
        assert kv(second) == {
            "pdrelay_transfer_id": transfer,
            "do_remote_prefill": True,
            "pdrelay_producer": "/run/producer.sock",
        }
        assert len(transfer) == 32
        assert second["prompt"] == [*PROMPT, *expected_tokens(PROMPT, 1)]
        assert (second["max_tokens"], second["min_tokens"]) == (4, 2)
        assert first["seed"] == 7
        assert second["seed"] != 7, "token 2 is not to be drawn with token 1's noise"
        await door.complete(PROMPT, max_tokens=5)
        other = kv(door.fakes["prefill-0"].requests[-1])["pdrelay_transfer_id"]
        assert other != transfer


async def test_auto_starts_both_at_once_where_both_draw_the_same():
    async with vllm_front_door(PD, connector="pdrelay") as door:
        producer, consumer = door.fakes["prefill-0"], door.fakes["decode-0"]
        producer.stall()
        for fields, at_once in (
            ({"temperature": 0}, True),
            ({"temperature": 1}, False),
            ({"temperature": 1, **PENALTIES}, True),
        ):
            before = len(consumer.requests)
            asked = len(producer.requests)
            task = asyncio.create_task(door.complete(PROMPT, max_tokens=3, **fields))
            await until(lambda asked=asked: len(producer.requests) > asked)
            if at_once:
                await until(lambda before=before: len(consumer.requests) > before)
                assert consumer.requests[-1]["prompt"] == PROMPT
            producer.resume()
            assert (await task)["token_ids"] == expected_tokens(PROMPT, 3)
            if not at_once:
                assert len(consumer.requests[-1]["prompt"]) == len(PROMPT) + 1
            producer.stall()
        producer.resume()
        await door.idle()


async def test_penalties_that_count_output_make_the_consumer_draw_token_one():
    async with vllm_front_door(PD, connector="pdrelay", dispatch="sequential") as door:
        await door.complete(PROMPT, max_tokens=4, frequency_penalty=1.0)
        (first,), (second,) = door.fakes["prefill-0"].requests, door.fakes["decode-0"].requests
        assert second["prompt"] == PROMPT
        assert second["max_tokens"] == 4
        assert first["seed"] == second["seed"]


@pytest.mark.parametrize("way", [WAYS[0], WAYS[3]], ids=ids)
async def test_another_token_one_makes_the_consumer_continue_after_the_producers(way):
    async with vllm_front_door(PD, step_s=0.002, **way) as door:
        door.fakes["decode-0"].disagree = True
        choice = await door.complete(PROMPT, max_tokens=60, min_tokens=2, temperature=0)
        first = expected_tokens(PROMPT, 1)
        assert choice["token_ids"][:1] == first
        assert len(choice["token_ids"]) == 60
        _, again = door.fakes["decode-0"].requests
        assert again["prompt"] == [*PROMPT, *first]
        assert (again["max_tokens"], again["min_tokens"]) == (59, 1)
        assert kv(again) is None
        await until(lambda: door.fakes["decode-0"].aborted == [PROMPT])
        await door.idle()


async def test_one_token_needs_no_consumer(way):
    async with vllm_front_door(PD, **way) as door:
        choice = await door.complete(PROMPT, max_tokens=1)
        assert choice["finish_reason"] == "length"
        assert door.fakes["decode-0"].requests == []
        assert kv(door.fakes["prefill-0"].requests[0]) is None, "nothing is to be held for nobody"
        await door.idle()


async def test_a_stop_on_token_one_ends_the_request(way):
    async with vllm_front_door(PD, **way) as door:
        stop = expected_tokens(PROMPT, 1)[0]
        for fields, reason in (
            ({"stop_token_ids": [stop]}, stop),
            ({"stop": [chr(stop)]}, chr(stop)),
        ):
            choice = await door.complete(PROMPT, max_tokens=6, temperature=0, **fields)
            assert (choice["text"], choice["finish_reason"]) == ("", "stop")
            assert choice["stop_reason"] == reason
            await door.idle()


async def test_characters_and_stop_strings_across_the_seam(way):
    async with vllm_front_door(PD, **way) as door:
        for fake in door.fakes.values():
            fake.spell = (len(PROMPT), "€uro".encode())
        choice = await door.complete(PROMPT, max_tokens=20, temperature=0)
        assert (choice["text"], choice["finish_reason"]) == ("€uro", "stop")
        choice = await door.complete(PROMPT, max_tokens=20, temperature=0, stop=["€u"])
        assert (choice["text"], choice["stop_reason"]) == ("", "€u")
        events = await door.events(
            "/v1/completions",
            {"prompt": PROMPT, "max_tokens": 20, "stream_options": {"include_usage": True}},
        )
        text = "".join(e["choices"][0]["text"] for e in events[:-1] if e["choices"])
        assert text == "€uro"
        assert events[-2]["usage"] == {
            "prompt_tokens": 4,
            "completion_tokens": 7,
            "total_tokens": 11,
            "prompt_tokens_details": {"cached_tokens": 3},
        }
        await door.idle()


async def test_logprobs_n_and_echo_come_from_both_sides(way):
    async with vllm_front_door(PD, **way) as door:
        status, answer = await door.post(
            "/v1/completions",
            {"prompt": PROMPT, "max_tokens": 4, "n": 2, "logprobs": 1, "temperature": 0.3},
        )
        assert status == 200
        for choice in answer["choices"]:
            assert choice["logprobs"]["token_logprobs"] == [-0.5] * 4
        assert answer["usage"]["completion_tokens"] == 8
        seeds = [sent["seed"] for sent in door.fakes["prefill-0"].requests if "seed" in sent]
        assert len(seeds) == len(set(seeds))
        echoed = await door.complete([65, 66, 67], max_tokens=3, echo=True, logprobs=1)
        assert echoed["logprobs"]["token_logprobs"] == [None, -1.5, -1.5, -0.5, -0.5, -0.5]
        assert "prompt_logprobs" not in door.fakes["decode-0"].requests[-1]
        await door.idle()


async def test_clients_own_transfer_fields_reach_nobody(way):
    async with vllm_front_door(PD, **way) as door:
        evil = {
            "kv_transfer_params": {"do_remote_prefill": True, "remote_host": "evil"},
            "bootstrap_host": "evil",
            "bootstrap_room": 1,
            "pdrelay_transfer_id": "evil",
        }
        await door.complete(PROMPT, max_tokens=3, temperature=0, **evil)
        status, _ = await door.post(
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": "x"}], "max_tokens": 3, **evil},
        )
        assert status == 200
        sent = [body for fake in door.fakes.values() for body in fake.requests]
        assert len(sent) == 4
        assert "evil" not in str(sent)


async def test_a_client_that_leaves_is_gone_from_both_sides(way):
    async with vllm_front_door(PD, **way) as door:
        producer, consumer = door.fakes["prefill-0"], door.fakes["decode-0"]
        body = {"prompt": PROMPT, "max_tokens": 9, "temperature": 0}
        producer.stall()
        leaving = asyncio.create_task(door.post("/v1/completions", body))
        await until(lambda: producer.running == 1)
        leaving.cancel()
        await until(lambda: producer.aborted == [PROMPT])
        await until(lambda: door.flow.num_requests == 0)
        await door.idle()
        producer.resume()
        consumer.stall()
        leaving = asyncio.create_task(door.post("/v1/completions", body))
        await until(lambda: consumer.running == 1 and not producer.running)
        leaving.cancel()
        await until(lambda: consumer.aborted)
        await until(lambda: door.flow.num_requests == 0)
        consumer.resume()
        await door.idle()


@pytest.mark.parametrize("victim", ["prefill-0", "decode-0"])
async def test_an_instance_that_dies_fails_its_requests_at_once(way, victim):
    async with vllm_front_door(PD, **way) as door:
        fake = door.fakes[victim]
        fake.stall()
        body = {"prompt": PROMPT, "max_tokens": 9, "temperature": 0}
        lost = asyncio.create_task(door.events("/v1/completions", body))
        await until(lambda: fake.running == 1)
        if victim == "decode-0":
            await until(lambda: not door.fakes["prefill-0"].running)
            await until(lambda: door.fakes["prefill-0"].requests)
        await fake.stop()
        if victim == "prefill-0":  # nothing was streamed yet: an error of its own status
            with pytest.raises(AssertionError, match="worker_lost"):
                await lost
        else:
            events = await lost
            assert events[-1]["error"]["code"] == "worker_lost"
            assert victim in events[-1]["error"]["message"]
        other = door.fakes["decode-0" if victim == "prefill-0" else "prefill-0"]
        await until(lambda: not other.running)
        await until(lambda: not door.clients[victim].alive)
        status, answer = await door.post("/v1/completions", body)
        assert (status, answer["error"]["code"]) == (503, "worker_lost")
        assert victim in answer["error"]["message"]
        assert (await door.health())[0] == 503


@pytest.mark.parametrize("victim", ["prefill-0", "decode-0"])
async def test_a_refusal_by_either_side_is_the_answer(way, victim):
    async with vllm_front_door(PD, **way) as door:
        door.fakes[victim].refuse = (400, "too long for me")
        body = {"prompt": PROMPT, "max_tokens": 9, "temperature": 0}
        events_or_status = await door.post("/v1/completions", body)
        assert events_or_status[0] == 400
        assert "too long for me" in events_or_status[1]["error"]["message"]
        await door.idle()


async def test_an_answer_without_handles_is_told():
    async with vllm_front_door(PD, connector="nixl") as door:
        door.fakes["prefill-0"]._hold = lambda body: None
        status, answer = await door.post(
            "/v1/completions", {"prompt": PROMPT, "max_tokens": 3, "temperature": 0}
        )
        assert status == 503
        assert "without kv_transfer_params" in answer["error"]["message"]
        await door.idle()


async def test_consumers_and_producers_share_the_load(way):
    roles = {
        "prefill-0": Role.PREFILL,
        "prefill-1": Role.PREFILL,
        "decode-0": Role.DECODE,
        "decode-1": Role.DECODE,
    }
    async with vllm_front_door(roles, step_s=0.001, **way) as door:
        prompts = [[i, i + 1, i + 2] for i in range(1, 41)]
        choices = await asyncio.gather(
            *(door.complete(prompt, max_tokens=5, temperature=0) for prompt in prompts)
        )
        for prompt, choice in zip(prompts, choices, strict=True):
            assert choice["token_ids"] == expected_tokens(prompt, 5)
        counts = {name: len(fake.requests) for name, fake in door.fakes.items()}
        assert all(count >= 10 for count in counts.values()), counts
        await door.idle()
        assert door.fakes["prefill-0"].world.held == {}


async def test_the_record_names_both_and_where_each_token_was_sampled(tmp_path):
    async with vllm_front_door(PD, connector="pdrelay", log_path=tmp_path / "log") as door:
        await door.complete(PROMPT, max_tokens=3, temperature=0)
        (record,) = door.records()
        assert record["instances"] == ["prefill-0", "decode-0"]
        assert record["num_cached_tokens"] == 3
        tokens = [e["instance"] for e in record["events"] if e["kind"] in ("first_token", "token")]
        assert tokens == ["prefill-0", "decode-0", "decode-0"]


def test_the_fakes_tokens_depend_on_prompt_and_position():
    seen = {tuple(expected_tokens([i, 2, 3], 4)) for i in range(40)}
    assert len(seen) > 20
    assert token_at([1], 1) != token_at([1], 2)


@pytest.mark.parametrize("order", [("produce", "consume"), ("consume", "produce")])
async def test_the_producers_leg_begins_first_in_either_order_of_messages(order):
    begun = []

    class Style:
        async def produce(self, hand_over):
            begun.append(("produce", hand_over.producer))

        async def consume(self, hand_over, consumer):
            begun.append(("consume", consumer))

    hand_overs, request = HandOvers(Style()), engine_request([1, 2])
    works = [getattr(hand_overs, leg)(request, leg[0]) for leg in order]
    async with asyncio.timeout(20):
        await asyncio.gather(*(work() for work in works))
    assert begun == [("produce", "p"), ("consume", "c")]


async def test_a_producer_that_takes_no_message_leaves_no_call_to_the_consumer(monkeypatch):
    async with vllm_front_door(PD, connector="pdrelay") as door:

        def refuse(message):
            if not isinstance(message, Abort):
                raise WorkerLostError("it is gone; try again")

        with monkeypatch.context() as patch:
            patch.setattr(door.clients["prefill-0"], "send", refuse)
            body = {"prompt": PROMPT, "max_tokens": 3}
            assert (await door.post("/v1/completions", body))[0] == 503
        await door.idle()
        assert not door.fakes["decode-0"].requests
