"""What the front door costs: CPU a relayed token, and time added to the first token.

Three processes on real sockets: a fake engine (one message a step, a token for every stream), the
front door, and this one, which is the client. Tokens per second of the front door's CPU time do not
depend on how many cores the three share. TTFT is the client's, from the first byte sent to the
first event read; the fake engine answers at once, so all of it is HTTP, the front door, two hops
over Unix sockets, and the client's own part. The same client against a bare aiohttp server that
answers with one event shows what of it is HTTP and client; requests to the two alternate. Over
engines behind HTTP the difference holds the fakes' own HTTP too: `hop_ms` is over the same client
talking to one of them directly, and `front_door_cpu_ms_p50`, the CPU time of the front door a
request of two tokens, is its part, whoever else keeps the machine busy.

    python benchmarks/router_relay.py --streams 64 --tokens 400
    python benchmarks/router_relay.py --engine vllm       engines behind HTTP: fake vLLM servers
    python benchmarks/router_relay.py --engine vllm-pd    the same, prefill and decode
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from main_thread import cpu_s

START_S = 30.0
RUN_S = 300.0


# ---- the fake engine's process


async def run_engine(fd: int, instance: str, step_s: float) -> None:
    from pdrelay.core.channel import Channel
    from pdrelay.core.messages import Role, ToWorker
    from pdrelay.router.fakes.native import FakeEngine

    channel: Channel[Any] = Channel(socket.socket(fileno=fd), ToWorker)
    engine = FakeEngine(
        instance, Role.BOTH, step_delay_s=step_s, max_model_len=16_384, emit=channel.send
    )
    over = asyncio.Event()

    def readable() -> None:
        for message in channel.receive():
            engine.handle(message)
        engine.received.clear()
        if channel.closed:
            over.set()

    async def flush() -> None:
        while True:
            channel.flush()
            await asyncio.sleep(0.002)

    loop = asyncio.get_running_loop()
    loop.add_reader(channel.fileno(), readable)
    engine.start()
    flusher = asyncio.create_task(flush())
    await over.wait()
    flusher.cancel()
    engine.kill()


# ---- the front door's process


def native_clients(fd: int, instance: str) -> list[Any]:
    from pdrelay.core.messages import Role
    from pdrelay.router.engine_client import StreamEngineClient

    client = StreamEngineClient(instance, Role.BOTH)
    sock = socket.socket(fileno=fd)
    sock.setblocking(False)
    client.connect(sock)
    return [client]


def http_clients(urls: list[str]) -> list[Any]:
    """One URL: a replica; two: a producer and a consumer."""
    from pdrelay.core.endpoint import HttpEndpoint
    from pdrelay.core.kv_layout import KVLayout
    from pdrelay.core.messages import Ready, Role
    from pdrelay.router.engines.http_client import HttpEngineClient
    from pdrelay.router.engines.http_pd import HandOvers, PdrelayStyle
    from pdrelay.router.engines.http_session import HttpSession

    layout = KVLayout(
        num_layers=1, num_blocks=0, block_size=16, num_kv_heads=1, head_dim=2, dtype="float32"
    )
    session, hand_overs = HttpSession(), HandOvers(PdrelayStyle())
    roles = [Role.BOTH] if len(urls) == 1 else [Role.PREFILL, Role.DECODE]
    clients = []
    for role, url in zip(roles, urls, strict=True):
        client = HttpEngineClient(role, role, session=session, hand_overs=hand_overs)
        ready = Ready(instance=role, role=role, pid=0, layout=layout, max_model_len=16_384)
        client.connect(
            HttpEndpoint(engine="vllm", url=url, ready=ready, producer_address="/fake.sock")
        )
        clients.append(client)
    return clients


async def run_router(fd: int, instance: str, urls: list[str]) -> None:
    from aiohttp import web

    from pdrelay.model.tokenizer import byte_level_tokenizer
    from pdrelay.router.app import build_app
    from pdrelay.router.cluster import Cluster
    from pdrelay.router.config import ModelInfo, RouterConfig
    from pdrelay.router.event_log import EventLog
    from pdrelay.router.server import make_runner

    clients = http_clients(urls) if urls else native_clients(fd, instance)
    config = RouterConfig(max_num_requests=100_000, drain_timeout_s=0.1)
    model = ModelInfo(
        served_model_name="tiny",
        root="tiny",
        max_model_len=16_384,
        tokenizer=byte_level_tokenizer(),
    )
    app = build_app(config, model, Cluster(clients), EventLog())
    runner = make_runner(app, config)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0, backlog=1024)
    await site.start()
    print(runner.addresses[0][1], flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    for client in clients:
        client.close()
    await runner.cleanup()


async def run_bare() -> None:
    """Reads the body, answers one event: the least that any HTTP server in Python does."""
    from aiohttp import web

    async def answer(request: web.Request) -> web.StreamResponse:
        await request.read()
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write(b"data: {}\n\n")
        await response.write_eof()
        return response

    app = web.Application(client_max_size=1 << 25)
    app.add_routes([web.post("/v1/completions", answer), web.get("/health", answer)])
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    print(runner.addresses[0][1], flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    await runner.cleanup()


# ---- the client


@contextlib.contextmanager
def bare_server() -> Iterator[str]:
    """URL of `run_bare` in a process of its own."""
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__)), "--role", "bare"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert process.stdout is not None and process.stdin is not None
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        process.stdin.close()
        process.wait(START_S)
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def processes(step_ms: float) -> Iterator[tuple[str, int, str]]:
    """(URL, pid) of a front door over a fake engine; no URL of the engine's own."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    command = [sys.executable, str(Path(__file__)), "--step-ms", str(step_ms)]
    with ours, theirs:
        engine = subprocess.Popen(
            [*command, "--role", "engine", "--fd", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
        )
        router = subprocess.Popen(
            [*command, "--role", "router", "--fd", str(ours.fileno())],
            pass_fds=[ours.fileno()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
    try:
        assert router.stdout is not None and router.stdin is not None
        port = int(router.stdout.readline())
        yield f"http://127.0.0.1:{port}", router.pid, ""
        router.stdin.close()
        router.wait(START_S)
        engine.wait(START_S)
    finally:
        for process in (router, engine):
            if process.poll() is None:
                process.kill()
                process.wait()


@contextlib.contextmanager
def http_processes(step_ms: float, num: int) -> Iterator[tuple[str, int, str]]:
    """(URL, pid) of a front door over `num` fake vLLM servers, and the URL of one of these."""
    fake = [sys.executable, "-m", "pdrelay.router.fakes.vllm", "--port", "0"]
    fake += ["--step-ms", str(step_ms), "--max-model-len", "16384"]
    engines = [subprocess.Popen(fake, stdout=subprocess.PIPE, text=True) for _ in range(num)]
    started = list(engines)
    try:
        urls = []
        for engine in engines:
            assert engine.stdout is not None
            urls.append(engine.stdout.readline().split()[-1])
        router = subprocess.Popen(
            [sys.executable, str(Path(__file__)), "--role", "router", "--urls", *urls],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        started.append(router)  # type: ignore[arg-type]
        assert router.stdout is not None and router.stdin is not None
        yield f"http://127.0.0.1:{int(router.stdout.readline())}", router.pid, urls[0]
        router.stdin.close()
        router.wait(START_S)
    finally:
        for process in started:
            process.terminate()
            process.wait()


def front_door(engine: str, step_ms: float) -> Any:
    if engine == "native":
        return processes(step_ms)
    return http_processes(step_ms, 2 if engine == "vllm-pd" else 1)


async def stream(session: Any, url: str, body: dict[str, Any]) -> tuple[float, int]:
    """Of a completion: (seconds to the first event, events)"""
    return await read_events(session, url + "/v1/completions", json.dumps(body).encode())


async def read_events(session: Any, url: str, data: bytes) -> tuple[float, int]:
    """(seconds to the first event, events)"""
    start = time.perf_counter()
    first = 0.0
    num_events = 0
    async with session.post(url, data=data) as response:
        assert response.status == 200, await response.text()
        async for piece in response.content.iter_any():
            first = first or time.perf_counter() - start
            num_events += piece.count(b"data: {")
    return first, num_events


async def wait_healthy(session: Any, url: str) -> None:
    async with asyncio.timeout(START_S):
        while True:
            async with session.get(url + "/health") as response:
                if response.status == 200:
                    return
            await asyncio.sleep(0.05)


async def measure_relay(url: str, pid: int, streams: int, tokens: int) -> dict[str, Any]:
    import aiohttp

    body = {"prompt": [1, 2, 3], "max_tokens": tokens, "stream": True, "temperature": 0}
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        await wait_healthy(session, url)
        await stream(session, url, body)
        cpu, wall = cpu_s(pid), time.perf_counter()
        results = await asyncio.gather(*(stream(session, url, body) for _ in range(streams)))
        cpu, wall = cpu_s(pid) - cpu, time.perf_counter() - wall
    total = sum(count for _, count in results)
    assert total == streams * tokens, (total, streams * tokens)
    return {
        "streams": streams,
        "tokens": total,
        "tokens_per_cpu_s": round(total / cpu),
        "us_per_token": round(cpu / total * 1e6, 1),
        "tokens_per_wall_s": round(total / wall),
        "router_cpu_share": round(cpu / wall, 2),
    }


async def measure_ttft(
    url: str, pid: int, bare_url: str, direct_url: str, length: int, text: bool, repeats: int
) -> dict[str, Any]:
    """`direct_url`: of an engine that is sent what the front door sends it; token ids only."""
    import aiohttp
    from vllm_calls import calls

    from pdrelay.router.engines.vllm_tokens_api import GENERATE

    rng = random.Random(length)
    times: list[float] = []
    bare_times: list[float] = []
    direct_times: list[float] = []
    cpu_times: list[float] = []
    async with aiohttp.ClientSession() as session:
        for each in (url, bare_url):
            await wait_healthy(session, each)
        for _ in range(repeats):
            ids = [rng.randrange(97, 123) for _ in range(length)]
            prompt: Any = bytes(ids).decode() if text else ids
            body = {"prompt": prompt, "max_tokens": 2, "stream": True, "temperature": 0}
            bare_times.append((await stream(session, bare_url, body))[0] * 1e3)
            if direct_url and not text:
                call = calls("tiny", ids, 2)[GENERATE]
                direct = await read_events(session, direct_url + GENERATE, call.body)
                direct_times.append(direct[0] * 1e3)
            cpu = cpu_s(pid)
            times.append((await stream(session, url, body))[0] * 1e3)
            cpu_times.append((cpu_s(pid) - cpu) * 1e3)
    p50, bare_p50 = statistics.median(times), statistics.median(bare_times)
    hop = {"hop_ms": round(p50 - statistics.median(direct_times), 3)} if direct_times else {}
    return {
        "prompt": f"{length} {'characters' if text else 'token ids'}",
        "ttft_ms_p50": round(p50, 3),
        "bare_ms_p50": round(bare_p50, 3),
        "added_ms": round(p50 - bare_p50, 3),
        **hop,
        "front_door_cpu_ms_p50": round(statistics.median(cpu_times), 3),
        "ttft_ms_p90": round(sorted(times)[int(len(times) * 0.9)], 3),
    }


async def run_client(args: argparse.Namespace) -> None:
    with front_door(args.engine, args.step_ms) as (url, pid, _):
        for _ in range(args.repeats):
            result = await asyncio.wait_for(
                measure_relay(url, pid, args.streams, args.tokens), RUN_S
            )
            print(json.dumps(result), flush=True)
    with front_door(args.engine, 0.0) as (url, pid, direct_url), bare_server() as bare_url:
        for length in args.lengths:
            for text in (False, True):
                result = await asyncio.wait_for(
                    measure_ttft(url, pid, bare_url, direct_url, length, text, 200), RUN_S
                )
                print(json.dumps(result), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--step-ms", type=float, default=2.0, help="of the fake engine")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 2048, 8192])
    parser.add_argument("--role", choices=("client", "engine", "router", "bare"), default="client")
    parser.add_argument("--fd", type=int, default=-1)
    parser.add_argument("--engine", choices=("native", "vllm", "vllm-pd"), default="native")
    parser.add_argument("--urls", nargs="*", default=[])
    args = parser.parse_args()
    match args.role:
        case "engine":
            asyncio.run(run_engine(args.fd, "replica-0", args.step_ms / 1e3))
        case "router":
            asyncio.run(run_router(args.fd, "replica-0", args.urls))
        case "bare":
            asyncio.run(run_bare())
        case _:
            asyncio.run(run_client(args))


if __name__ == "__main__":
    main()
