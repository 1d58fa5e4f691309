"""LMCache on the prefill instance of a vLLM P/D pair: TTFT of prompts it has, beside new ones.

    python benchmarks/lmcache_pd.py --vllm-python /path/to/venv/bin/python --device cpu

One LMCache server, one pair of vLLM instances through PdrelayConnector. P has two connectors
(MultiConnector): LMCache's, which stores what P computes and loads what P is asked again, and
ours, which hands all of it to D. vLLM's own prefix caching is off, so that what is not computed
again came from LMCache. Each round sends a new prompt (cold), and the one of the round before last
again (warm), one request in flight. Medians in ms: TTFT at the client, from P's send to P's token;
equal: warm prompts whose tokens are those they had when they were cold.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import statistics
import subprocess
import sys
import tempfile
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import aiohttp
from vllm_instances import Host, count_gpus, free_port, print_failed, running, started, wait_ready
from vllm_legs import Sample, pdrelay_concurrent

from pdrelay.model.config import BUILT_IN
from pdrelay.model.shape_dir import write_shape_dir

OUTPUT_TOKENS = 8
BEHIND = 2  # rounds between a prompt's first and second time: what stores it runs behind
LMCACHE_GB = 4


def connectors(address: Path, port: int) -> dict[str, Any]:
    """P's --kv-transfer-config."""
    ours = {
        "kv_connector": "PdrelayConnector",
        "kv_connector_module_path": "pdrelay.integrations.vllm",
        "kv_role": "kv_producer",
        "kv_connector_extra_config": {"address": str(address)},
    }
    lmcache = {
        "kv_connector": "LMCacheMPConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"lmcache.mp.port": port},
    }
    return {
        "kv_connector": "MultiConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"connectors": [ours, lmcache]},
    }


def lmcache_server(
    host: Host, port: int, chunk_tokens: int
) -> AbstractContextManager[subprocess.Popen[bytes]]:
    argv = [host.python, "-m", "lmcache.cli.main", "server", "--port", str(port)]
    argv += ["--http-port", str(free_port()), "--chunk-size", str(chunk_tokens)]
    argv += ["--l1-size-gb", str(LMCACHE_GB), "--eviction-policy", "LRU"]
    argv += ["--disable-observability"]
    argv += ["--supported-transfer-mode", "auto"]  # its default cannot serve a CPU engine
    env = {**os.environ, "LMCACHE_DISABLE_BANNER": "1"}
    return running(argv, host.log_dir / "lmcache.log", env)


async def measure(args: argparse.Namespace, host: Host, vocab_size: int) -> int:
    address, port = host.directory / "p.sock", free_port()
    consumer = {
        "kv_connector": "PdrelayConnector",
        "kv_connector_module_path": "pdrelay.integrations.vllm",
        "kv_role": "kv_consumer",
        "kv_connector_extra_config": {"address": str(host.directory / "d.sock")},
    }
    with (
        lmcache_server(host, port, args.chunk_tokens),
        started(host, "p", 0, connectors(address, port)) as p,
        started(host, "d", 1, consumer) as d,
    ):
        timeout = aiohttp.ClientTimeout(total=args.request_s)
        async with aiohttp.ClientSession(timeout=timeout) as session:
            await wait_ready(session, [p, d], args.start_s, every_s=20)
            if p.ready_s is None or d.ready_s is None:
                print_failed([p, d])
                return 1
            request = pdrelay_concurrent(p.url, d.url, str(address))
            equal = True
            for length in args.lengths:
                rng = random.Random(length)
                prompts, cold, warm = [], [], []
                for i in range(args.samples + BEHIND):
                    prompts.append([rng.randrange(2, vocab_size - 2) for _ in range(length)])
                    cold.append(await request(session, prompts[i], OUTPUT_TOKENS))
                    if i >= BEHIND:
                        again = prompts[i - BEHIND]
                        warm.append(await request(session, again, OUTPUT_TOKENS))
                equal &= report(length, cold, warm)
    return int(not equal)


def report(length: int, cold: list[Sample], warm: list[Sample]) -> bool:
    first, again = (1e3 * statistics.median(s.ttft for s in made) for made in (cold, warm))
    same = sum(a.tokens == b.tokens for a, b in zip(cold, warm, strict=False))
    text = f"{length:6} cold {first:9.2f}  warm {again:9.2f}  {again / first:5.2f}  equal "
    print(f"{text}{same}/{len(warm)}", flush=True)
    return same == len(warm)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vllm-python", default=sys.executable, help="has vllm and lmcache")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048, 8192])
    parser.add_argument("--samples", type=int, default=5)
    parser.add_argument("--chunk-tokens", type=int, default=256, help="LMCache's unit")
    parser.add_argument("--start-s", type=float, default=300.0)
    parser.add_argument("--request-s", type=float, default=120.0)
    parser.add_argument("--log-dir", type=Path)
    args = parser.parse_args()
    num_gpus = 0 if args.device == "cpu" else count_gpus()
    shape = "tiny" if args.device == "cpu" else "llama-3.1-8b"
    with tempfile.TemporaryDirectory(prefix="pdrelay-lmcache-") as name:
        directory = Path(name)
        log_dir = args.log_dir or directory
        log_dir.mkdir(parents=True, exist_ok=True)
        write_shape_dir(shape, directory / "model")
        host = Host(args.vllm_python, directory, log_dir, num_gpus)
        return asyncio.run(measure(args, host, BUILT_IN[shape].vocab_size))


if __name__ == "__main__":
    sys.exit(main())
