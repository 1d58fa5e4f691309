"""Real vLLM instances on CPU, each a process group of its own."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import aiohttp

import pdrelay

START_S = 400.0  # a loaded machine of two cores
STOP_S = 60.0
HALT_S = 10.0  # from SIGSTOP to its effect
_ENV = {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def state_and_parent(pid: int) -> tuple[str, int]:
    """As in proc(5), ("", 0) if there is no such process."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return "", 0
    return fields[0], int(fields[1])


def children_of(parent: int) -> list[int]:
    pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    return [pid for pid in pids if state_and_parent(pid)[1] == parent]


class VllmInstance:
    """One vLLM with PdrelayConnector. `address` is its Unix socket."""

    def __init__(
        self,
        python: str,
        model: Path,
        log: Path,
        *,
        role: str,
        address: Path,
        policy: str = "fail",
        lease_s: float = 30.0,
        args: Sequence[str] = (),
    ) -> None:
        self.address = str(address)
        self.log = log
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        transfer = {
            "kv_connector": "PdrelayConnector",
            "kv_connector_module_path": "pdrelay.integrations.vllm",
            "kv_role": role,
            "kv_load_failure_policy": policy,
            "kv_connector_extra_config": {"address": self.address, "lease_s": lease_s},
        }
        self._argv = [
            *(python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)),
            *("--served-model-name", "tiny", "--port", str(port), "--host", "127.0.0.1"),
            *("--dtype", "float32", "--max-model-len", "16384", "--enforce-eager"),
            *("--kv-transfer-config", json.dumps(transfer), *args),
        ]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        source = str(Path(pdrelay.__file__).parents[1])
        with self.log.open("ab") as out:
            self._process = subprocess.Popen(
                self._argv,
                stdout=out,
                stderr=subprocess.STDOUT,
                env={**os.environ, **_ENV, "PYTHONPATH": source},
                start_new_session=True,
            )

    def kill(self) -> None:
        """SIGKILL to every process of the instance."""
        assert self._process is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(STOP_S)

    def stop(self) -> None:
        assert self._process is not None
        self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_S)
        self.kill()

    @contextlib.contextmanager
    def engine_stopped(self) -> Iterator[None]:
        """Its scheduler stands still and begins no step; its HTTP server and its worker go on."""
        assert self._process is not None
        engine = children_of(self._process.pid)  # the worker is the engine's child
        try:
            for pid in engine:
                os.kill(pid, signal.SIGSTOP)
            end = time.monotonic() + HALT_S
            while any(state_and_parent(pid)[0] != "T" for pid in engine):
                assert time.monotonic() < end, "the engine does not stop"
                time.sleep(0.001)
            yield
        finally:
            for pid in engine:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)

    def tail(self) -> str:
        return self.log.read_text(errors="replace")[-4000:]

    async def healthy(self, session: aiohttp.ClientSession) -> None:
        """Wait until it serves. Raises AssertionError with its log when it does not."""
        assert self._process is not None
        end = time.monotonic() + START_S
        while time.monotonic() < end:
            assert self._process.poll() is None, f"vLLM ended:\n{self.tail()}"
            with contextlib.suppress(aiohttp.ClientError):
                async with session.get(f"{self.url}/health") as response:
                    if response.status == 200:
                        return
            await asyncio.sleep(0.5)
        raise AssertionError(f"vLLM did not start in {START_S:g} s:\n{self.tail()}")

    async def metrics(self, session: aiohttp.ClientSession) -> dict[str, float]:
        """Sums over labels, by name."""
        async with session.get(f"{self.url}/metrics") as response:
            text = await response.text()
        found: dict[str, float] = {}
        for line in text.splitlines():
            if not line.startswith("#"):
                name, value = line.rsplit(" ", 1)
                name = name.split("{")[0]
                found[name] = found.get(name, 0.0) + float(value)
        return found

    async def until(
        self,
        session: aiohttp.ClientSession,
        check: Callable[[dict[str, float]], bool],
        what: str,
        timeout_s: float = 60.0,
    ) -> None:
        """Wait until the metrics pass `check`."""
        end = time.monotonic() + timeout_s
        while time.monotonic() < end:
            seen = await self.metrics(session)
            if check(seen):
                return
            await asyncio.sleep(0.02)
        shown = {k: v for k, v in seen.items() if "requests" in k or "kv_cache_usage" in k}
        raise AssertionError(f"{self.log.stem}: not {what} after {timeout_s:g} s: {shown}")

    async def until_idle(self, session: aiohttp.ClientSession) -> None:
        """No request, and every block given back."""
        await self.until(
            session,
            lambda m: (
                m["vllm:num_requests_running"] == m["vllm:num_requests_waiting"] == 0
                and m["vllm:kv_cache_usage_perc"] == 0
            ),
            "idle with all blocks free",
        )
