"""Idle latency of topologies beside each other: one request at a time, servers in turn.

    python benchmarks/pd_ttft.py [--transport mapped] [--lengths 128 512 2048 8192]
    python benchmarks/pd_ttft.py --model llama-3.1-8b --device cuda --streams 1 32 64

All servers run throughout and are idle but for the one request in flight, so noise of the machine
meets all. Prints medians: TTFT, its ratio to the last topology's and the allowance 1.05 x + 2 ms,
TTST - TTFT (in P/D it holds the hand-over) and ITL; then, for each number of streams, the ITL of
that many decoding together. "equal" counts the prompts whose greedy tokens are the last topology's
(another engine's random weights are others).
Servers share the GPUs: each gets its part of --gpu-memory-utilization. --attach adds servers that
run already; where the last is vLLM's, the ratios are to vLLM.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import statistics
import tempfile
from itertools import pairwise
from pathlib import Path

from pdrelay.bench import ClosedLoop, run_load
from pdrelay.bench.record import ClientRecord
from pdrelay.bench.request import BenchRequest
from pdrelay.bench.server_info import fetch_server_info
from pdrelay.bench.workload import fixed
from pdrelay.lab.server import ChildLauncher
from pdrelay.lab.topology import parse_topology

WARM_UPS = 2  # of each server at each length
OUTPUT_LEN = 8


def gaps_ms(record: ClientRecord) -> list[float]:
    return [(b - a) / 1e6 for a, b in pairwise(record.chunk_ns)]


async def one(url: str, request: BenchRequest) -> ClientRecord:
    result = await run_load(url, [request], mode=ClosedLoop(1), return_token_ids=True)
    (record,) = result.records
    assert record.ok and record.ttft_ms is not None, record.error
    return record


async def by_length(
    urls: dict[str, str], lengths: list[int], samples: int, vocab_size: int
) -> None:
    names = list(urls)
    reference = names[-1]
    print(
        f"{'input':>6} {'topology':<12} {'TTFT':>9} {'ratio':>7} {'allowed':>9} "
        f"{'TTST-TTFT':>10} {'ITL':>7} {'equal':>7}   (medians, ms)"
    )
    for length in lengths:
        records: dict[str, list[ClientRecord]] = {name: [] for name in names}
        requests = fixed(
            num=samples + WARM_UPS,
            input_len=length,
            output_len=OUTPUT_LEN,
            vocab_size=vocab_size,
            seed=length,
        )
        for request in requests:  # the same prompt to each: their tokens are compared
            for name in names:
                records[name].append(await one(urls[name], request))
        medians = {
            name: statistics.median([r.ttft_ms or 0.0 for r in records[name][WARM_UPS:]])
            for name in names
        }
        base = medians[reference]
        for name in names:
            gaps = [gaps_ms(r) for r in records[name][WARM_UPS:]]
            pairs = list(zip(records[name], records[reference], strict=True))
            equal = sum(a.token_ids is not None and a.token_ids == b.token_ids for a, b in pairs)
            print(
                f"{length:6} {name:<12} {medians[name]:9.2f} {medians[name] / base:7.3f} "
                f"{1.05 * base + 2:9.2f} {statistics.median(g[0] for g in gaps):10.2f} "
                f"{statistics.median(x for g in gaps for x in g[1:]):7.2f} "
                f"{f'{equal}/{len(pairs)}':>7}",
                flush=True,
            )


async def by_streams(
    urls: dict[str, str], streams: list[int], input_len: int, vocab_size: int
) -> None:
    for count in streams:
        for name, url in urls.items():
            requests = fixed(
                num=count, input_len=input_len, output_len=256, vocab_size=vocab_size, seed=count
            )
            result = await run_load(url, requests, mode=ClosedLoop(count))
            assert all(r.ok for r in result.records)
            start = max(r.chunk_ns[1] for r in result.records)  # all of them decode
            gaps = [
                (b - a) / 1e6 for r in result.records for a, b in pairwise(r.chunk_ns) if a >= start
            ]
            print(
                f"streams {count:3} {name:<12} ITL p50 {statistics.median(gaps):6.2f} ms, "
                f"{len(gaps)} gaps of {input_len} + 256 tokens",
                flush=True,
            )


async def run(args: argparse.Namespace) -> None:
    launcher = ChildLauncher(timeout_s=300.0)
    share = args.gpu_memory_utilization / len(args.topologies)
    with tempfile.TemporaryDirectory(prefix="pdrelay-ttft-") as name:
        directory = Path(name)
        async with contextlib.AsyncExitStack() as stack:
            urls = {}
            for topology in args.topologies:
                extra = ["--no-enable-prefix-caching", "--allow-oversubscribe"]
                extra += ["--device", args.device]
                if args.device != "cpu":
                    extra += ["--gpu-memory-utilization", f"{share:.3f}"]
                if topology.startswith("pd"):
                    extra += ["--transport", args.transport]
                log = directory / f"{topology}.log"
                try:
                    handle = await launcher.start(
                        parse_topology(topology),
                        model=args.model,
                        event_log_path=directory / f"{topology}.jsonl",
                        log_path=log,
                        extra_args=[*extra, *args.serve_args],
                    )
                except Exception:
                    print(log.read_text()[-4000:])
                    raise
                stack.push_async_callback(handle.stop)
                urls[topology] = handle.url
                print(f"{topology} is ready", flush=True)
                if args.verbose:
                    print(log.read_text())
            urls |= dict(given.split("=", 1) for given in args.attach)
            info = await fetch_server_info(next(iter(urls.values())))
            vocab_size = info.vocab_size or args.vocab_size
            await by_length(urls, args.lengths, args.samples, vocab_size)
            await by_streams(urls, args.streams, args.stream_input_len, vocab_size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--topologies", nargs="+", default=["pd:1:1", "replicas:1"])
    parser.add_argument(
        "--attach", nargs="*", default=[], help="NAME=URL of servers that run already, vLLM's say"
    )
    parser.add_argument("--transport", default="mapped")
    parser.add_argument("--lengths", type=int, nargs="*", default=[128, 512, 2048, 8192])
    parser.add_argument("--samples", type=int, default=11)
    parser.add_argument("--streams", type=int, nargs="*", default=[1])
    parser.add_argument("--stream-input-len", type=int, default=512)
    parser.add_argument("--vocab-size", type=int, default=256)
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.9)
    parser.add_argument(
        "--serve-args",
        nargs="*",
        default=[],
        help="for every server: --serve-args=--max-model-len=N",
    )
    parser.add_argument("--verbose", action="store_true", help="print what servers say at start")
    asyncio.run(run(parser.parse_args()))


if __name__ == "__main__":
    main()
