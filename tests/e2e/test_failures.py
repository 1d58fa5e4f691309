"""Killed workers, departed clients, bad starts: bounded outcomes on the real thing."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import aiohttp
import pytest
from serve_harness import Server, settled

from pdrelay.launch.run_dir import remove_stale

PD = ["--prefill", "1", "--decode", "1"]


def body(prompt, max_tokens, **more):
    return {
        "model": "tiny",
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        **more,
    }


async def stream(session, url, prompt, max_tokens, on_chunk=None):
    """Returns (status, number of chunks, error text or "")."""
    request = body(prompt, max_tokens, stream=True)
    async with session.post(f"{url}/v1/completions", json=request) as response:
        if response.status != 200:
            return response.status, 0, await response.text()
        chunks, error = 0, ""
        async for line in response.content:
            if line.startswith(b"data: {"):
                if b'"error"' in line:
                    error = line.decode()
                else:
                    chunks += 1
                    if on_chunk is not None:
                        on_chunk(chunks)
        return response.status, chunks, error


async def next_request_succeeds(session, server):
    """200 at once, or a clear 503 until the worker is back."""
    async with asyncio.timeout(60):
        while True:
            status, chunks, error = await stream(session, server.url, [1, 2, 3] * 20, 8)
            if status == 200 and not error:
                assert chunks >= 8
                return
            assert status == 503 or error, (status, error)
            await asyncio.sleep(0.1)


@pytest.mark.parametrize("victim", ["prefill-0", "decode-0"])
async def test_a_killed_worker_fails_its_requests_and_comes_back(victim, tmp_path):
    with Server(tmp_path, "tiny", *PD) as server:
        async with aiohttp.ClientSession() as session:
            (pid,) = [w["pid"] for w in server.info["workers"] if w["instance"] == victim]
            killed = asyncio.Event()

            def kill(chunks):
                if chunks == 5 and not killed.is_set():
                    os.kill(pid, signal.SIGKILL)
                    killed.set()

            long = list(range(256)) * 30
            async with asyncio.timeout(60):
                results = await asyncio.gather(
                    stream(session, server.url, [5] * 100, 3000, kill),
                    stream(session, server.url, long, 50),
                    stream(session, server.url, long[1:], 50),
                )
            assert killed.is_set()
            failed = [r for r in results if r[0] != 200 or r[2]]
            assert failed, results
            for status, _, error in failed:
                assert status in (200, 503)
                assert victim in error
            await next_request_succeeds(session, server)
            server.wait_health(200)
            await settled(server)
        assert server.stop() == 0


@pytest.mark.parametrize("victim", ["prefill-0", "decode-0"])
async def test_a_stopped_worker_turns_health_red_and_is_replaced(victim, tmp_path):
    with Server(tmp_path, "tiny", *PD, "--worker-timeout", "3") as server:
        (pid,) = [w["pid"] for w in server.info["workers"] if w["instance"] == victim]
        os.kill(pid, signal.SIGSTOP)
        await asyncio.to_thread(server.wait_health, 503)
        await asyncio.to_thread(server.wait_health, 200)
        async with aiohttp.ClientSession() as session:
            await next_request_succeeds(session, server)
        assert server.stop() == 0


async def test_departed_clients_leave_nothing_behind(tmp_path):
    with Server(tmp_path, "tiny", *PD) as server:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            for after_ms in [0, 1, 2, 5, 10, 20, 40, 80, 160, 320]:
                tasks = [
                    asyncio.create_task(
                        stream(session, server.url, [after_ms % 256, i] * 1500, 500)
                    )
                    for i in range(4)
                ]
                await asyncio.sleep(after_ms / 1000)
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
            await next_request_succeeds(session, server)
        await settled(server)
        assert server.stop() == 0


def shm_files() -> set[str]:
    return set(os.listdir("/dev/shm"))


def shm_files_held_by(pids: Iterable[int]) -> set[str]:
    """What these processes have open or mapped in /dev/shm."""
    seen: list[str] = []
    for pid in pids:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended
            seen += Path(f"/proc/{pid}/maps").read_text().splitlines()
            for fd in os.listdir(f"/proc/{pid}/fd"):
                with contextlib.suppress(FileNotFoundError):  # closed meanwhile
                    seen.append(os.readlink(f"/proc/{pid}/fd/{fd}"))
    return {line.split("/dev/shm/", 1)[1] for line in seen if "/dev/shm/" in line}


def named_after(pids: Iterable[int], names: set[str]) -> set[str]:
    """Those of `names` that pdrelay would give, or libraries that put their process's id in."""
    words = {"pdrelay", *map(str, pids)}
    return {name for name in names if words.intersection(re.split(r"[._-]", name))}


