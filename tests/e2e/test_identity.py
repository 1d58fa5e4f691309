"""The same tokens from every topology and transport, on the real engine, under real traffic."""

from __future__ import annotations

import asyncio
import random

import aiohttp
import pytest
from serve_harness import Server, block_gauges

NUM_PROMPTS = 200
VOCAB = 256
# Small pools and budgets: prompts are prefilled in chunks, and decodes are preempted.
PRESSURE = [
    *("--max-num-batched-tokens", "96"),
    *("--max-model-len", "512"),
    *("--kv-cache-memory", str(72 * 16 * 4096)),  # 72 blocks of 16 tokens of 4,096 bytes
    *("--max-num-seqs", "16"),
]
TOPOLOGIES = {
    "tp": ["--tp", "2"],
    "mapped": ["--prefill", "1", "--decode", "1", "--transport", "mapped"],
    "tcp": ["--prefill", "1", "--decode", "1", "--transport", "tcp"],
    "pool": ["--prefill", "1", "--decode", "1", "--transport", "pool"],
    "awake": ["--prefill", "1", "--decode", "1", "--busy-wait", "on"],
    "two-to-two": ["--prefill", "2", "--decode", "2", "--transport", "mapped"],
}


def make_prompts(seed):
    rng = random.Random(seed)
    shared = [[rng.randrange(VOCAB) for _ in range(160)] for _ in range(4)]
    prompts = []
    for _ in range(NUM_PROMPTS):
        prefix = rng.choice(shared)[: rng.choice([0, 16, 40, 96, 160])]
        tail = [rng.randrange(VOCAB) for _ in range(rng.randint(1, 120))]
        prompts.append((prefix + tail, rng.randint(1, 24)))
    return prompts


async def complete(session, url, prompt, max_tokens):
    body = {
        "model": "tiny",
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    async with session.post(f"{url}/v1/completions", json=body) as response:
        answer = await response.json()
        assert response.status == 200, answer
        return answer["choices"][0]["token_ids"]


async def leave_early(session, url, prompt, after_s):
    body = {"model": "tiny", "prompt": prompt, "max_tokens": 200, "stream": True}
    try:
        async with asyncio.timeout(after_s):
            async with session.post(f"{url}/v1/completions", json=body) as response:
                async for _ in response.content:
                    pass
    except TimeoutError:
        pass


async def run_all(url, prompts, concurrency=12):
    limit = asyncio.Semaphore(concurrency)
    rng = random.Random(3)

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def one(prompt, max_tokens):
            async with limit:
                return await complete(session, url, prompt, max_tokens)

        async def leaver(prompt):
            async with limit:
                await leave_early(session, url, prompt, rng.uniform(0.005, 0.1))

        tasks = [asyncio.create_task(one(*p)) for p in prompts]
        leavers = [
            asyncio.create_task(leaver([rng.randrange(VOCAB) for _ in range(150)]))
            for _ in range(20)
        ]
        outputs = await asyncio.gather(*tasks)
        await asyncio.gather(*leavers)
    return outputs


async def settle(server):
    """All blocks come back, on every instance."""
    async with asyncio.timeout(20):
        while True:
            gauges = await asyncio.to_thread(block_gauges, server)
            if gauges and all(g["used"] == g["in_transfer"] == 0 for g in gauges.values()):
                return gauges
            await asyncio.sleep(0.05)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """Co-located, one request at a time, nothing cached, ample memory: slow and obvious."""
    prompts = make_prompts(7)
    directory = tmp_path_factory.mktemp("reference")
    with Server(directory, "tiny", "--replicas", "1", "--no-enable-prefix-caching") as server:
        outputs = asyncio.run(run_all(server.url, prompts, concurrency=1))
    return prompts, outputs


@pytest.mark.parametrize("name", ["replica", *TOPOLOGIES])
async def test_greedy_tokens_equal_the_reference(name, reference, tmp_path):
    prompts, expected = reference
    topology = TOPOLOGIES.get(name, ["--replicas", "1"])
    with Server(tmp_path, "tiny", *topology, *PRESSURE) as server:
        outputs = await run_all(server.url, prompts)
        different = [
            i for i, pair in enumerate(zip(outputs, expected, strict=True)) if pair[0] != pair[1]
        ]
        assert not different
        gauges = await settle(server)
        for states in gauges.values():
            assert sum(states.values()) == (144 if name == "tp" else 72)  # half the heads a rank
        assert server.stop() == 0
