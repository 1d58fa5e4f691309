"""Real servers on GPUs: their flags, GPU memory, and a client that keeps token ids.

P and D share a GPU where there is only one. `PDRELAY_E2E_MODEL` names another shape than `tiny`;
`PDRELAY_E2E_DEVICE=cpu` rehearses the same tests without a GPU, memory left out.
"""

from __future__ import annotations

import json
import os
import random
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

MODEL = os.environ.get("PDRELAY_E2E_MODEL", "tiny")
REHEARSAL = os.environ.get("PDRELAY_E2E_DEVICE", "cuda") == "cpu"
NUM_GPUS = torch.cuda.device_count()
BLOCK_SIZE = 64
CHUNK = 512  # tokens a step: longer prompts are prefilled in chunks
START_S = 240.0  # the first start compiles kernels
DEADLINE_S = 240.0  # of all requests of a test
POOL_BYTES = 1 << (27 if REHEARSAL else 30)  # of KV on each side

needs_gpu = pytest.mark.skipif(
    not REHEARSAL and not torch.cuda.is_available(), reason="needs a CUDA device"
)


def serve_args(*topology: str) -> list[str]:
    """Small enough for several ranks on one GPU; sizes that results depend on are spelt out."""
    return [
        *(MODEL, *topology, "--device", "cpu" if REHEARSAL else "cuda"),
        *("--dtype", "float32" if REHEARSAL else "bfloat16"),
        *("--kv-cache-memory", str(POOL_BYTES), "--block-size", str(BLOCK_SIZE)),
        *("--max-model-len", "8192", "--max-num-seqs", "64"),
        *("--max-num-batched-tokens", str(CHUNK)),
    ]


def prefill_decode(transport: str) -> list[str]:
    return ["--prefill", "1", "--decode", "1", "--transport", transport]


def random_ids(seed: object, length: int) -> list[int]:
    rng = random.Random(repr(seed))
    return [rng.randrange(256) for _ in range(length)]


@dataclass(frozen=True)
class Answer:
    """`top[i]`: the likeliest tokens' log-probabilities at output i, by token id."""

    token_ids: list[int]
    num_cached: int
    top: list[dict[int, float]]


async def complete(session, url, prompt, max_tokens, *, logprobs=None) -> Answer:
    """Greedy, not streamed."""
    body = {
        "model": MODEL,
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    if logprobs is not None:
        body |= {"logprobs": logprobs, "return_tokens_as_token_ids": True}
    async with session.post(f"{url}/v1/completions", json=body) as response:
        answer = await response.json()
        assert response.status == 200, answer
    (choice,) = answer["choices"]
    entries = choice["logprobs"]["top_logprobs"] if logprobs is not None else []
    details = answer["usage"].get("prompt_tokens_details") or {}
    return Answer(
        choice["token_ids"],
        details.get("cached_tokens", 0),
        [{int(k.removeprefix("token_id:")): v for k, v in each.items()} for each in entries],
    )


def transports_used(event_log: Path) -> list[str]:
    """Of each hand-over that arrived."""
    return [
        event["transport"]
        for line in event_log.read_text().splitlines()
        for event in json.loads(line)["events"]
        if event["kind"] == "transfer_end"
    ]


def gpu_memory() -> int:
    """Bytes in use on all GPUs, by any process."""
    if REHEARSAL:
        return 0
    pairs = [torch.cuda.mem_get_info(ordinal) for ordinal in range(NUM_GPUS)]
    return sum(total - free for free, total in pairs)


def wait_memory(limit: int, timeout_s: float = 30.0) -> None:
    """Until no more than `limit` bytes are in use: a killed process's go a little after it."""
    end = time.monotonic() + timeout_s
    while (used := gpu_memory()) > limit:
        assert time.monotonic() < end, f"{used - limit} bytes of GPU memory too many are in use"
        time.sleep(0.05)