@pytest.mark.parametrize(
    ("sig", "level", "says"),
    [
        (signal.SIGTERM, "debug", {"DEBUG": True, "INFO": True}),
        (signal.SIGINT, "warning", {"DEBUG": False, "INFO": False}),
        (signal.SIGKILL, "info", {"DEBUG": False, "INFO": True}),
    ],
)
def test_nothing_is_left_behind(sig, level, says, tmp_path, monkeypatch):
    """And the ranks log at the level that the server was given.

    Others put files into /dev/shm and leave them there: only those that are the server's own count.
    """
    with tempfile.TemporaryDirectory(prefix="t") as temporary:  # short: it holds Unix sockets
        monkeypatch.setenv("TMPDIR", temporary)
        before = shm_files()
        with Server(tmp_path, "tiny", *PD, "--log-level", level) as server:
            workers = [pid for pid, _ in server.children()]
            assert len(workers) >= 2
            pids = [server.process.pid, *workers]
            held = shm_files_held_by(pids)
            code = server.stop(sig)
            assert code == (0 if sig != signal.SIGKILL else -signal.SIGKILL)
            until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers), "ranks end")
        if sig == signal.SIGKILL:  # the next server's first act
            assert len(os.listdir(temporary)) == 1
            remove_stale(Path(temporary))
        assert os.listdir(temporary) == []
        fresh = shm_files() - before
        assert not (held & fresh) | named_after(pids, fresh)
        for rank in ("prefill-0.0", "decode-0.0"):
            for word, expected in says.items():
                line = f"[{rank}] {word} pdrelay.engine.worker:"
                assert (line in server.log_path.read_text()) == expected, line


def until(condition, what, timeout_s=20.0):
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, f"never: {what}"
        time.sleep(0.05)


def serve_error(*args):
    result = subprocess.run(
        [sys.executable, "-m", "pdrelay", "serve", *args],
        capture_output=True,
        text=True,
        timeout=60,
    )
    return result.returncode, result.stderr


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["no-such-model"], ["no-such-model", "tiny"]),
        (["tiny", "--prefill", "1"], ["--decode"]),
        (["tiny", "--replicas", "64"], ["64"]),
        (["tiny", "--tp", "3", "--allow-oversubscribe"], ["3"]),
        (["tiny", "--max-num-seqs", "-1"], ["--max-num-seqs"]),
        (["tiny", "--prefil", "1"], ["--prefil"]),
        (["tiny", "--replicas", "1", "--tp", "2"], ["--tp"]),
        (["tiny", "--kv-cache-memory", "1e40"], ["--kv-cache-memory"]),
        (["tiny", "--transport", "pigeon"], ["pigeon"]),
        (["tiny", "--config", "/nowhere.toml"], ["/nowhere.toml"]),
    ],
)
def test_bad_starts_are_one_clear_line(args, words):
    code, stderr = serve_error(*args)
    assert code == 2
    assert "Traceback" not in stderr
    message = stderr.strip().splitlines()[-1]
    for word in words:
        assert word in message


def test_an_occupied_port_is_named(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, stderr = serve_error("tiny", "--port", str(port))
    assert code == 2
    assert str(port) in stderr
