"""Killed workers and servers on GPUs: requests fail at once, memory returns, the pair recovers."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import pytest
from gpu_harness import (
    DEADLINE_S,
    MODEL,
    POOL_BYTES,
    REHEARSAL,
    START_S,
    complete,
    gpu_memory,
    needs_gpu,
    prefill_decode,
    random_ids,
    serve_args,
    transports_used,
    wait_memory,
)
from serve_harness import Server, settled

pytestmark = needs_gpu

NUM_STREAMS, STREAM_TOKENS = 12, 400 if REHEARSAL else 3000
NUM_LONG, LONG_TOKENS = 6 if REHEARSAL else 48, 7000
KILL_AT = 100  # tokens of the first stream
FAIL_S = 15.0  # well below every timeout of the server: what fails fails because of the death
RESTART_S = 120.0
SLACK = POOL_BYTES // 4  # allocators and graphs of a new process; a pool left behind is more


@dataclass(frozen=True)
class Outcome:
    status: int
    error: str
    end_s: float

    @property
    def failed(self) -> bool:
        return self.status != 200 or bool(self.error)


async def stream(session, url, prompt, max_tokens, on_token=None) -> Outcome:
    body = {
        "model": MODEL,
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }
    async with session.post(f"{url}/v1/completions", json=body) as response:
        if response.status != 200:
            return Outcome(response.status, await response.text(), time.monotonic())
        error = ""
        async for line in response.content:
            if not line.startswith(b"data: {"):
                continue
            if b'"error"' in line:
                error = line.decode()
            elif on_token is not None:
                on_token()
        return Outcome(200, error, time.monotonic())


def pid_of(server: Server, instance: str) -> int:
    """Of the instance's rank now. Raises ValueError when it has none."""
    (pid,) = [pid for pid, line in server.children() if f"worker {instance}.0" in line]
    return pid


class Kill:
    """SIGKILL once the first stream has `KILL_AT` tokens."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._tokens = 0
        self.at_s = 0.0

    def __call__(self) -> None:
        self._tokens += 1
        if self._tokens == KILL_AT:
            self.at_s = time.monotonic()
            os.kill(self._pid, signal.SIGKILL)


async def under_load(session, url, on_token, *, seed) -> list[Outcome]:
    """Streams that decode, and long prompts that queue for prefill."""
    tasks = [
        stream(
            session, url, random_ids((seed, i), 100), STREAM_TOKENS, on_token if i == 0 else None
        )
        for i in range(NUM_STREAMS)
    ]
    tasks += [
        stream(session, url, random_ids((seed, "long", i), LONG_TOKENS), 20)
        for i in range(NUM_LONG)
    ]
    async with asyncio.timeout(DEADLINE_S):
        return await asyncio.gather(*tasks)


async def recovered(session, server, prompt, length) -> list[int]:
    """Tokens of the first request that succeeds; until then each says clearly that it cannot."""
    async with asyncio.timeout(RESTART_S):
        while True:
            outcome = await stream(session, server.url, [7] * 10, 4)
            if not outcome.failed:
                answer = await complete(session, server.url, prompt, length)
                return answer.token_ids
            assert outcome.status == 503 or outcome.error, outcome
            await asyncio.sleep(0.2)


def wait_gone(pids: list[int], timeout_s: float = 30.0) -> None:
    end = time.monotonic() + timeout_s
    while left := [pid for pid in pids if Path(f"/proc/{pid}").exists()]:
        assert time.monotonic() < end, f"processes {left} outlived their server"
        time.sleep(0.05)


@pytest.mark.parametrize("transport", ["mapped", "tcp"])
async def test_killed_workers_leave_no_memory_and_the_pair_recovers(transport, tmp_path):
    before = gpu_memory()
    prompt = random_ids("probe", 700)
    connector = aiohttp.TCPConnector(limit=0)
    args = serve_args(*prefill_decode(transport))
    with Server(tmp_path, *args, start_s=START_S) as server:
        async with aiohttp.ClientSession(connector=connector) as session:
            expected = (await complete(session, server.url, prompt, 100)).token_ids
            for victim in ("decode-0", "prefill-0", "decode-0"):
                await settled(server)
                level = gpu_memory()
                pid = pid_of(server, victim)
                kill = Kill(pid)
                outcomes = await under_load(session, server.url, kill, seed=(victim, pid))
                failed = [outcome for outcome in outcomes if outcome.failed]
                assert kill.at_s and failed
                for outcome in failed:
                    assert outcome.status in (200, 503) and victim in outcome.error, outcome
                    assert outcome.end_s - kill.at_s < FAIL_S, outcome
                # Pages that reach the wrong place, or a pool that is gone, show in the tokens.
                assert await recovered(session, server, prompt, 100) == expected
                assert pid_of(server, victim) != pid
                await asyncio.to_thread(server.wait_health, 200)
                await settled(server)
                await asyncio.to_thread(wait_memory, level + SLACK)
        workers = [pid for pid, _ in server.children()]
        assert server.stop() == 0
        wait_gone(workers)
    wait_memory(before + SLACK)
    assert set(transports_used(server.event_log)) == {transport}


async def test_a_killed_server_leaves_no_process_and_no_memory(tmp_path):
    before = gpu_memory()
    args = serve_args(*prefill_decode("mapped"))
    with Server(tmp_path, *args, start_s=START_S) as server:
        workers = [pid for pid, _ in server.children()]
        assert len(workers) >= 2
        loop = asyncio.get_running_loop()
        gone = loop.create_future()

        def kill_server() -> None:
            if not gone.done():
                gone.set_result(None)

        async with aiohttp.ClientSession() as session:
            load = asyncio.create_task(
                stream(session, server.url, random_ids("front door", 500), 3000, kill_server)
            )
            async with asyncio.timeout(60):
                await gone  # it decodes
            assert server.stop(signal.SIGKILL) == -signal.SIGKILL
            async with asyncio.timeout(FAIL_S):
                with pytest.raises(aiohttp.ClientError):
                    await load
        await asyncio.to_thread(wait_gone, workers)
    wait_memory(before + SLACK)
