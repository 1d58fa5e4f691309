"""Idle TTFT of P/D beside a co-located instance, one request at a time, servers in turn.

    python benchmarks/pd_ttft.py [--transport mapped] [--lengths 128 512 2048 8192]

Both servers run throughout and are idle but for the one request in flight, so noise of the machine
meets both. Prints medians, their ratio, and the allowance 1.05 x co-located + 2 ms.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import statistics
import tempfile
from pathlib import Path

from pdrelay.bench import ClosedLoop, run_load
from pdrelay.bench.workload import fixed
from pdrelay.lab.server import ChildLauncher
from pdrelay.lab.topology import parse_topology

VOCAB_SIZE = 256


async def measure(urls: dict[str, str], lengths: list[int], samples: int) -> None:
    names = list(urls)
    print(f"{'input':>6} {names[0]:>12} {names[1]:>12} {'ratio':>7} {'allowed':>9}   (medians, ms)")
    for length in lengths:
        ttfts: dict[str, list[float]] = {name: [] for name in names}
        requests = fixed(
            num=2 * (samples + 2),
            input_len=length,
            output_len=4,
            vocab_size=VOCAB_SIZE,
            seed=length,
        )
        for i, request in enumerate(requests):
            name = names[i % 2]
            result = await run_load(urls[name], [request], mode=ClosedLoop(1))
            (record,) = result.records
            assert record.ttft_ms is not None, record.error
            if i >= 4:  # the first two of each are its warm-up
                ttfts[name].append(record.ttft_ms)
        pd, co = (statistics.median(ttfts[name]) for name in names)
        print(f"{length:6} {pd:12.2f} {co:12.2f} {pd / co:7.3f} {1.05 * co + 2:9.2f}", flush=True)


async def run(args: argparse.Namespace) -> None:
    launcher = ChildLauncher(timeout_s=120.0)
    with tempfile.TemporaryDirectory(prefix="pdrelay-ttft-") as name:
        directory = Path(name)
        async with contextlib.AsyncExitStack() as stack:
            urls = {}
            for topology, extra in (
                ("pd:1:1", ["--transport", args.transport]),
                ("replicas:1", []),
            ):
                handle = await launcher.start(
                    parse_topology(topology),
                    model="tiny",
                    event_log_path=directory / f"{topology}.jsonl",
                    log_path=directory / f"{topology}.log",
                    extra_args=["--no-enable-prefix-caching", "--allow-oversubscribe", *extra],
                )
                stack.push_async_callback(handle.stop)
                urls[topology] = handle.url
            await measure(urls, args.lengths, args.samples)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--transport", default="mapped")
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 512, 2048, 8192])
    parser.add_argument("--samples", type=int, default=11)
    asyncio.run(run(parser.parse_args()))


if __name__ == "__main__":
    main()
