"""SGLang instances: replicas, and prefill and decode by its bootstrap protocol."""

from __future__ import annotations

import asyncio

import pytest
from http_harness import sglang_front_door
from router_harness import PD, until

from pdrelay.core.messages import Role
from pdrelay.router.fakes.server import expected_tokens

PROMPT = [1, 2, 3, 4]
INCREMENTAL = pytest.mark.parametrize("incremental", [False, True], ids=["cumulative", "delta"])
TOPOLOGIES = pytest.mark.parametrize("roles", [{"replica-0": Role.BOTH}, PD], ids=["one", "pd"])


@INCREMENTAL
@TOPOLOGIES
async def test_tokens_text_and_usage(roles, incremental, tmp_path):
    async with sglang_front_door(roles, incremental=incremental, log_path=tmp_path / "log") as door:
        for num in (1, 2, 7):
            choice = await door.complete(PROMPT, max_tokens=num, temperature=0)
            assert choice["token_ids"] == expected_tokens(PROMPT, num)
            assert choice["finish_reason"] == "length"
        body = {"prompt": PROMPT, "max_tokens": 5, "stream_options": {"include_usage": True}}
        events = await door.events("/v1/completions", body)
        assert events[-1] == "[DONE]"
        assert events[-2]["usage"]["completion_tokens"] == 5
        await door.idle()
        assert door.records()[0]["instances"] == list(roles)


@INCREMENTAL
@TOPOLOGIES
async def test_characters_stop_strings_and_stop_ids(roles, incremental):
    async with sglang_front_door(roles, incremental=incremental) as door:
        for fake in door.fakes.values():
            fake.spell = (len(PROMPT), "€uro".encode())
        choice = await door.complete(PROMPT, max_tokens=20)
        assert (choice["text"], choice["finish_reason"]) == ("€uro", "stop")
        choice = await door.complete(PROMPT, max_tokens=20, stop=["€u"])
        assert (choice["text"], choice["stop_reason"]) == ("", "€u")
        choice = await door.complete(PROMPT, max_tokens=20, stop_token_ids=[ord("r")])
        assert (choice["text"], choice["stop_reason"]) == ("€u", ord("r"))
        choice = await door.complete(PROMPT, max_tokens=7, ignore_eos=True)
        assert choice["finish_reason"] == "length"
        await door.idle()


@INCREMENTAL
@TOPOLOGIES
async def test_logprobs_and_echo(roles, incremental):
    async with sglang_front_door(roles, incremental=incremental) as door:
        choice = await door.complete(PROMPT, max_tokens=4, logprobs=2, temperature=0)
        assert choice["logprobs"]["token_logprobs"] == [-0.5] * 4
        assert [len(top) for top in choice["logprobs"]["top_logprobs"]] == [2] * 4
        echoed = await door.complete([65, 66, 67], max_tokens=2, echo=True, logprobs=1)
        assert echoed["text"].startswith("ABC")
        assert echoed["logprobs"]["token_logprobs"] == [None, -1.5, -1.5, -0.5, -0.5]


async def test_both_sides_get_one_body_and_one_room():
    async with sglang_front_door(PD) as door:
        evil = {"bootstrap_host": "evil", "bootstrap_port": 6, "bootstrap_room": 7}
        await door.complete(PROMPT, max_tokens=5, min_tokens=2, temperature=0.5, seed=3, **evil)
        (first,), (second,) = door.fakes["prefill-0"].requests, door.fakes["decode-0"].requests
        assert first.pop("stream") is False
        assert second.pop("stream") is True
        assert first == second
        assert (first["bootstrap_host"], first["bootstrap_port"]) == ("127.0.0.1", 9000)
        room = first["bootstrap_room"]
        assert room > 1 << 20
        assert first["input_ids"] == PROMPT
        assert first["sampling_params"] == {
            "max_new_tokens": 5,
            "min_new_tokens": 2,
            "temperature": 0.5,
            "top_p": 1.0,
            "top_k": -1,
            "min_p": 0.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "repetition_penalty": 1.0,
            "ignore_eos": False,
            "stop_token_ids": [257],
            "skip_special_tokens": False,
            "sampling_seed": 3,
        }
        await door.complete(PROMPT, max_tokens=5)
        assert door.fakes["prefill-0"].requests[-1]["bootstrap_room"] != room
        await door.idle()


async def test_the_consumer_tells_what_the_producer_had_cached():
    async with sglang_front_door(PD) as door:
        door.fakes["prefill-0"].step_s = 60.0  # its answer comes too late
        status, answer = await door.post("/v1/completions", {"prompt": PROMPT, "max_tokens": 1})
        assert status == 200
        assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 3


async def test_what_sglang_cannot_do_is_refused():
    async with sglang_front_door() as door:
        body = {"prompt": PROMPT, "ignore_eos": True, "stop_token_ids": [5]}
        status, answer = await door.post("/v1/completions", body)
        assert (status, answer["error"]["code"]) == (400, "invalid_request")
        assert door.fakes["replica-0"].requests == []
        door.fakes["replica-0"].without_ids = True
        status, answer = await door.post("/v1/completions", {"prompt": PROMPT})
        assert status == 500
        assert "output_ids" in answer["error"]["message"]


@pytest.mark.parametrize("victim", ["prefill-0", "decode-0"])
async def test_death_refusal_and_leaving_clients(victim):
    async with sglang_front_door(PD) as door:
        body = {"prompt": PROMPT, "max_tokens": 9, "temperature": 0}
        fake = door.fakes[victim]
        fake.refuse = (400, "not mine")
        status, answer = await door.post("/v1/completions", body)
        assert status == 400
        assert "not mine" in answer["error"]["message"]
        fake.refuse = None
        await door.idle()

        fake.stall()
        leaving = asyncio.create_task(door.post("/v1/completions", body))
        await until(lambda: all(each.running for each in door.fakes.values()))
        leaving.cancel()
        await until(lambda: all(each.aborted[-1:] == [PROMPT] for each in door.fakes.values()))
        await until(lambda: door.flow.num_requests == 0)
        await door.idle()

        lost = asyncio.create_task(door.post("/v1/completions", body))
        await until(lambda: all(each.running for each in door.fakes.values()))
        await fake.stop()
        status, answer = await lost
        assert (status, answer["error"]["code"]) == (503, "worker_lost")
        assert victim in answer["error"]["message"]
        await until(lambda: not any(each.running for each in door.fakes.values()))


async def test_a_stream_that_fails_is_an_error_event():
    async with sglang_front_door(PD) as door:
        body = {"prompt": PROMPT, "max_tokens": 9}
        door.fakes["decode-0"].error_at = 3
        events = await door.events("/v1/completions", body)
        assert "KV transfer failed" in events[-1]["error"]["message"]
        door.fakes["decode-0"].error_at, door.fakes["decode-0"].fail_at = None, 3
        events = await door.events("/v1/completions", body)
        assert events[-1]["error"]["code"] == "worker_lost"
        await door.idle()


async def test_many_at_once_over_several_pairs():
    roles = {f"prefill-{i}": Role.PREFILL for i in range(2)}
    roles |= {f"decode-{i}": Role.DECODE for i in range(2)}
    async with sglang_front_door(roles, step_s=0.001) as door:
        prompts = [[i, i + 1, i + 2] for i in range(1, 41)]
        choices = await asyncio.gather(*(door.complete(p, max_tokens=5) for p in prompts))
        for prompt, choice in zip(prompts, choices, strict=True):
            assert choice["token_ids"] == expected_tokens(prompt, 5)
        await door.idle()
