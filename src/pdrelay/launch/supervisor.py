"""Starts every instance of a topology, restarts what dies, and leaves nothing behind.

STARTING --ready--> READY --death--> BACKOFF --timer--> STARTING
    \\------------- death ------------^   \\--too many--> FAILED
"""

from __future__ import annotations

import asyncio
import enum
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from pdrelay.errors import LaunchError
from pdrelay.launch.driver import Driver
from pdrelay.launch.instance import Instance, Listener, launch_error
from pdrelay.launch.restart_policy import RestartOptions, RestartPolicy
from pdrelay.launch.topology import InstanceSpec

_KILL_DEADLINE_S = 10.0  # only an uninterruptible system call outlasts SIGKILL


class State(enum.StrEnum):
    STARTING = "starting"
    READY = "ready"
    BACKOFF = "restarting"
    FAILED = "failed"  # died too often; stays down
    STOPPED = "stopped"


@dataclass(frozen=True)
class SupervisorOptions:
    """Seconds."""

    startup_timeout_s: float = 300.0
    worker_timeout_s: float = 30.0  # without an answer after which a ready worker is killed
    term_grace_s: float = 3.0  # between SIGTERM and SIGKILL
    drain_signal_s: float = 10.0  # for an engine to clean up after its driver's drain signal
    restart: RestartOptions = field(default_factory=RestartOptions)


@dataclass
class _Slot:
    """The place of one instance over all its incarnations."""

    spec: InstanceSpec
    policy: RestartPolicy
    state: State = State.STARTING
    incarnations: int = 0
    current: Instance | None = None
    reason: str = ""  # of the last death
    timer: asyncio.TimerHandle | None = None  # start deadline, or the next start


