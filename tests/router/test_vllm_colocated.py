"""vLLM instances as replicas: what is sent, what comes back, what failures become."""

from __future__ import annotations

import asyncio

import pytest
from http_harness import vllm_front_door
from router_harness import until

from pdrelay.router.engines.vllm_stats import read_stats
from pdrelay.router.fakes.server import expected_tokens

PROMPT = [1, 2, 3, 4]


@pytest.fixture(params=[True, False], ids=["generate", "completions"])
def scale_out(request):
    """Whether the instances have /inference/v1/generate."""
    return request.param


async def test_tokens_are_relayed_whole_and_streamed(tmp_path, scale_out):
    async with vllm_front_door(scale_out=scale_out, log_path=tmp_path / "log") as door:
        choice = await door.complete(PROMPT, max_tokens=6, temperature=0)
        assert choice["token_ids"] == expected_tokens(PROMPT, 6)
        assert choice["text"] == bytes(choice["token_ids"]).decode()
        assert choice["finish_reason"] == "length"
        events = await door.events("/v1/completions", {"prompt": PROMPT, "max_tokens": 6})
        assert events[-1] == "[DONE]"
        text = "".join(event["choices"][0]["text"] for event in events[:-1])
        assert text == choice["text"]
        await door.idle()
        first, second = door.records()
        assert first["instances"] == ["replica-0"]
        assert first["num_output_tokens"] == second["num_output_tokens"] == 6
        assert first["num_cached_tokens"] == 3


async def test_every_sampling_parameter_is_sent_and_nothing_else(scale_out):
    async with vllm_front_door(scale_out=scale_out, api_key="secret") as door:
        await door.complete(
            PROMPT,
            max_tokens=3,
            min_tokens=2,
            temperature=0.5,
            top_p=0.9,
            top_k=7,
            min_p=0.1,
            seed=11,
            presence_penalty=0.25,
            frequency_penalty=-0.25,
            repetition_penalty=1.5,
            logit_bias={"97": 2.0},
            stop=["zzzz"],
            stop_token_ids=[258],
            cache_salt="salt",
            # what clients are not to reach the engine with
            kv_transfer_params={"do_remote_prefill": True, "remote_host": "evil"},
            bootstrap_host="evil",
            bootstrap_port=1,
            bootstrap_room=2,
            priority=-5,
            allowed_token_ids=[1],
            vllm_xargs={"a": 1},
        )
        (sent,) = door.fakes["replica-0"].requests
        assert sent == {
            "model": "tiny",
            "prompt": PROMPT,
            "max_tokens": 3,
            "min_tokens": 2,
            "temperature": 0.5,
            "top_p": 0.9,
            "top_k": 7,
            "min_p": 0.1,
            "seed": 11,
            "presence_penalty": 0.25,
            "frequency_penalty": -0.25,
            "repetition_penalty": 1.5,
            "logit_bias": {"97": 2.0},
            "stop_token_ids": [257, 258],
            "ignore_eos": True,
            "skip_special_tokens": False,
            "stream": True,
            "stream_options": {"include_usage": True},
            "cache_salt": "salt",
            **({"tokens_only": True} if scale_out else {"return_token_ids": True}),
        }


async def test_each_request_takes_the_api_that_answers_it(scale_out):
    async with vllm_front_door(scale_out=scale_out) as door:
        for asked in ({}, {"logprobs": 1}, {"echo": True, "logprobs": 0}):
            await door.complete([65, 66, 67], max_tokens=2, **asked)
        sent = door.fakes["replica-0"].requests
        by_generate = [request.get("tokens_only", False) for request in sent]
        assert by_generate == [scale_out, False, False]


async def test_an_attached_instance_restarted_without_the_api_serves_on():
    async with vllm_front_door() as door:
        fake, client = door.fakes["replica-0"], door.clients["replica-0"]
        port = int(fake.url.rpartition(":")[2])
        await door.complete(PROMPT, max_tokens=2)
        fake.scale_out = False
        for stream in (False, True):  # before anything was noticed
            body = {"prompt": PROMPT, "max_tokens": 2, "stream": stream}
            async with door.session.post(door.url + "/v1/completions", json=body) as response:
                assert response.status == 200
        sent = [request.get("tokens_only", False) for request in fake.requests]
        assert sent == [True, False, False]
        await fake.stop()
        await until(lambda: not client.alive)
        fake.scale_out, fake.version, fake.max_model_len = True, "0.33.0", 99
        await fake.start(port)
        await until(lambda: client.ready.resolved["engine_version"] == "0.33.0")
        assert client.ready.max_model_len == 99
        await door.complete(PROMPT, max_tokens=2)
        assert fake.requests[-1]["tokens_only"]


