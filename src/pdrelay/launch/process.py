"""One process of an instance: spawn, watch, kill. Linux only (pidfd, PR_SET_PDEATHSIG)."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable

from pdrelay.errors import LaunchError
from pdrelay.launch import child, guard
from pdrelay.launch.driver import ProcessSpec
from pdrelay.launch.log_pipe import LogPipe


class EngineProcess:
    """A running process. `on_exit(self)` is called once on the event loop, after it was reaped.

    It leads its own process group, which is killed as a whole, and dies with the thread that
    spawned it: create it on the main thread.
    """

    def __init__(
        self,
        spec: ProcessSpec,
        *,
        sink: Callable[[str], None],
        on_exit: Callable[[EngineProcess], None],
    ) -> None:
        """Raises LaunchError when the program cannot be started."""
        self.spec = spec
        self._on_exit = on_exit
        self._loop = asyncio.get_running_loop()
        self.exited = asyncio.Event()
        read_end, write_end = os.pipe()
        try:
            self._popen, self._pidfd = self._spawn(write_end)
        except OSError as error:
            os.close(read_end)
            raise LaunchError(f"cannot start {spec.command[0]}: {error.strerror}") from error
        finally:
            os.close(write_end)
        self.pid = self._popen.pid
        self.log = LogPipe(read_end, sink)
        self._loop.add_reader(self._pidfd, self._exited)
        self._write_stdin()

    def _spawn(self, output: int) -> tuple[subprocess.Popen[bytes], int]:
        tie = guard.__file__ if self.spec.guarded else child.__file__
        popen = subprocess.Popen(
            [sys.executable, "-I", "-S", tie, str(os.getpid()), *self.spec.command],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            pass_fds=self.spec.pass_fds,
            process_group=0,
            env=dict(self.spec.env),
        )
        try:
            return popen, os.pidfd_open(popen.pid)
        except OSError:
            popen.kill()
            popen.communicate()
            raise

    def _write_stdin(self) -> None:
        stdin = self._popen.stdin
        assert stdin is not None
        with contextlib.suppress(BrokenPipeError):  # its exit tells why
            stdin.write(self.spec.stdin)
            stdin.flush()
        with contextlib.suppress(BrokenPipeError):
            stdin.close()

    @property
    def pids(self) -> list[int]:
        """Itself; with a guard, what runs in the group that the guard leads, oldest first."""
        if not self.spec.guarded:
            return [self.pid]
        return [pid for pid in group_members(self.pid) if pid != self.pid]

    @property
    def returncode(self) -> int | None:
        return self._popen.returncode

    def _exited(self) -> None:
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        self.send_signal(signal.SIGKILL)  # its descendants; the unreaped leader holds the group id
        self._popen.wait()
        self.log.close()
        self.exited.set()
        self._on_exit(self)

    def send_signal(self, number: signal.Signals) -> None:
        """Signal the whole process group; nothing happens once it was reaped."""
        if self._popen.returncode is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, number)

    def describe_exit(self) -> str:
        """How it ended, in a few words."""
        code = self._popen.returncode
        if code is None:
            return "is running"
        if code >= 0:
            return f"exited with status {code}"
        try:
            return f"was killed by {signal.Signals(-code).name}"
        except ValueError:
            return f"was killed by signal {-code}"


def group_members(group: int) -> list[int]:
    """Living processes of a process group, by /proc, in the order of their ids."""
    found = []
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit():
            continue
        try:
            with open(f"{entry.path}/stat", encoding="utf-8", errors="replace") as file:
                state, _, its_group = file.read().rpartition(")")[2].split()[:3]
        except OSError:  # it has just ended
            continue
        if int(its_group) == group and state != "Z":
            found.append(int(entry.name))
    return sorted(found)
