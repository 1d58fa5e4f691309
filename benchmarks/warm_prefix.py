"""TTFT of prompts whose prefix an instance that is gone has computed: `pool` beside `mapped`.

    python benchmarks/warm_prefix.py [--lengths 512 2048 8192]

Two 1P1D servers, one over the shared CPU pool, one over mapped memory. Both are given prompts of
each length; then their prefill instances are killed and come back with empty prefix caches. Then,
one request at a time and in turn: the same prefixes with another end at the pool's server (warm:
its P finds them in the pool) and at the mapped one (mapped: its P computes them again), and new
prompts at the pool's server (cold). Medians in ms; "equal" counts the prompts whose greedy tokens
are the same at both servers.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import signal
import statistics
import tempfile
import time
from contextlib import AsyncExitStack
from pathlib import Path

from pdrelay.bench import ClosedLoop, run_load
from pdrelay.bench.record import ClientRecord
from pdrelay.bench.request import BenchRequest
from pdrelay.lab.server import ChildLauncher, ServerHandle
from pdrelay.lab.topology import parse_topology

OUTPUT_LEN = 8
NEW_TOKENS = 32  # behind a prefix
VOCAB_SIZE = 256
RESTART_S = 60.0
TRANSPORTS = ("pool", "mapped")


def tokens(seed: str, count: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(VOCAB_SIZE) for _ in range(count)]


def prompt(kind: str, length: int, number: int, end: str) -> list[int]:
    """`length` tokens of a prefix, and `NEW_TOKENS` of an end."""
    return tokens(f"{kind} {length} {number}", length) + tokens(f"{end} {number}", NEW_TOKENS)


async def one(url: str, token_ids: list[int], timeout_s: float = 120.0) -> ClientRecord:
    request = BenchRequest(0, 0.0, token_ids, None, OUTPUT_LEN)
    result = await run_load(
        url, [request], mode=ClosedLoop(1), return_token_ids=True, timeout_s=timeout_s
    )
    return result.records[0]


async def must(url: str, token_ids: list[int]) -> ClientRecord:
    record = await one(url, token_ids)
    assert record.ok and record.ttft_ms is not None, record.error
    return record


async def restart_producer(server: ServerHandle) -> None:
    """Kill it, and wait until the server has served a prompt again."""
    (pid,) = [worker.pid for worker in server.workers() if worker.role == "prefill"]
    os.kill(pid, signal.SIGKILL)
    end = time.monotonic() + RESTART_S
    number = 0
    while True:
        number += 1
        if (await one(server.url, tokens(f"probe {number}", 100), 20.0)).ok:
            return
        if time.monotonic() > end:
            raise SystemExit(f"the prefill instance of {server.url} did not come back")
        await asyncio.sleep(0.2)


async def measure(servers: dict[str, ServerHandle], args: argparse.Namespace) -> None:
    for server in servers.values():
        for length in args.lengths:
            for i in range(args.samples + 1):
                await must(server.url, prompt("known", length, i, "first"))
        await restart_producer(server)
        for length in args.lengths:
            await must(server.url, prompt("warm-up", length, 0, "first"))
    print(f"{'prefix':>7} {'cold':>9} {'warm':>9} {'mapped':>9} {'warm/cold':>10} {'equal':>6}")
    pool, mapped = (servers[name].url for name in TRANSPORTS)
    for length in args.lengths:
        rows: dict[str, list[ClientRecord]] = {"cold": [], "warm": [], "mapped": []}
        for i in range(args.samples + 1):
            rows["cold"].append(await must(pool, prompt("new", length, i, "second")))
            rows["warm"].append(await must(pool, prompt("known", length, i, "second")))
            rows["mapped"].append(await must(mapped, prompt("known", length, i, "second")))
        cold, warm, other = (
            statistics.median(record.ttft_ms or 0.0 for record in records[1:])
            for records in rows.values()
        )
        same = sum(
            a.token_ids is not None and a.token_ids == b.token_ids
            for a, b in zip(rows["warm"], rows["mapped"], strict=True)
        )
        print(
            f"{length:7} {cold:9.2f} {warm:9.2f} {other:9.2f} {warm / cold:10.3f} "
            f"{same:4}/{args.samples + 1}",
            flush=True,
        )


async def run(args: argparse.Namespace) -> None:
    launcher = ChildLauncher(timeout_s=120.0)
    with tempfile.TemporaryDirectory(prefix="pdrelay-warm-") as name:
        directory = Path(name)
        async with AsyncExitStack() as stack:
            servers = {}
            for transport in TRANSPORTS:
                servers[transport] = await launcher.start(
                    parse_topology("pd:1:1"),
                    model=args.model,
                    event_log_path=directory / f"{transport}.jsonl",
                    log_path=directory / f"{transport}.log",
                    extra_args=[
                        *("--transport", transport, "--kv-cache-memory", args.kv_cache_memory),
                        "--allow-oversubscribe",
                    ],
                )
                stack.push_async_callback(servers[transport].stop)
            await measure(servers, args)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192])
    parser.add_argument("--samples", type=int, default=5)
    parser.add_argument("--kv-cache-memory", default="768MiB")
    asyncio.run(run(parser.parse_args()))


if __name__ == "__main__":
    main()