async def test_no_seed_is_sent_unless_the_client_gave_one():
    async with vllm_front_door() as door:
        await door.complete(PROMPT, max_tokens=1)
        await door.complete(PROMPT, max_tokens=1, temperature=0, seed=5)
        assert all("seed" not in sent for sent in door.fakes["replica-0"].requests)


async def test_text_across_tokens_stop_strings_and_end_of_sequence(scale_out):
    async with vllm_front_door(scale_out=scale_out) as door:
        fake = door.fakes["replica-0"]
        fake.spell = (len(PROMPT), "naïve €uro".encode())
        whole = await door.complete(PROMPT, max_tokens=50)
        assert whole["text"] == "naïve €uro"
        assert (whole["finish_reason"], whole["stop_reason"]) == ("stop", None)
        stopped = await door.complete(PROMPT, max_tokens=50, stop=["€u"])
        assert (stopped["text"], stopped["stop_reason"]) == ("naïve ", "€u")
        by_id = await door.complete(PROMPT, max_tokens=50, stop_token_ids=[ord("v")])
        assert (by_id["text"], by_id["stop_reason"]) == ("naï", ord("v"))
        cut = await door.complete(PROMPT, max_tokens=3)
        assert cut["text"] == "na\ufffd"
        on = await door.complete(PROMPT, max_tokens=15, ignore_eos=True, skip_special_tokens=False)
        assert on["finish_reason"] == "length"
        assert on["text"].endswith("€uro<|eos|><|eos|>")
        await door.idle()


async def test_logprobs_n_and_echo():
    async with vllm_front_door() as door:
        status, answer = await door.post(
            "/v1/completions",
            {"prompt": PROMPT, "max_tokens": 3, "n": 3, "logprobs": 2, "temperature": 0},
        )
        assert status == 200
        assert len(answer["choices"]) == 3
        logprobs = answer["choices"][2]["logprobs"]
        assert logprobs["token_logprobs"] == [-0.5] * 3
        assert [len(top) for top in logprobs["top_logprobs"]] == [2, 2, 2]
        assert answer["usage"] == {
            "prompt_tokens": 4,
            "completion_tokens": 9,
            "total_tokens": 13,
            "prompt_tokens_details": {"cached_tokens": 3},
        }
        echoed = await door.complete([65, 66, 67], max_tokens=2, echo=True, logprobs=1)
        assert echoed["text"].startswith("ABC")
        assert echoed["logprobs"]["token_logprobs"] == [None, -1.5, -1.5, -0.5, -0.5]
        assert door.fakes["replica-0"].requests[-1]["prompt_logprobs"] == 1
        await door.idle()


async def test_chat_is_rendered_here():
    async with vllm_front_door() as door:
        status, answer = await door.post(
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2},
        )
        assert status == 200
        assert len(answer["choices"][0]["message"]["content"]) == 2
        (sent,) = door.fakes["replica-0"].requests
        assert sent["prompt"] == [256, 259, *b"hi", 261, 260]


@pytest.mark.parametrize(
    ("status", "ours", "code"),
    [
        (400, 400, "invalid_request"),
        (429, 429, "overloaded"),
        (401, 500, "internal_error"),
        (500, 503, "worker_lost"),
        (503, 503, "worker_lost"),
        (504, 504, "deadline_exceeded"),
    ],
)
async def test_refusals_keep_their_meaning(status, ours, code, scale_out):
    async with vllm_front_door(scale_out=scale_out) as door:
        door.fakes["replica-0"].refuse = (status, "because")
        got, answer = await door.post("/v1/completions", {"prompt": PROMPT, "max_tokens": 2})
        assert (got, answer["error"]["code"]) == (ours, code)
        assert "because" in answer["error"]["message"]
        assert "replica-0" in answer["error"]["message"]
        await door.idle()


async def test_stream_that_breaks_off_is_an_error_event_and_no_done(scale_out):
    async with vllm_front_door(scale_out=scale_out) as door:
        fake = door.fakes["replica-0"]
        body = {"prompt": PROMPT, "max_tokens": 8}
        fake.fail_at = 3
        events = await door.events("/v1/completions", body)
        assert events[-1]["error"]["code"] == "worker_lost"
        fake.fail_at, fake.error_at = None, 3
        events = await door.events("/v1/completions", body)
        assert "EngineCore encountered an issue" in events[-1]["error"]["message"]
        fake.error_at = None
        assert (await door.events("/v1/completions", body))[-1] == "[DONE]"
        await door.idle()


async def test_an_engine_without_token_ids_is_told_apart(scale_out):
    async with vllm_front_door(scale_out=scale_out) as door:
        door.fakes["replica-0"].without_ids = True
        status, answer = await door.post("/v1/completions", {"prompt": PROMPT, "max_tokens": 2})
        assert status == 500
        assert "token ids" in answer["error"]["message"]


