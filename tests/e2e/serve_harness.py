"""A real `pdrelay serve` in a child process, and a small client for it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

START_S = 90.0
STOP_S = 40.0


class Server:
    """`with Server(directory, "tiny", "--prefill", "1", "--decode", "1") as server: ...`"""

    def __init__(
        self,
        directory: Path,
        *args: str,
        start_s: float = START_S,
        env: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.ready_file = directory / "ready.json"
        self.event_log = directory / "events.jsonl"
        self.log_path = directory / "server.log"
        self._log = self.log_path.open("wb")
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "pdrelay", "serve", *args, "--port", "0"),
                *("--ready-file", str(self.ready_file), "--event-log", str(self.event_log)),
                "--allow-oversubscribe",
            ],
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1", **env},
        )
        self._wait_ready(start_s)
        self.info = json.loads(self.ready_file.read_text())
        self.url = self.info["url"]

    def _wait_ready(self, start_s: float) -> None:
        end = time.monotonic() + start_s
        while not self.ready_file.exists():
            assert self.process.poll() is None, self.log_tail()
            assert time.monotonic() < end, self.log_tail()
            time.sleep(0.05)

    def log_tail(self) -> str:
        return self.log_path.read_text(errors="replace")[-4000:]

    def children(self) -> list[tuple[int, str]]:
        """(pid, command line) of every descendant."""
        parents: dict[int, list[int]] = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    stat = (entry / "stat").read_text()
                except OSError:
                    continue
                fields = stat.rsplit(")", 1)[1].split()
                if fields[0] != "Z":
                    parents.setdefault(int(fields[1]), []).append(int(entry.name))
        found, todo = [], [self.process.pid]
        while todo:
            for pid in parents.get(todo.pop(), []):
                todo.append(pid)
                try:
                    cmdline = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ")
                except OSError:
                    continue
                found.append((pid, cmdline.decode(errors="replace")))
        return found

    def get(self, path: str) -> tuple[int, bytes]:
        try:
            with urllib.request.urlopen(self.url + path, timeout=10) as response:
                return response.status, response.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def wait_health(self, status: int, timeout_s: float = 60.0) -> None:
        end = time.monotonic() + timeout_s
        while self.get("/health")[0] != status:
            assert time.monotonic() < end, f"/health never became {status}\n{self.log_tail()}"
            time.sleep(0.05)

    def stop(self, sig: int = signal.SIGTERM) -> int:
        if self.process.poll() is None:
            self.process.send_signal(sig)
        code = self.process.wait(STOP_S)
        self._log.close()
        return code

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *exc: object) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self._log.close()


def block_gauges(server: Server) -> dict[str, dict[str, float]]:
    """Block states per instance from /metrics: {instance: {state: count}}."""
    _, body = server.get("/metrics")
    gauges: dict[str, dict[str, float]] = {}
    for line in body.decode().splitlines():
        if line.startswith("pdrelay:kv_blocks{"):
            labels, value = line[len("pdrelay:kv_blocks{") :].rsplit("} ", 1)
            pairs = dict(pair.split("=", 1) for pair in labels.split(","))
            instance = pairs["instance"].strip('"')
            gauges.setdefault(instance, {})[pairs["state"].strip('"')] = float(value)
    return gauges


async def settled(server: Server) -> None:
    """Until both sides of a P/D pair hold no blocks of requests."""
    async with asyncio.timeout(30):
        while True:
            gauges = await asyncio.to_thread(block_gauges, server)
            if len(gauges) == 2 and all(
                g["used"] == g["in_transfer"] == 0 for g in gauges.values()
            ):
                return
            await asyncio.sleep(0.05)
