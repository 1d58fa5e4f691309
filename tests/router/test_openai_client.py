"""The `openai` package's client against the whole surface, over co-located and P/D engines."""

from __future__ import annotations

import openai
import pytest
from router_harness import PD, REPLICA, front_door, model_info, spell

from pdrelay.core.messages import Expect, Prefill, Submit
from pdrelay.core.token_ids import pack_ids
from pdrelay.model.generation_config import GenerationConfig
from pdrelay.model.tokenizer import byte_level_tokenizer
from pdrelay.router.fakes.native import fake_token

TOPOLOGIES = pytest.mark.parametrize("topology", [REPLICA, PD], ids=["replica", "pd"])
TOKENIZER = byte_level_tokenizer()
USER = [{"role": "user", "content": "hi"}]
CHAT_IDS = TOKENIZER.encode("<|bos|><|user|>hi<|end|><|assistant|>", add_special_tokens=False)


def expected(prompt_ids: list[int], count: int) -> str:
    class Request:
        prompt_token_ids = pack_ids(prompt_ids)

    return "".join(chr(fake_token(Request, i)) for i in range(count))


@TOPOLOGIES
async def test_completion_whole_and_streamed(topology) -> None:
    ids = TOKENIZER.encode("hello")
    async with front_door(topology) as front:
        client = front.openai()
        whole = await client.completions.create(model="tiny", prompt="hello", max_tokens=9)
        assert whole.choices[0].text == expected(ids, 9)
        assert whole.choices[0].finish_reason == "length"
        assert whole.usage.prompt_tokens == 6 and whole.usage.completion_tokens == 9
        assert whole.usage.prompt_tokens_details.cached_tokens == 0
        stream = await client.completions.create(
            model="tiny",
            prompt="hello",
            max_tokens=9,
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = [chunk async for chunk in stream]
        assert "".join(c.choices[0].text for c in chunks[:-1]) == expected(ids, 9)
        assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None] * 8 + ["length"]
        assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 9
        assert len({c.id for c in chunks}) == 1
        front.assert_idle()


@TOPOLOGIES
async def test_chat_whole_and_streamed(topology) -> None:
    async with front_door(topology) as front:
        client = front.openai()
        whole = await client.chat.completions.create(model="tiny", messages=USER, max_tokens=5)
        assert whole.choices[0].message.content == expected(CHAT_IDS, 5)
        assert whole.choices[0].message.role == "assistant"
        stream = await client.chat.completions.create(
            model="tiny", messages=USER, max_completion_tokens=5, stream=True
        )
        chunks = [chunk async for chunk in stream]
        assert chunks[0].choices[0].delta.role == "assistant"
        assert chunks[0].choices[0].delta.content == ""
        texts = [c.choices[0].delta.content for c in chunks[1:]]
        assert "".join(texts) == expected(CHAT_IDS, 5)
        assert all(c.usage is None for c in chunks)


@TOPOLOGIES
async def test_one_token_ends_where_it_began(topology) -> None:
    """In P/D the producer finishes the request and the consumer is told to forget it."""
    async with front_door(topology) as front:
        whole = await front.openai().completions.create(model="tiny", prompt="a", max_tokens=1)
        assert len(whole.choices[0].text) == 1
        if topology is PD:
            assert front.engine("decode-0").aborted and not front.engine("prefill-0").aborted
        front.assert_idle()