async def test_a_client_that_leaves_ends_the_engines_request(scale_out):
    async with vllm_front_door(scale_out=scale_out) as door:
        fake = door.fakes["replica-0"]
        fake.stall()
        body = {"prompt": PROMPT, "max_tokens": 8}
        leaving = asyncio.create_task(door.post("/v1/completions", body))
        await until(lambda: fake.running == 1)
        leaving.cancel()
        await until(lambda: fake.aborted == [PROMPT])
        await until(lambda: door.flow.num_requests == 0)
        await door.idle()


async def test_a_stop_string_ends_the_engines_request():
    async with vllm_front_door(step_s=0.001) as door:
        fake = door.fakes["replica-0"]
        fake.spell = (len(PROMPT), b"one two three four five six seven eight nine ten")
        choice = await door.complete(PROMPT, max_tokens=400, stop=["two"])
        assert choice["text"] == "one "
        await until(lambda: fake.aborted == [PROMPT])
        await door.idle()


async def test_silent_and_dead_instances_are_not_asked():
    async with vllm_front_door(["replica-0", "replica-1"]) as door:
        await door.fakes["replica-0"].stop()
        await until(lambda: not door.clients["replica-0"].alive)
        status, body = await door.health()
        assert status == 503
        assert list(body["instances"]) == ["replica-0"]
        for _ in range(3):
            await door.complete(PROMPT, max_tokens=2)
        assert len(door.fakes["replica-1"].requests) == 3
        door.fakes["replica-1"].healthy = False
        await until(lambda: not door.clients["replica-1"].alive)
        status, answer = await door.post("/v1/completions", {"prompt": PROMPT})
        assert (status, answer["error"]["code"]) == (503, "worker_lost")
        door.fakes["replica-1"].healthy = True
        await until(lambda: door.clients["replica-1"].alive)
        await door.complete(PROMPT, max_tokens=2)


async def test_a_restarted_instance_serves_on_and_what_ran_fails_at_once():
    async with vllm_front_door() as door:
        fake, client = door.fakes["replica-0"], door.clients["replica-0"]
        fake.stall()
        body = {"prompt": PROMPT, "max_tokens": 8}
        lost = asyncio.create_task(door.post("/v1/completions", body))
        await until(lambda: fake.running == 1)
        endpoint = client.endpoint
        client.close("was killed by SIGKILL")
        status, answer = await lost
        assert status == 503
        assert "was killed by SIGKILL" in answer["error"]["message"]
        fake.resume()
        client.connect(endpoint)
        await until(lambda: client.alive)
        await door.complete(PROMPT, max_tokens=2)
        await door.idle()


async def test_what_the_instance_says_of_itself_counts():
    async with vllm_front_door(max_model_len=99, version="0.29.1") as door:
        ready = door.clients["replica-0"].ready
        assert ready.max_model_len == 99
        assert ready.resolved["engine_version"] == "0.29.1"


async def test_the_instances_own_figures_are_shown():
    async with vllm_front_door() as door:
        client = door.clients["replica-0"]
        await door.complete(PROMPT, max_tokens=2)
        client._counted_s = 0.0
        await until(lambda: client.stats.num_prompt_tokens == len(PROMPT))
        assert client.stats.num_running == 0
        async with door.session.get(door.url + "/metrics") as response:
            assert 'vllm:num_requests_running{instance="replica-0"' in await response.text()


def test_figures_of_several_engine_cores_are_summed():
    text = b"""# HELP vllm:num_requests_running x
vllm:num_requests_running{engine="0",model_name="m"} 2.0
vllm:num_requests_running{engine="1",model_name="m"} 3.0
vllm:prompt_tokens_total{engine="0"} 1.5e+03
vllm:num_requests_running_more{engine="0"} 9.0
"""
    stats = read_stats(text, 7)
    assert (stats.num_running, stats.num_prompt_tokens, stats.t_ns) == (5, 1500, 7)


async def test_a_server_of_another_kind_never_becomes_ready_and_says_so():
    async with vllm_front_door() as door:
        fake, client = door.fakes["replica-0"], door.clients["replica-0"]
        endpoint = client.endpoint
        client.close("restarts")
        fake.model = 7
        client.connect(endpoint)
        await until(lambda: "is no vllm server" in client.reason)
        fake.model = "tiny"
        await until(lambda: client.alive)


async def test_a_bug_in_one_request_is_its_own_error():
    async with vllm_front_door() as door:
        door.clients["replica-0"]._api.call = lambda request, leg: 1 / 0
        status, answer = await door.post("/v1/completions", {"prompt": PROMPT})
        assert (status, answer["error"]["code"]) == (500, "internal_error")
        await door.idle()
