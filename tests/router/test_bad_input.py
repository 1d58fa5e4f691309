"""Nothing a client can send ends the server, or gets anything but a one-line error."""

from __future__ import annotations

import asyncio
import json

import pytest
from router_harness import REPLICA, WAIT_S, front_door, model_info

from pdrelay.router.config import RouterConfig

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "x"}]

BAD_COMPLETIONS = [
    ({}, "prompt"),
    ({"prompt": None}, "prompt"),
    ({"prompt": 5}, "prompt"),
    ({"prompt": {}}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": ["a", 1]}, "prompt"),
    ({"prompt": [1, "a"]}, "prompt"),
    ({"prompt": [1.5]}, "prompt"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": [1, 2**32]}, "prompt"),
    ({"prompt": [264]}, "prompt"),
    ({"prompt": [10**30]}, "prompt"),
    ({"prompt": [[1], "a"]}, "prompt"),
    ({"prompt": [True]}, "prompt"),
    ({"prompt": "x", "max_tokens": 0}, "max_tokens"),
    ({"prompt": "x", "max_tokens": -1}, "max_tokens"),
    ({"prompt": "x", "max_tokens": 10**40}, "max_tokens"),
    ({"prompt": "x", "max_tokens": 1.5}, "max_tokens"),
    ({"prompt": "x", "max_tokens": "5"}, "max_tokens"),
    ({"prompt": "x", "min_tokens": 20}, "min_tokens"),
    ({"prompt": "x", "temperature": -0.1}, "temperature"),
    ({"prompt": "x", "temperature": 1e300}, "temperature"),
    ({"prompt": "x", "temperature": "hot"}, "temperature"),
    ({"prompt": "x", "temperature": True}, "temperature"),
    ({"prompt": "x", "top_p": 0}, "top_p"),
    ({"prompt": "x", "top_p": 1.01}, "top_p"),
    ({"prompt": "x", "top_k": -2}, "top_k"),
    ({"prompt": "x", "min_p": 2}, "min_p"),
    ({"prompt": "x", "presence_penalty": 3}, "presence_penalty"),
    ({"prompt": "x", "repetition_penalty": 0}, "repetition_penalty"),
    ({"prompt": "x", "seed": 2**63}, "seed"),
    ({"prompt": "x", "seed": "1"}, "seed"),
    ({"prompt": "x", "n": 0}, "n"),
    ({"prompt": "x", "n": 129}, "n"),
    ({"prompt": "x", "best_of": 2}, "best_of"),
    ({"prompt": "x", "logprobs": 21}, "logprobs"),
    ({"prompt": "x", "logprobs": True}, "logprobs"),
    ({"prompt": "x", "logit_bias": {"264": 1}}, "logit_bias"),
    ({"prompt": "x", "logit_bias": {"a": 1}}, "logit_bias"),
    ({"prompt": "x", "logit_bias": {"1": 101}}, "logit_bias"),
    ({"prompt": "x", "stop": ""}, "stop"),
    ({"prompt": "x", "stop": [1]}, "stop"),
    ({"prompt": "x", "stop": ["a"] * 65}, "stop"),
    ({"prompt": "x", "stop": "a" * 1025}, "stop"),
    ({"prompt": "x", "stop_token_ids": [264]}, "stop_token_ids"),
    ({"prompt": "x", "stream_options": {"include_usage": True}}, "stream_options"),
    ({"prompt": "x", "stream": "yes"}, "stream"),
    ({"prompt": "x", "suffix": "y"}, "suffix"),
    ({"prompt": "x", "response_format": {"type": "json_object"}}, "response_format"),
    ({"prompt": "x", "guided_json": {"type": "object"}}, "guided_json"),
    ({"prompt": "x", "use_beam_search": True}, "use_beam_search"),
    ({"prompt": "x", "model": 5}, "model"),
    ({"prompt": ["x"] * 2000}, "prompt"),
]
BAD_CHATS = [
    ({}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": [5]}, "messages"),
    ({"messages": [{"content": "x"}]}, "messages"),
    ({"messages": [{"role": 5, "content": "x"}]}, "messages"),
    ({"messages": [{"role": "user"}]}, "messages"),
    ({"messages": [{"role": "user", "content": {"a": 1}}]}, "messages"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
    ({"messages": [{"role": "wizard", "content": "x"}]}, "messages"),
    ({"messages": MESSAGES, "top_logprobs": 2}, "top_logprobs"),
    ({"messages": MESSAGES, "logprobs": 2}, "logprobs"),
    ({"messages": MESSAGES, "max_completion_tokens": 0}, "max_completion_tokens"),
    ({"messages": MESSAGES, "functions": [{"name": "f"}]}, "functions"),
    ({"messages": MESSAGES, "chat_template": "{{ 1 }}"}, "chat_template"),
    (
        {"messages": [{"role": "user", "content": ""}], "continue_final_message": True},
        "continue_final_message",
    ),
]
BAD_JSON = [
    b"",
    b"null",
    b"[]",
    b"{",
    b'{"prompt": "x"',
    b'{"prompt": "x"}}',
    b'{"prompt": "\xff\xfe"}',
    b'{"prompt": ["\xff"]}',
    b"\xff\xfe{}",
    b'{"prompt": "\\ud800"}',
    b'{"prompt": "x", "temperature": NaN}',
    b'{"prompt": "x", "temperature": 1e999}',
    b'{"prompt": "x", "temperature": -Infinity}',
    b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    b'{"other": ' + b'{"a":' * 50_000 + b"1" + b"}" * 50_000 + b"}",
]


async def check(front, path: str, body, status: int = 400) -> dict:
    got, error, _ = await front.post(path, body)
    assert got == status, (body, error)
    error = error["error"]
    assert error["message"] and "\n" not in error["message"] and len(error["message"]) < 500
    assert error["type"] and error["code"]
    return error


async def test_bad_fields() -> None:
    async with front_door(REPLICA) as front:
        for body, param in BAD_COMPLETIONS:
            assert (await check(front, COMPLETIONS, body))["param"] == param, body
        for body, param in BAD_CHATS:
            assert (await check(front, CHAT, body))["param"] == param, body
        assert (await front.post(COMPLETIONS, {"prompt": "x"}))[0] == 200
        front.assert_idle()


async def test_bad_json() -> None:
    async with front_door(REPLICA) as front:
        for body in BAD_JSON:
            await check(front, COMPLETIONS, body)
            await check(front, CHAT, body.replace(b"prompt", b"messages"))
            if b"1e999" not in body:  # a field that these do not have
                await check(front, "/tokenize", body)
                await check(front, "/detokenize", body)
        assert (await front.post(COMPLETIONS, {"prompt": "x"}))[0] == 200


async def test_unknown_fields_are_ignored() -> None:
    async with front_door(REPLICA) as front:
        body = {"prompt": "x", "kv_transfer_params": {"a": [1]}, "no_such": {"deep": [None]}}
        assert (await front.post(COMPLETIONS, body))[0] == 200
        harmless = {"messages": MESSAGES, "tools": [], "response_format": {"type": "text"}}
        assert (await front.post(CHAT, {**harmless, "functions": None}))[0] == 200


async def test_prompt_over_the_context_names_both_numbers() -> None:
    async with front_door(REPLICA, model=model_info(max_model_len=32)) as front:
        for prompt in ([1] * 32, "x" * 31, "x" * 100_000):
            error = await check(front, COMPLETIONS, {"prompt": prompt})
            assert "32" in error["message"] and error["param"] == "prompt"
        message = (await check(front, COMPLETIONS, {"prompt": [1] * 40}))["message"]
        assert "40 tokens" in message
        assert (await front.post(COMPLETIONS, {"prompt": [1] * 31}))[0] == 200


async def test_paths_methods_and_sizes() -> None:
    async with front_door(REPLICA, config=RouterConfig(max_request_bytes=1000)) as front:
        assert (await check(front, "/v2/nothing", {}, 404))["code"] == "not_found"
        async with front.session.get(front.url + COMPLETIONS) as response:
            assert response.status == 405 and response.headers["Allow"] == "POST"
            assert (await response.json())["error"]["code"] == "method_not_allowed"
        large = json.dumps({"prompt": "x" * 2000}).encode()
        assert (await check(front, COMPLETIONS, large, 413))["code"] == "request_too_large"

        async def pieces():
            for _ in range(20):
                yield b"x" * 100

        async with front.session.post(front.url + COMPLETIONS, data=pieces()) as response:
            assert response.status == 413
        assert (await front.post(COMPLETIONS, {"prompt": "x"}))[0] == 200


async def raw(port: int, data: bytes, *, eof: bool = False, size: int = 4096) -> bytes:
    """Send bytes; what comes back first, or with size=-1 everything until the server closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(data)
    if eof:
        writer.write_eof()
    async with asyncio.timeout(WAIT_S):
        reply = await reader.read(size)
    writer.close()
    return reply


def parsed(reply: bytes) -> tuple[int, dict]:
    """Status and error object of a whole response."""
    head, _, body = reply.partition(b"\r\n\r\n")
    status_line, *lines = head.decode().split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines)
    assert int(headers["content-length"]) == len(body)
    assert headers["content-type"].startswith("application/json")
    return int(status_line.split()[1]), json.loads(body)["error"]


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"\r\n\x00\xff\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: x\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n{}",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"A: " + b"b" * 20_000 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\nbad header\r\n\r\n",
    ],
)
async def test_malformed_http(data) -> None:
    async with front_door(REPLICA) as front:
        status, error = parsed(await raw(front.port, data, size=-1))
        assert status == 400
        assert (error["code"], error["type"]) == ("malformed_http", "invalid_request_error")
        assert error["message"].startswith("malformed HTTP request: ")
        assert "\n" not in error["message"] and len(error["message"]) < 300
        assert (await front.get("/health"))[0] == 200


async def test_truncated_body_is_given_up() -> None:
    async with front_door(REPLICA) as front:
        head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 50\r\n\r\n"
        assert await raw(front.port, head + b'{"prompt": "x"', eof=True) == b""  # it has left
        assert (await front.get("/health"))[0] == 200
        front.assert_idle()


async def test_slow_body_and_slow_headers() -> None:
    config = RouterConfig(body_timeout_s=0.2, keepalive_timeout_s=0.3)
    async with front_door(REPLICA, config=config) as front:
        head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 50\r\n\r\n"
        reply = await raw(front.port, head + b'{"pro')
        assert reply.startswith(b"HTTP/1.1 408")
        assert b"request_timeout" in reply
        assert await raw(front.port, b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nA:") == b""
        assert await raw(front.port, b"") == b""


async def test_http_1_0_streams_without_chunks() -> None:
    async with front_door(REPLICA) as front:
        body = b'{"prompt": "x", "stream": true, "max_tokens": 3}'
        head = b"POST /v1/completions HTTP/1.0\r\nContent-Length: %d\r\n\r\n" % len(body)
        reader, writer = await asyncio.open_connection("127.0.0.1", front.port)
        writer.write(head + body)
        async with asyncio.timeout(WAIT_S):
            reply = await reader.read()
        writer.close()
        header, _, events = reply.partition(b"\r\n\r\n")
        assert b"chunked" not in header.lower()
        assert events.startswith(b"data: {") and events.endswith(b"data: [DONE]\n\n")
        assert events.count(b"data: {") == 3