class Supervisor:
    """Runs on one event loop, on the main thread. `start`, then `stop` in every case.

    `on_death(spec)` is called after each death, before the restart (the shared pool reclaims what
    the instance held).
    """

    def __init__(
        self,
        specs: Sequence[InstanceSpec],
        driver: Driver,
        listener: Listener,
        *,
        options: SupervisorOptions | None = None,
        log: Callable[[str], None],
        on_death: Callable[[InstanceSpec], None] = lambda spec: None,
    ) -> None:
        self._options = options or SupervisorOptions()
        self._driver = driver
        self._listener = listener
        self._log = log
        self._on_death = on_death
        self._slots = [_Slot(spec, RestartPolicy(self._options.restart)) for spec in specs]
        self._started: asyncio.Future[None] | None = None
        self._stopping = False
        self._liveness_timer: asyncio.TimerHandle | None = None

    # ---- what others may know

    def states(self) -> dict[str, tuple[State, str]]:
        """Instance id to its state and the reason of its last death ("" when it never died)."""
        return {slot.spec.instance: (slot.state, slot.reason) for slot in self._slots}

    def down(self) -> dict[str, str]:
        """Instance id to why it is down, of those that are not ready."""
        return {
            instance: f"{state}: {reason}" if reason else str(state)
            for instance, (state, reason) in self.states().items()
            if state is not State.READY
        }

    def instances(self) -> list[Instance]:
        """The current incarnations, in topology order."""
        return [slot.current for slot in self._slots if slot.current is not None]

    # ---- start

    async def start(self) -> None:
        """Spawn every instance and wait until all are ready.

        Raises LaunchError, naming the first instance that failed and why; call `stop` then too.
        """
        self._loop = asyncio.get_running_loop()
        self._started = self._loop.create_future()
        for slot in self._slots:
            self._spawn(slot)
        self._check_liveness()
        await self._started

    def _slot(self, instance: Instance) -> _Slot:
        return next(slot for slot in self._slots if slot.spec == instance.spec)

    def _spawn(self, slot: _Slot) -> None:
        incarnation = slot.incarnations
        slot.incarnations += 1
        slot.state = State.STARTING
        try:
            slot.current = Instance(
                slot.spec,
                incarnation,
                self._driver,
                listener=self._listener,
                log=self._log,
                on_ended=self._ended,
                on_ready=self._ready,
            )
        except (LaunchError, OSError) as error:
            self._died(slot, str(error))
            return
        slot.timer = self._loop.call_later(
            self._options.startup_timeout_s, self._start_timed_out, slot.current
        )

    def _start_timed_out(self, instance: Instance) -> None:
        instance.kill(
            f"was not ready after {self._options.startup_timeout_s:g} s "
            "(raise --startup-timeout if the model is large)"
        )

    def _ready(self, instance: Instance) -> None:
        slot = self._slot(instance)
        if slot.current is not instance or self._stopping:
            return
        self._cancel_timer(slot)
        slot.state = State.READY
        if all(each.state is State.READY for each in self._slots):
            self._resolve_start(None)
        if instance.incarnation:
            self._log(f"{instance.instance} is ready again")

    def _resolve_start(self, error: LaunchError | None) -> None:
        if self._started is None or self._started.done():
            return
        if error is None:
            self._started.set_result(None)
        else:
            self._started.set_exception(error)

    @property
    def _starting_up(self) -> bool:
        """Until all are ready. A start that failed is never over: nothing is restarted."""
        started = self._started
        if started is None:
            return False
        return not started.done() or started.cancelled() or started.exception() is not None

    # ---- deaths

    def _ended(self, instance: Instance) -> None:
        slot = self._slot(instance)
        if slot.current is not instance:
            return
        slot.current = None
        self._cancel_timer(slot)
        if self._stopping:
            slot.state = State.STOPPED
            return
        if self._starting_up:
            slot.state, slot.reason = State.FAILED, instance.reason
            self._resolve_start(launch_error(instance))
            return
        self._died(slot, instance.reason)

    def _died(self, slot: _Slot, reason: str) -> None:
        """After its end, or instead of its start."""
        slot.reason = reason
        if self._stopping:
            slot.state = State.STOPPED
            return
        if self._starting_up:
            slot.state = State.FAILED
            self._resolve_start(LaunchError(f"worker {slot.spec.instance} did not start: {reason}"))
            return
        self._on_death(slot.spec)
        delay = slot.policy.died(time.monotonic())
        if delay is None:
            slot.state = State.FAILED
            self._log(f"{slot.spec.instance} died too often and stays down: {reason}")
            return
        slot.state = State.BACKOFF
        self._log(f"{slot.spec.instance} died ({reason}); it starts again in {delay:g} s")
        slot.timer = self._loop.call_later(delay, self._spawn, slot)

    def _check_liveness(self) -> None:
        timeout_s = self._options.worker_timeout_s
        timer = self._liveness_timer
        we_slept = timer is not None and self._loop.time() - timer.when() > timeout_s / 4
        now = time.monotonic()
        for slot in self._slots:
            instance = slot.current
            if slot.state is not State.READY or instance is None:
                continue
            if we_slept:  # stopped or starved: unread answers may wait in the sockets
                instance.report_alive()
            elif now - instance.last_alive_s > timeout_s:
                instance.kill(f"did not answer for {timeout_s:g} s")
        self._liveness_timer = self._loop.call_later(timeout_s / 4, self._check_liveness)

    @staticmethod
    def _cancel_timer(slot: _Slot) -> None:
        if slot.timer is not None:
            slot.timer.cancel()
            slot.timer = None

    # ---- end

    async def stop(self, drain_s: float = 0.0) -> None:
        """End every process: on its own within `drain_s`, then SIGTERM, then SIGKILL.

        Who wants ranks to end on their own sends them `Drain` before; a driver's `drain_signal` is
        sent here. Idempotent; returns when every process is reaped.
        """
        self._begin_stop()
        number = self._driver.drain_signal
        if number is not None:
            drain_s = max(drain_s, self._options.drain_signal_s)
            for instance in self.instances():
                instance.send_signal(number)
        await self._wait_ended(drain_s)
        for instance in self.instances():
            instance.send_signal(signal.SIGTERM)
        await self._wait_ended(self._options.term_grace_s if drain_s > 0 else 0.0)
        self.kill_all()
        await self._wait_ended(_KILL_DEADLINE_S)
        for instance in self.instances():
            self._log(f"{instance.instance}: processes {instance.pids} did not die of SIGKILL")

    def kill_all(self) -> None:
        """SIGKILL every process now; `stop` still has to be awaited."""
        self._begin_stop()
        for instance in self.instances():
            instance.kill("was stopped")

    def _begin_stop(self) -> None:
        self._stopping = True
        if self._liveness_timer is not None:
            self._liveness_timer.cancel()
        for slot in self._slots:
            self._cancel_timer(slot)
            if slot.current is None:
                slot.state = State.STOPPED
        self._resolve_start(LaunchError("stopped before every worker was ready"))

    async def _wait_ended(self, timeout_s: float) -> None:
        waits = [asyncio.ensure_future(each.ended.wait()) for each in self.instances()]
        if not waits:
            return
        _, pending = await asyncio.wait(waits, timeout=timeout_s)
        for wait in pending:
            wait.cancel()
