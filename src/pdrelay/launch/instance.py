"""One incarnation of one instance: its processes, how to reach it, and how it ended."""

from __future__ import annotations

import asyncio
import re
import signal
import socket
import time
from collections.abc import Callable
from typing import Protocol

from pdrelay.core.messages import Ready
from pdrelay.doctor import diagnose
from pdrelay.errors import LaunchError
from pdrelay.launch.driver import Control, Driver, ProcessSpec
from pdrelay.launch.process import EngineProcess
from pdrelay.launch.topology import InstanceSpec

_EXCEPTION = re.compile(r"\w*(?:Error|Exception): ")
_CLOSE_GRACE_S = 1.0  # between a control socket's end and the exit of its rank, either way round


class Listener(Protocol):
    """Who talks to the instances. Called on the event loop; must not block or raise."""

    def on_started(self, instance: Instance, control: Control) -> None:
        """Take over `control`: the non-blocking control socket of rank 0, or an HTTP endpoint.

        From then on report what arrives: `instance.report_ready`, `report_alive` for each sign of
        life, `report_fatal`, and `report_closed` at a control socket's end.
        """

    def on_exited(self, instance: Instance, reason: str) -> None:
        """Every process of the incarnation is gone and reaped. `reason` is one line."""


class Instance:
    """Spawns its processes when made; `on_ended(self)` follows exactly once, when all are reaped.

    Raises LaunchError when one cannot be started; nothing is left behind then.
    """

    def __init__(
        self,
        spec: InstanceSpec,
        incarnation: int,
        driver: Driver,
        *,
        listener: Listener,
        log: Callable[[str], None],
        on_ended: Callable[[Instance], None],
        on_ready: Callable[[Instance], None],
    ) -> None:
        self.spec = spec
        self.incarnation = incarnation
        self.ready: Ready | None = None
        self.last_alive_s = time.monotonic()
        self.ended = asyncio.Event()
        self.reason = ""
        self._fatal = ""
        self._driver = driver
        self._listener = listener
        self._on_ended = on_ended
        self._on_ready = on_ready
        self._loop = asyncio.get_running_loop()
        self._closed = False
        self._abandoned = False  # the listener never heard of it
        self._cause = ""  # why we killed it
        self._first_exit: EngineProcess | None = None
        self._grace_timer: asyncio.TimerHandle | None = None
        self.ranks: list[EngineProcess] = []
        self._spawn(log)

    def _spawn(self, log: Callable[[str], None]) -> None:
        launch = self._driver.launch(self.spec, self.incarnation)
        control = launch.control
        self._closed = not isinstance(control, socket.socket)  # HTTP has no last words
        try:
            for spec in launch.processes:
                self._spawn_process(spec, log)
        except BaseException:
            if isinstance(control, socket.socket):
                control.close()
            self._abandoned = True
            self.kill("")
            raise
        finally:
            for each in launch.handed_over:
                each.close()
        self._listener.on_started(self, control)

    def _spawn_process(self, spec: ProcessSpec, log: Callable[[str], None]) -> None:
        process = EngineProcess(
            spec, sink=lambda line: log(spec.prefix + line), on_exit=self._rank_exited
        )
        self.ranks.append(process)

    @property
    def instance(self) -> str:
        return self.spec.instance

    @property
    def pids(self) -> list[int]:
        return [pid for rank in self.ranks for pid in rank.pids]

    # ---- what the listener reports

    def report_ready(self, ready: Ready) -> None:
        self.ready = ready
        self.last_alive_s = time.monotonic()
        self._on_ready(self)

    def report_alive(self) -> None:
        self.last_alive_s = time.monotonic()

    def report_fatal(self, message: str) -> None:
        """The rank's own last words: the cause and the fix in one line."""
        self._fatal = message

    def report_closed(self) -> None:
        """The control socket has ended: nothing more will be reported."""
        self._closed = True
        self._end_soon()

    # ---- ends

    def send_signal(self, number: signal.Signals) -> None:
        for rank in self.ranks:
            rank.send_signal(number)

    def kill(self, cause: str) -> None:
        """SIGKILL every rank. `cause` becomes the reason unless the rank gave its own."""
        self._cause = self._cause or cause
        self.send_signal(signal.SIGKILL)

    @property
    def explained(self) -> bool:
        """Whether the rank itself gave cause and fix, and not only an exception's name."""
        return bool(self._fatal) and _EXCEPTION.match(self._fatal) is None

    @property
    def _all_exited(self) -> bool:
        return all(rank.returncode is not None for rank in self.ranks)

    def _rank_exited(self, rank: EngineProcess) -> None:
        if self._first_exit is None:
            self._first_exit = rank
            self.send_signal(signal.SIGKILL)  # an instance lives and dies as a whole
        self._end_soon()

    def _end_soon(self) -> None:
        """End when all ranks are gone and their last words read; force both after a grace."""
        if self._all_exited and self._closed:
            self._end()
        elif self._grace_timer is None:
            self._grace_timer = self._loop.call_later(_CLOSE_GRACE_S, self._grace_over)

    def _grace_over(self) -> None:
        self._closed = True
        if self._all_exited:
            self._end()
        else:
            self.kill("")

    def _end(self) -> None:
        if self.ended.is_set():
            return
        if self._grace_timer is not None:
            self._grace_timer.cancel()
        self.reason = self._describe()
        self.ended.set()
        if not self._abandoned:
            self._listener.on_exited(self, self.reason)
            self._on_ended(self)

    def _describe(self) -> str:
        rank = self._first_exit
        assert rank is not None
        if self._fatal and rank is self.ranks[0]:
            return self._fatal
        how = self._cause or f"{rank.spec.label} {rank.describe_exit()}"
        why = self._driver.explain(rank.log.tail)
        return f"{self.instance} {how}; {why}" if why else f"{self.instance} {how}"


def launch_error(instance: Instance) -> LaunchError:
    """Why `instance`, which has ended, never became ready, and the fix where its log shows one."""
    said = [line for rank in instance.ranks for line in rank.log.tail]
    findings = diagnose("\n".join([*said, instance.reason]))
    told = instance.explained or (findings and str(findings[0]) in instance.reason)
    known = f"; {findings[0]}" if findings and not told else ""
    return LaunchError(f"worker {instance.instance} did not start: {instance.reason}{known}")
