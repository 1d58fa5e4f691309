"""A real SGLang on the CPU behind the front door, when an environment has one.

    PDRELAY_SGLANG_PYTHON=/path/to/venv/bin/python pytest tests/e2e/test_serve_real_sglang.py

docs/sglang.md says what the environment holds. KV moves for real, over Mooncake's TCP.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from real_engine import (
    PROMPTS,
    ask,
    gone,
    interpreter,
    port_of,
    post,
    production_server,
    status_without_key,
    tokens,
)
from serve_harness import Server

PYTHON, pytestmark = interpreter("PDRELAY_SGLANG_PYTHON", "SGLang")
STUBS = Path(__file__).parent / "sglang_cpu" / "stubs"
START_S = 300.0  # processes that import torch, on a machine that may be busy
CHAT = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 9, "temperature": 0}
# Small pools; the last two: on a CPU P/D runs into CUDA's pinned memory and events without them.
ENGINE_ARGS = (
    "--max-total-tokens 4096 --enable-metrics --disable-overlap-schedule "
    "--disaggregation-decode-retraction-backup cpu_tensor"
)


def sglang(directory, model, *args):
    path = ":".join(filter(None, [str(STUBS), os.environ.get("PYTHONPATH")]))
    settings = ("sglang", PYTHON, ENGINE_ARGS, START_S)
    return production_server(directory, model, *settings, *args, env={"PYTHONPATH": path})


@pytest.fixture(scope="module")
def native(saved_tiny, tmp_path_factory):
    """pdrelay's own engine with the same weights, float32 on both."""
    with Server(tmp_path_factory.mktemp("native"), saved_tiny, "--max-model-len", "1024") as server:
        yield server


@pytest.fixture(scope="module")
def truth(native):
    return [tokens(native, prompt) for prompt in PROMPTS]


@pytest.fixture(scope="module")
def pair(saved_tiny, tmp_path_factory):
    """Prefill and decode."""
    args = ("--prefill", "1", "--decode", "1", "--connector", "mooncake")
    with sglang(tmp_path_factory.mktemp("pair"), saved_tiny, *args) as server:
        yield server
        pids = [pid for worker in server.info["workers"] for pid in worker["pids"]]
        assert server.stop() == 0
        assert gone(pids)


def worker_of(server, role):
    return next(each for each in server.info["workers"] if each["role"] == role)


def counted(server, role, name):
    """One of an instance's own counts, over all its labels."""
    url = f"http://127.0.0.1:{port_of([worker_of(server, role)['pid']])}/metrics"
    with urllib.request.urlopen(url, timeout=10) as response:
        text = response.read().decode()
    return sum(map(float, re.findall(rf"^sglang:{name}\{{.*\}} (\S+)$", text, re.MULTILINE)))


def log_probabilities(server, **fields):
    status, answer = post(server, prompt=PROMPTS[0], logprobs=2, **fields)
    assert status == 200, answer
    return answer["choices"][0]["logprobs"]["token_logprobs"]


def says_what_the_native_engine_says(server, native, truth):
    for _ in range(2):  # the second time from the prefix cache
        with ThreadPoolExecutor() as pool:
            assert list(pool.map(lambda prompt: tokens(server, prompt), PROMPTS)) == truth
    for worker in server.info["workers"]:
        assert status_without_key(port_of(worker["pids"]), "/generate") == 401
    full = truth[0]
    status, answer = post(server, prompt=PROMPTS[0], stop_token_ids=[full[3]])
    assert status == 200
    choice = answer["choices"][0]
    assert choice["token_ids"] == full[: full.index(full[3]) + 1]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", full[3])
    usage = post(server, prompt=PROMPTS[0], max_tokens=1)[1]["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (len(PROMPTS[0]), 1)
    assert usage["prompt_tokens_details"]["cached_tokens"] == len(PROMPTS[0]) - 1
    for fields in ({"max_tokens": 4}, {"max_tokens": 2, "echo": True}):
        expected = log_probabilities(native, **fields)
        got = log_probabilities(server, **fields)
        assert len(got) == len(expected)
        assert got[-1] == pytest.approx(expected[-1], abs=1e-3)
        assert got[1:] == pytest.approx(expected[1:], abs=1e-3)
    assert post(server, prompt="x" * 2000)[0] == 400

    status, events = post(
        server, prompt=PROMPTS[1], stream=True, stream_options={"include_usage": True}
    )
    assert status == 200
    streamed = [token for event in events[:-1] for token in event["choices"][0]["token_ids"]]
    assert streamed == truth[1]
    assert events[-2]["choices"][0]["finish_reason"] == "length"
    assert events[-1]["usage"]["completion_tokens"] == len(streamed)

    status, expected = ask(native, "/v1/chat/completions", CHAT)
    assert status == 200
    status, answer = ask(server, "/v1/chat/completions", CHAT)
    content = expected["choices"][0]["message"]["content"]
    assert (status, answer["choices"][0]["message"]["content"]) == (200, content)
    assert answer["usage"]["completion_tokens"] == 9
    status, events = ask(server, "/v1/chat/completions", {**CHAT, "stream": True})
    deltas = [event["choices"][0]["delta"].get("content") or "" for event in events]
    assert (status, "".join(deltas)) == (200, content)


def test_one_instance(saved_tiny, native, truth, tmp_path):
    with sglang(tmp_path, saved_tiny) as server:
        says_what_the_native_engine_says(server, native, truth)
        worker = server.info["workers"][0]
        assert worker["resolved"]["engine"] == "sglang"
        pids = worker["pids"]
        assert len(pids) >= 3, "the server, its scheduler, its detokenizer"
        os.kill(worker["pid"], signal.SIGKILL)
        server.wait_health(503, timeout_s=60)
        assert server.stop() == 0
        assert gone(pids)


def test_prefill_and_decode(pair, native, truth):
    says_what_the_native_engine_says(pair, native, truth)


def leave(server, prompt):
    """Ask for a long stream, and hang up at its head."""
    body = {"prompt": prompt, "max_tokens": 900, "ignore_eos": True, "stream": True}
    data = json.dumps(body).encode()
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as client:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n"
        client.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + data)
        assert client.recv(1 << 12).startswith(b"HTTP/1.1 200")


def test_clients_that_leave_disturb_nobody_and_leave_nothing(pair, truth):
    before = counted(pair, "decode", "generation_tokens_total")
    with ThreadPoolExecutor() as pool:
        leaving = [pool.submit(leave, pair, list(range(i, i + 50))) for i in range(8)]
        assert list(pool.map(lambda prompt: tokens(pair, prompt), PROMPTS)) == truth
    assert [each.result() for each in leaving] == [None] * 8
    end = time.monotonic() + 60
    while not counted(pair, "decode", "num_aborted_requests_total"):
        assert time.monotonic() < end
        time.sleep(0.1)
    for role in ("prefill", "decode"):
        while counted(pair, role, "num_used_tokens"):  # as its next batch, a probe's, tells
            assert time.monotonic() < end
            time.sleep(0.1)
    assert counted(pair, "decode", "generation_tokens_total") - before < 8 * 900


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_a_killed_instance_comes_back(pair, truth, role):
    worker = worker_of(pair, role)
    os.kill(worker["pid"], signal.SIGKILL)
    pair.wait_health(503)
    status, answer = post(pair, prompt=PROMPTS[0])
    assert status == 503 and worker["instance"] in answer
    assert gone(worker["pids"])
    pair.wait_health(200, START_S)
    assert [tokens(pair, prompt) for prompt in PROMPTS] == truth
