"""pdrelay's co-located instance beside vLLM's on the same CPU, shape, dtype and threads.

    python benchmarks/vs_vllm_cpu.py --vllm-python /path/to/venv/bin/python

Both servers run for the whole time and are idle but for the one request in flight; requests
alternate between them, so that noise of the machine meets both. `vllm-cpu` needs an environment of
its own (without torchvision, torchaudio and torchcodec, whose CUDA builds clash with CPU torch).
Prints medians and their ratio; writes them as JSON with --out.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from pdrelay.bench import BenchRequest, ClosedLoop, run_load
from pdrelay.bench.workload import fixed

START_S = 240.0
VOCAB_SIZE = 256


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@contextlib.contextmanager
def server(argv: list[str], port: int, log: Path, env: dict[str, str]) -> Iterator[str]:
    """Run a server until the block ends; yields its URL once /health answers 200."""
    url = f"http://127.0.0.1:{port}"
    with log.open("wb") as out:
        process = subprocess.Popen(
            argv, stdout=out, stderr=subprocess.STDOUT, env={**os.environ, **env}
        )
        try:
            end = time.monotonic() + START_S
            while True:
                if process.poll() is not None or time.monotonic() > end:
                    sys.exit(f"{argv[:4]} did not start; see {log}")
                with contextlib.suppress(OSError):
                    if urllib.request.urlopen(f"{url}/health", timeout=2).status == 200:
                        break
                time.sleep(0.2)
            yield url
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(30)
            process.kill()


def export_tiny(directory: Path, seed: int) -> None:
    """The shape `tiny` with its seeded weights as a Hugging Face directory for both servers."""
    from pdrelay.engine.weights import save_pretrained_dummy
    from pdrelay.model.tokenizer import byte_level_tokenizer

    save_pretrained_dummy("tiny", seed, directory)
    byte_level_tokenizer().save(str(directory))


async def alternate(
    urls: dict[str, str], input_len: int, output_len: int, samples: int, seed: int
) -> dict[str, list[tuple[float, list[float]]]]:
    """`(ttft_ms, itls_ms)` of `samples` requests to each server, one at a time, in turn."""
    seen: dict[str, list[tuple[float, list[float]]]] = {name: [] for name in urls}
    requests = fixed(
        num=samples * len(urls),
        input_len=input_len,
        output_len=output_len,
        vocab_size=VOCAB_SIZE,
        seed=seed,
    )
    for i, request in enumerate(requests):
        name = list(urls)[i % len(urls)]
        record = await one(urls[name], request)
        if i >= len(urls):  # the first of each is its warm-up
            seen[name].append(record)
    return seen


async def one(url: str, request: BenchRequest) -> tuple[float, list[float]]:
    result = await run_load(url, [request], model="tiny", mode=ClosedLoop(1))
    (record,) = result.records
    if not record.ok or record.ttft_ms is None:
        sys.exit(f"{url}: {record.error}")
    return record.ttft_ms, record.itls_ms


async def measure(urls: dict[str, str], args: argparse.Namespace) -> list[dict[str, float | str]]:
    rows: list[dict[str, float | str]] = []
    for length in args.lengths:
        seen = await alternate(urls, length, 2, args.samples + 1, seed=length)
        ttft = {name: statistics.median(t for t, _ in seen[name]) for name in urls}
        rows.append({"metric": f"TTFT {length}", **ttft})
    for length in args.itl_lengths:
        seen = await alternate(urls, length, 128, args.samples + 1, seed=length + 1)
        itl = {
            name: statistics.median(gap for _, gaps in seen[name] for gap in gaps) for name in urls
        }
        rows.append({"metric": f"ITL behind {length}", **itl})
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vllm-python", required=True, help="Python of an environment with vllm")
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 512, 2048, 8192])
    parser.add_argument("--itl-lengths", type=int, nargs="+", default=[128, 2048])
    parser.add_argument("--samples", type=int, default=11)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pdrelay-vs-")))
        export_tiny(directory / "tiny", seed=0)
        model = str(directory / "tiny")
        ports = {"pdrelay": free_port(), "vllm": free_port()}
        common = ["--max-model-len", "16384", "--dtype", "float32", "--served-model-name", "tiny"]
        argv = {
            "pdrelay": [
                *(sys.executable, "-m", "pdrelay", "serve", model, "--replicas", "1", *common),
                *("--no-enable-prefix-caching", "--port", str(ports["pdrelay"])),
            ],
            "vllm": [
                *(args.vllm_python, "-m", "vllm.entrypoints.openai.api_server", "--model", model),
                *(*common, "--no-enable-prefix-caching", "--port", str(ports["vllm"])),
            ],
        }
        env = {
            "pdrelay": {},
            "vllm": {
                "OMP_NUM_THREADS": "1",
                "VLLM_CPU_OMP_THREADS_BIND": "nobind",
                "VLLM_CPU_KVCACHE_SPACE": "1",
                "HF_HUB_OFFLINE": "1",
            },
        }
        urls = {
            name: stack.enter_context(
                server(argv[name], ports[name], directory / f"{name}.log", env[name])
            )
            for name in argv
        }
        rows = asyncio.run(measure(urls, args))
    print(f"{'median, ms':18} {'pdrelay':>10} {'vllm':>10} {'ratio':>8}")
    for row in rows:
        ours, theirs = float(row["pdrelay"]), float(row["vllm"])
        print(f"{row['metric']:18} {ours:10.2f} {theirs:10.2f} {ours / theirs:8.3f}")
    if args.out is not None:
        args.out.write_text(json.dumps({"argv": sys.argv, "rows": rows}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
