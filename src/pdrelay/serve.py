"""`pdrelay serve`, put together: one front door, the supervisor, and their end.

This is the composition root, above both `launch` and `router`, which do not know each other.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from socket import socket
from typing import Any, Protocol

from aiohttp import web

from pdrelay.core import awake
from pdrelay.core.endpoint import HttpEndpoint
from pdrelay.core.heap import settle_heap
from pdrelay.errors import LaunchError, TransportError
from pdrelay.launch.attached import AttachedInstance, Attachments
from pdrelay.launch.config import ServeConfig
from pdrelay.launch.driver import Driver
from pdrelay.launch.external import (
    attached_endpoints,
    describe_external,
    external_plan,
    make_driver,
)
from pdrelay.launch.host import Host, inspect_host
from pdrelay.launch.instance import Listener
from pdrelay.launch.listen import BACKLOG, listen, url_of
from pdrelay.launch.native_driver import WORKER_COMMAND, NativeDriver, RankPlan
from pdrelay.launch.plan import Plan
from pdrelay.launch.preflight import check_files, check_memory, check_topology, describe
from pdrelay.launch.ready_file import write_ready_file
from pdrelay.launch.resolve import resolve
from pdrelay.launch.restart_policy import RestartOptions
from pdrelay.launch.run_dir import RunDir
from pdrelay.launch.shared_pool import SharedPool, open_shared_pool
from pdrelay.launch.stop_signals import StopSignals
from pdrelay.launch.supervisor import Supervisor, SupervisorOptions
from pdrelay.launch.topology import InstanceSpec, instances
from pdrelay.launch.transport_choice import settle_transport
from pdrelay.model.config import load_model_config

_WORKER_EXIT_S = 10.0  # for a drained worker to exit on its own
_CLOSE_S = 2.0  # for handlers of failed requests to answer


class FrontDoor(Listener, Protocol):
    """The HTTP side, and who talks to the ranks."""

    runner: web.AppRunner  # its shutdown timeout is the drain timeout

    def busy(self) -> bool:
        """Whether requests are in flight."""

    async def all_met(self) -> None:
        """Returns when ready workers are prepared for each other; after a deadline in any case."""

    def drain_workers(self) -> None:
        """Tell every worker to finish what runs and exit."""

    def attach(self, instance: AttachedInstance, endpoint: HttpEndpoint) -> None:
        """Talk to an instance that was started elsewhere."""

    async def close(self) -> None:
        """Flush and release what it holds. Called once, last."""


# (plan, why an instance is down or "") -> the front door
FrontDoorFactory = Callable[[Plan, Callable[[], dict[str, str]]], FrontDoor]


def default_front_door(plan: Plan, down: Callable[[], dict[str, str]]) -> FrontDoor:
    from pdrelay.front_door import RouterFrontDoor

    return RouterFrontDoor(plan, down)


def run_server(
    config: ServeConfig,
    *,
    command: Sequence[str] = WORKER_COMMAND,
    make_front_door: FrontDoorFactory = default_front_door,
) -> int:
    """Serve until SIGINT, SIGTERM or SIGHUP; returns 0. Main thread only.

    Raises ConfigError before any process starts, LaunchError when a worker does not become ready.
    """
    logging.basicConfig(
        level=config.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    host = inspect_host()
    native = config.engine.engine == "native"
    plan = native_plan(config, host) if native else external_plan(config, host)
    config = plan.config
    check_files(config, host)
    with contextlib.ExitStack() as stack:
        sock = stack.enter_context(contextlib.closing(listen(config.host, config.port)))
        run_dir = stack.enter_context(RunDir())
        pool = stack.enter_context(
            contextlib.closing(open_shared_pool(plan.resolved.transport, plan.resolved.layout))
        )
        driver: Driver | None = None
        lines = describe(config, plan.resolved, host) if native else describe_external(plan)
        if native:
            ranks = RankPlan(config, plan.resolved, run_dir, pool.description, pool.fd)
            driver = NativeDriver(ranks, command)
        elif not config.external.attach:
            driver, more = make_driver(plan, host, run_dir, stack)
            lines += more
        for line in lines:
            _say(line)
        selector = awake.AwakeSelector() if plan.resolved.busy_wait else None
        with awake.runner(selector) as runner:
            runner.run(_run(plan, sock, driver, pool, selector, make_front_door))
    return 0


def native_plan(config: ServeConfig, host: Host) -> Plan:
    """Raises ConfigError for what cannot run here, before any process starts."""
    model = load_model_config(config.engine.model)
    check_topology(config, host)
    resolved = resolve(config, model, host)
    check_memory(config, resolved, host)
    specs = instances(config.topology)
    return Plan(config, model, settle_transport(resolved, specs), specs)


async def _run(plan: Plan, *parts: Any) -> None:
    await _Server(plan, *parts).run()


def _say(line: str) -> None:
    """To standard output; nobody needs to listen."""
    with contextlib.suppress(OSError, ValueError):
        print(line, flush=True)


def _log(line: str) -> None:
    with contextlib.suppress(OSError, ValueError):
        print(line, file=sys.stderr, flush=True)


class _Server:
    """One run of the server on one event loop."""

    def __init__(
        self,
        plan: Plan,
        sock: socket,
        driver: Driver | None,
        pool: SharedPool,
        selector: awake.AwakeSelector | None,
        make_front_door: FrontDoorFactory,
    ) -> None:
        self._plan = plan
        self._config = plan.config
        self._sock = sock
        self._pool = pool
        self._url = url_of(sock)
        self._front_door = make_front_door(plan, self._down)
        if selector is not None:
            selector.busy = self._front_door.busy
        self._supervisor = self._supervise(plan, driver)
        self._closing: asyncio.Task[None] | None = None

    def _supervise(self, plan: Plan, driver: Driver | None) -> Supervisor | Attachments:
        if driver is None:
            return Attachments(
                attached_endpoints(plan),
                self._front_door.attach,
                startup_timeout_s=plan.config.startup_timeout_s,
            )
        return Supervisor(
            plan.specs,
            driver,
            self._front_door,
            options=SupervisorOptions(
                startup_timeout_s=plan.config.startup_timeout_s,
                worker_timeout_s=plan.config.worker_timeout_s,
                restart=_restart_options(plan.config),
            ),
            log=_log,
            on_death=self._reclaim,
        )

    def _down(self) -> dict[str, str]:
        """Instance id to why it is down, of those that are not ready."""
        return self._supervisor.down()

    def _reclaim(self, spec: InstanceSpec) -> None:
        try:
            self._pool.reclaim(spec.index)
        except TransportError as error:
            _log(f"what {spec.instance} held in the shared pool stays there: {error}")

    async def run(self) -> None:
        with StopSignals() as stop:
            try:
                # HTTP answers while workers load, so that /health says 503 instead of nothing.
                runner = self._front_door.runner
                await runner.setup()
                await web.SockSite(runner, self._sock, backlog=BACKLOG).start()
                await self._serve(stop)
            finally:
                self._remove_ready_file()
                await self._supervisor.stop()
                await _within(self._close_http(), _CLOSE_S)
                await self._front_door.close()

    def _close_http(self) -> asyncio.Task[None]:
        """Stop accepting and wait for handlers: begun once, awaited by whoever needs it."""
        if self._closing is None:
            self._closing = asyncio.create_task(self._front_door.runner.cleanup())
        return self._closing

    async def _serve(self, stop: StopSignals) -> None:
        self._remove_ready_file()
        started = time.monotonic()
        if not await _unless(asyncio.create_task(self._start()), stop.drain):
            return
        settle_heap()
        self._announce(time.monotonic() - started)
        await stop.drain.wait()
        _say("pdrelay is draining; a second signal ends it at once")
        await self._drain(stop)
        _say("pdrelay has stopped")

    async def _start(self) -> None:
        """Raises LaunchError."""
        await self._supervisor.start()
        await self._front_door.all_met()

    def _announce(self, seconds: float) -> None:
        config = self._config
        model = self._plan.resolved.served_model_name
        topology = str(config.topology)
        if config.ready_file is not None:
            path = Path(config.ready_file)
            try:
                write_ready_file(path, self._url, model, topology, self._supervisor.instances())
            except OSError as error:
                raise LaunchError(f"cannot write --ready-file {path}: {error.strerror}") from error
        _say(f"pdrelay is ready: {self._url} serves {model!r} on {topology} after {seconds:.1f} s")

    def _remove_ready_file(self) -> None:
        if self._config.ready_file is not None:
            Path(self._config.ready_file).unlink(missing_ok=True)

    async def _drain(self, stop: StopSignals) -> None:
        """Refuse new connections, let running requests finish, then the workers."""
        closing = self._close_http()
        in_time = _within(asyncio.shield(closing), self._config.drain_timeout_s)
        await _unless(asyncio.create_task(in_time), stop.now)
        if not closing.done():
            self._supervisor.kill_all()  # fails what still runs
            return
        self._front_door.drain_workers()
        workers = asyncio.create_task(self._supervisor.stop(_WORKER_EXIT_S))
        if not await _unless(workers, stop.now):
            self._supervisor.kill_all()


def _restart_options(config: ServeConfig) -> RestartOptions:
    """A production engine may take minutes to fail its start: deaths are counted over more time."""
    if config.engine.engine == "native":
        return RestartOptions()
    return RestartOptions(max_deaths=4, window_s=4 * config.startup_timeout_s)


async def _within(work: asyncio.Future[None], seconds: float) -> None:
    """Await `work`, cancel it at the deadline."""
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(work, seconds)


async def _unless(task: asyncio.Task[None], event: asyncio.Event) -> bool:
    """Await `task` unless `event` comes first, which cancels it. Whether the task was done."""
    waiter = asyncio.create_task(event.wait())
    try:
        await asyncio.wait([task, waiter], return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            await task
            return True
        return False
    finally:
        for each in (task, waiter):
            each.cancel()
        await asyncio.gather(task, waiter, return_exceptions=True)
