"""A server under test: started, asked for its facts, stopped, whatever happens."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import msgspec

from pdrelay import __version__
from pdrelay.core.kv_layout import KVLayout
from pdrelay.errors import LaunchError
from pdrelay.lab.rundir import WorkerInfo
from pdrelay.lab.topology import LabTopology
from pdrelay.launch import child

STOP_S = 20.0  # for a drained server to exit before it is killed
GONE_S = 20.0  # for the processes that an engine started to follow it
_POLL_S = 0.02
_TAIL_BYTES = 4000


class ServerHandle(Protocol):
    """A running server."""

    url: str
    argv: list[str]  # reproduces it
    startup_s: float

    @property
    def pids(self) -> list[int]:
        """All its processes."""

    def workers(self) -> list[WorkerInfo]:
        """What its ranks are, and their peak memory so far."""

    async def stop(self) -> None:
        """Drain and end it. Idempotent."""


def engine_in(workers: Sequence[WorkerInfo]) -> str:
    """The engine and its version, as the server's instances report it."""
    resolved = next((worker.resolved for worker in workers if worker.resolved), {})
    if "engine" not in resolved:
        return f"native {__version__}"
    return f"{resolved['engine']} {resolved.get('engine_version', 'unknown')}"


class Launcher(Protocol):
    """Starts servers."""

    async def start(
        self,
        topology: LabTopology,
        *,
        model: str,
        event_log_path: Path,
        log_path: Path,
        extra_args: Sequence[str] = (),
    ) -> ServerHandle:
        """Returns once the server is ready. Raises LaunchError."""


class _ReadyWorker(msgspec.Struct, kw_only=True):
    instance: str
    pid: int
    pids: list[int] = []
    role: str = ""
    layout: KVLayout | None = None
    resolved: dict[str, str] = {}


class _Ready(msgspec.Struct, kw_only=True):
    """The part of `--ready-file` that the lab needs."""

    url: str
    pid: int
    workers: list[_ReadyWorker] = []


@dataclass
class ChildServer:
    """`pdrelay serve` as a child process."""

    url: str
    argv: list[str]
    startup_s: float
    process: asyncio.subprocess.Process
    ready: list[_ReadyWorker]

    @property
    def pids(self) -> list[int]:
        ranks = [pid for worker in self.ready for pid in worker.pids or [worker.pid]]
        return [self.process.pid, *ranks]

    def workers(self) -> list[WorkerInfo]:
        return [
            WorkerInfo(
                instance=worker.instance,
                pid=pid,
                rank=rank,
                role=worker.role,
                layout=worker.layout,
                resolved=worker.resolved if rank == 0 else {},
                peak_rss_bytes=peak_rss_bytes(pid),
            )
            for worker in self.ready
            for rank, pid in enumerate(worker.pids or [worker.pid])
        ]

    async def stop(self) -> None:
        """Returns when its engines' processes are gone too, so that their GPUs' memory is free."""
        await end_process(self.process)
        await wait_gone(self.pids, GONE_S)


@dataclass(frozen=True)
class ChildLauncher:
    """Starts `python -m pdrelay serve` on a free port. `command` is replaceable for tests.

    A server dies with this process, however it ends: it must not keep a GPU's memory.
    """

    timeout_s: float
    command: tuple[str, ...] = (sys.executable, "-m", "pdrelay")

    async def start(
        self,
        topology: LabTopology,
        *,
        model: str,
        event_log_path: Path,
        log_path: Path,
        extra_args: Sequence[str] = (),
    ) -> ServerHandle:
        log_path.parent.mkdir(parents=True, exist_ok=True)
        ready_path = log_path.with_suffix(".ready.json")
        ready_path.unlink(missing_ok=True)
        shown = ["serve", model, *topology.serve_args, *extra_args]
        private = ["--port", "0", "--event-log", str(event_log_path)]
        private += ["--ready-file", str(ready_path)]
        began = time.monotonic()
        with log_path.open("ab") as log:
            process = await asyncio.create_subprocess_exec(
                *tied(self.command),
                *shown,
                *private,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=asyncio.subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            ready = await self._wait(process, ready_path, topology, log_path)
        except BaseException:
            await end_process(process)
            raise
        finally:
            ready_path.unlink(missing_ok=True)
        startup_s = time.monotonic() - began
        return ChildServer(ready.url, ["pdrelay", *shown], startup_s, process, ready.workers)

    async def _wait(
        self,
        process: asyncio.subprocess.Process,
        ready_path: Path,
        topology: LabTopology,
        log_path: Path,
    ) -> _Ready:
        """The ready file is written whole and renamed; a file has no event to wait for."""
        deadline = time.monotonic() + self.timeout_s
        while (ready := read_ready(ready_path)) is None:
            if process.returncode is not None:
                raise LaunchError(
                    f"the server for {topology.label} ended with status {process.returncode}: "
                    f"{last_words(log_path)}; see {log_path}"
                )
            if time.monotonic() > deadline:
                raise LaunchError(
                    f"the server for {topology.label} was not ready after {self.timeout_s:g} s: "
                    f"{last_words(log_path)}; see {log_path}"
                )
            await asyncio.sleep(_POLL_S)
        return ready


def tied(command: Sequence[str]) -> list[str]:
    """The command, started so that it is killed when this process (this thread) ends."""
    return [sys.executable, "-I", "-S", child.__file__, str(os.getpid()), *command]


def read_ready(path: Path) -> _Ready | None:
    """The ready file, or None while there is none. Raises LaunchError when it is damaged."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=_Ready)
    except FileNotFoundError:
        return None
    except msgspec.MsgspecError as error:
        raise LaunchError(f"the server's ready file is damaged: {error}") from error


async def end_process(process: asyncio.subprocess.Process) -> None:
    """SIGTERM, wait STOP_S, SIGKILL to its whole session. Idempotent."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), STOP_S)
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()


async def wait_gone(pids: Sequence[int], timeout_s: float) -> bool:
    """Whether all ended in time. They are no children of ours, so nothing tells but a pidfd."""
    return all(await asyncio.gather(*(_gone(pid, timeout_s) for pid in pids)))


async def _gone(pid: int, timeout_s: float) -> bool:
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(pidfd, ended.set)
    try:
        await asyncio.wait_for(ended.wait(), timeout_s)
    except TimeoutError:
        return False
    finally:
        loop.remove_reader(pidfd)
        os.close(pidfd)
    return True


def last_words(log_path: Path) -> str:
    """The last non-empty line of a log."""
    try:
        with log_path.open("rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - _TAIL_BYTES))
            tail = log.read().decode(errors="replace")
    except OSError:
        return "it left no log"
    lines = [line.strip() for line in tail.splitlines() if line.strip()]
    return lines[-1][:400] if lines else "its log is empty"


def peak_rss_bytes(pid: int) -> int:
    """Largest resident set of a process so far (VmHWM of proc(5)), 0 when it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return 0
    for line in status.splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0