@pytest.mark.parametrize(
    ("prompt", "ids"),
    [
        ("ab", [[256, 97, 98]]),
        (["a", "b"], [[256, 97], [256, 98]]),
        ([97, 98], [[97, 98]]),
        ([[97], [98, 99]], [[97], [98, 99]]),
    ],
)
async def test_prompt_forms(prompt, ids) -> None:
    async with front_door(REPLICA) as front:
        whole = await front.openai().completions.create(
            model="tiny",
            prompt=prompt,
            max_tokens=3,
            n=2,
            extra_body={"return_token_ids": True},
        )
        assert [c.index for c in whole.choices] == list(range(2 * len(ids)))
        for choice in whole.choices:
            want = ids[choice.index // 2]
            assert choice.prompt_token_ids == want and choice.text == expected(want, 3)
            assert choice.token_ids == list(choice.text.encode())
        assert whole.usage.prompt_tokens == sum(map(len, ids))
        assert whole.usage.completion_tokens == 6 * len(ids)
        seeds = [m.request.params.seed for m in front.sent("replica-0", Submit)]
        assert len(set(seeds[:2])) == 2, "siblings draw different noise"


async def test_streamed_choices_are_told_apart() -> None:
    async with front_door(REPLICA) as front:
        stream = await front.openai().chat.completions.create(
            model="tiny", messages=USER, max_tokens=4, n=3, stream=True
        )
        texts = {0: "", 1: "", 2: ""}
        async for chunk in stream:
            texts[chunk.choices[0].index] += chunk.choices[0].delta.content
        assert set(texts.values()) == {expected(CHAT_IDS, 4)}


async def test_echo_and_completion_logprobs() -> None:
    async with front_door(PD) as front:
        client = front.openai()
        whole = await client.completions.create(
            model="tiny", prompt="é!", max_tokens=2, echo=True, logprobs=2
        )
        out = expected([256, *"é!".encode()], 2)
        assert whole.choices[0].text == "é!" + out
        logprobs = whole.choices[0].logprobs
        assert logprobs.tokens == ["<|bos|>", "bytes:\\xc3", "bytes:\\xa9", "!", *out]
        assert logprobs.text_offset == [0, 0, 0, 1, 2, 3]
        assert logprobs.token_logprobs == [None] + [-0.5] * 5
        assert logprobs.top_logprobs[0] is None
        assert logprobs.top_logprobs[4] == {out[0]: -0.5, chr(ord(out[0]) + 1): -1.5}
        stream = await client.completions.create(
            model="tiny", prompt="é!", max_tokens=2, echo=True, logprobs=2, stream=True
        )
        chunks = [chunk async for chunk in stream]
        assert "".join(c.choices[0].text for c in chunks) == "é!" + out
        joined = [t for c in chunks for t in c.choices[0].logprobs.tokens]
        assert joined == logprobs.tokens
        scored = await client.completions.create(
            model="tiny", prompt="ab", max_tokens=0, echo=True, logprobs=0
        )
        assert scored.choices[0].text == "ab"
        assert scored.choices[0].logprobs.tokens == ["<|bos|>", "a", "b"]
        assert scored.usage.completion_tokens == 0
        front.assert_idle()


async def test_chat_logprobs_and_token_ids() -> None:
    async with front_door(REPLICA) as front:
        client = front.openai()
        options = {"model": "tiny", "messages": USER, "max_tokens": 2, "logprobs": True}
        extra = {"return_token_ids": True}
        whole = await client.chat.completions.create(**options, top_logprobs=2, extra_body=extra)
        first = whole.choices[0].logprobs.content[0]
        assert first.token == expected(CHAT_IDS, 1) and first.bytes == list(first.token.encode())
        assert [t.logprob for t in first.top_logprobs] == [-0.5, -1.5]
        assert whole.prompt_token_ids == CHAT_IDS
        assert whole.choices[0].token_ids == list(expected(CHAT_IDS, 2).encode())
        stream = await client.chat.completions.create(**options, stream=True, extra_body=extra)
        chunks = [chunk async for chunk in stream]
        assert chunks[0].prompt_token_ids == CHAT_IDS
        assert [i for c in chunks[1:] for i in c.choices[0].token_ids] == whole.choices[0].token_ids
        assert all(c.choices[0].logprobs.content[0].top_logprobs == [] for c in chunks[1:])


@TOPOLOGIES
@pytest.mark.parametrize("stream", [False, True])
async def test_stop_strings(topology, stream) -> None:
    async with front_door(topology, token_of=spell("Hello, wörld! And so on")) as front:
        client = front.openai()

        async def ask(**options) -> tuple[str, str, object]:
            given = await client.completions.create(
                model="tiny", prompt="x", max_tokens=60, stream=stream, **options
            )
            if not stream:
                choice = given.choices[0]
                return choice.text, choice.finish_reason, choice.stop_reason
            chunks = [chunk async for chunk in given]
            text = "".join(chunk.choices[0].text for chunk in chunks)
            last = chunks[-1].choices[0]
            return text, last.finish_reason, last.stop_reason

        assert await ask(stop="wör") == ("Hello, ", "stop", "wör")
        assert await ask(stop=["zzz", "ld!"], extra_body={"include_stop_str_in_output": True}) == (
            "Hello, wörld!",
            "stop",
            "ld!",
        )
        assert await ask() == ("Hello, wörld! And so on", "stop", None)
        assert await ask(extra_body={"stop_token_ids": [ord("!")]}) == ("Hello, wörld", "stop", 33)
        assert await ask(extra_body={"min_tokens": 10}, stop=["l"]) == (
            "Hello, wör",
            "stop",
            "l",
        )
        front.assert_idle()


async def test_a_stop_string_frees_both_sides() -> None:
    async with front_door(PD, token_of=spell("abcdef"), auto=False) as front:
        import asyncio

        ask = asyncio.create_task(front.post("/v1/completions", {"prompt": "x", "stop": "b"}))
        from router_harness import until

        await until(lambda: front.engine("decode-0").request_ids)
        front.step("prefill-0", "decode-0")
        status, body, _ = await ask
        assert status == 200 and body["choices"][0]["text"] == "a"
        assert len(front.engine("decode-0").aborted) == 1
        front.assert_idle()


async def test_a_stop_string_within_one_output_drops_what_follows() -> None:
    async with front_door(REPLICA, token_of=spell("abXcd"), tokens_per_step=5) as front:
        body = {"prompt": "x", "stop": "X", "return_token_ids": True, "logprobs": 0}
        _, body, _ = await front.post("/v1/completions", body)
        choice = body["choices"][0]
        assert (choice["text"], choice["token_ids"]) == ("ab", list(b"abX"))
        assert choice["logprobs"]["tokens"] == ["a", "b", "X"]
        assert body["usage"]["completion_tokens"] == 3


async def test_sampling_parameters_reach_the_engine() -> None:
    generation = GenerationConfig(temperature=0.6, top_p=0.9, top_k=20, eos_token_ids=(257, 261))
    async with front_door(PD, model=model_info(generation=generation)) as front:
        client = front.openai()
        await client.completions.create(model="tiny", prompt="a", max_tokens=3)
        await client.completions.create(
            model="tiny",
            prompt="a",
            max_tokens=3,
            temperature=0,
            top_p=0.5,
            seed=-1,
            presence_penalty=0.25,
            frequency_penalty=-0.5,
            logit_bias={"97": -5},
            logprobs=1,
            user="someone",
            extra_body={
                "top_k": -1,
                "min_p": 0.125,
                "repetition_penalty": 1.5,
                "ignore_eos": True,
                "min_tokens": 2,
                "stop_token_ids": [5],
                "kv_transfer_params": {"do_remote_prefill": True, "remote_host": "evil"},
                "cache_salt": "s",
            },
        )
        first, second = front.sent("prefill-0", Prefill)
        params = first.request.params
        assert (params.temperature, params.top_p, params.top_k) == (0.6, 0.9, 20)
        assert params.eos_token_ids == (257, 261) and params.seed >= 0
        params = second.request.params
        assert params.greedy and (params.top_p, params.top_k, params.min_p) == (0.5, 0, 0.125)
        assert params.seed == 2**64 - 1 and params.logit_bias == {97: -5.0}
        assert (params.presence_penalty, params.frequency_penalty) == (0.25, -0.5)
        assert (params.repetition_penalty, params.min_tokens, params.logprobs) == (1.5, 2, 1)
        assert params.terminal_token_ids == (5,) and second.request.cache_salt == "s"
        assert [m.request for m in front.sent("decode-0", Expect)] == [
            first.request,
            second.request,
        ]


async def test_max_tokens_is_capped_to_the_context() -> None:
    async with front_door(REPLICA, model=model_info(max_model_len=16)) as front:
        client = front.openai()
        whole = await client.chat.completions.create(model="tiny", messages=USER)
        assert whole.usage.completion_tokens == 16 - len(CHAT_IDS)
        whole = await client.completions.create(model="tiny", prompt=[1] * 15, max_tokens=99)
        assert whole.usage.total_tokens == 16


async def test_content_parts_and_continued_messages() -> None:
    async with front_door(REPLICA) as front:
        parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
        body = {"messages": [{"role": "user", "content": parts}], "max_tokens": 1}
        assert (await front.post("/v1/chat/completions", body))[0] == 200
        final = [*USER, {"role": "assistant", "content": "So"}]
        body = {"messages": final, "continue_final_message": True, "max_tokens": 1}
        assert (await front.post("/v1/chat/completions", body))[0] == 200
        prompts = [
            TOKENIZER.decode(m.request.prompt_token_ids, skip_special_tokens=False)
            for m in front.sent("replica-0", Submit)
        ]
        assert prompts[0] == "<|bos|><|user|>a\nb<|end|><|assistant|>"
        assert prompts[1].endswith("<|assistant|>So")


async def test_models_tokenize_and_the_rest() -> None:
    async with front_door(REPLICA, model=model_info(served_model_name="org/m")) as front:
        models = (await front.openai().models.list()).data
        assert (models[0].id, models[0].root) == ("org/m", "tiny")
        assert (models[0].max_model_len, models[0].vocab_size) == (512, 264)
        assert (await front.openai().models.retrieve("org/m")).id == "org/m"
        status, body, _ = await front.post("/tokenize", {"model": "org/m", "prompt": "hé"})
        assert (status, body["tokens"], body["count"]) == (200, [256, 104, 195, 169], 4)
        assert body["max_model_len"] == 512
        _, body, _ = await front.post("/tokenize", {"messages": USER, "return_token_strs": True})
        assert body["tokens"] == CHAT_IDS and body["token_strs"][2] == "h"
        _, body, _ = await front.post("/detokenize", {"tokens": [256, 104, 195, 169]})
        assert body == {"prompt": "<|bos|>hé"}
        assert (await front.get("/version"))[1]["version"]
        assert (await front.get("/ping"))[0] == 200


async def test_api_key() -> None:
    from pdrelay.router.config import RouterConfig

    async with front_door(REPLICA, config=RouterConfig(api_key="s3cret")) as front:
        assert (await front.openai(api_key="s3cret").models.list()).data
        with pytest.raises(openai.AuthenticationError):
            await front.openai(api_key="other").models.list()
        assert (await front.get("/v1/nothing"))[0] == 401
        assert (await front.get("/health"))[0] == 200


async def test_openai_errors() -> None:
    async with front_door(REPLICA) as front:
        client = front.openai()
        with pytest.raises(openai.NotFoundError) as missing:
            await client.completions.create(model="gpt-9", prompt="x")
        assert missing.value.code == "model_not_found" and missing.value.param == "model"
        with pytest.raises(openai.BadRequestError) as bad:
            await client.completions.create(model="tiny", prompt="x", temperature=-1)
        assert bad.value.param == "temperature"
        tool = {"type": "function", "function": {"name": "f"}}
        with pytest.raises(openai.BadRequestError, match="tools is not supported"):
            await client.chat.completions.create(model="tiny", messages=USER, tools=[tool])
