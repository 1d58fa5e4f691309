"""Runs the lab: every topology in turn, every experiment on it, files in the run directory."""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from pdrelay import __version__
from pdrelay.bench.client import ClosedLoop
from pdrelay.bench.server_info import fetch_server_info
from pdrelay.core import awake
from pdrelay.errors import ConfigError, LaunchError, PdrelayError
from pdrelay.lab.added import add_to, is_complete, remove_partial
from pdrelay.lab.budget import Budget
from pdrelay.lab.config import LabConfig
from pdrelay.lab.environment import environment, git_commit
from pdrelay.lab.experiments import traffic
from pdrelay.lab.experiments.base import Context
from pdrelay.lab.gpu_watch import GpuWatch
from pdrelay.lab.plan import PlannedServer, plan, steps_of
from pdrelay.lab.progress import Reporter
from pdrelay.lab.rundir import LaunchInfo, RunInfo, claim_directory, write_json
from pdrelay.lab.server import Launcher, ServerHandle, engine_in
from pdrelay.lab.topology import LabTopology
from pdrelay.launch.host import inspect_host
from pdrelay.telemetry.source import OpenGpus, open_source

WARMUP_OUTPUT_LEN = 16
WARMUP_S = 180.0  # a server that takes longer to answer its first prompts answers none
_STEP_FACTOR, _STEP_MIN_S = 4.0, 45.0  # times its estimate, and at least, until a step is given up
SYNTHETIC_TRACE_FILE = "synthetic_trace.csv"


@dataclass
class _Progress:
    """What has been learnt so far."""

    capacity_rps: float | None = None
    trace_path: Path | None = None
    launches: dict[str, LaunchInfo] = field(default_factory=dict)


async def run_lab(
    config: LabConfig,
    launcher: Launcher,
    reporter: Reporter,
    open_gpus: OpenGpus = open_source,
    *,
    client_waits_awake: bool = False,
) -> RunInfo:
    """Write a complete run directory at `config.out`.

    A server that does not start, or an experiment that fails, is noted and the rest goes on.
    Raises ConfigError when the directory is in use or the trace is bad, LaunchError when no server
    started at all. `client_waits_awake`: what the running loop does, for the record.
    """
    return await _Lab(config, launcher, reporter, open_gpus, client_waits_awake).run()


class _Lab:
    def __init__(
        self,
        config: LabConfig,
        launcher: Launcher,
        reporter: Reporter,
        open_gpus: OpenGpus,
        client_waits_awake: bool,
    ) -> None:
        self._config = config
        self._launcher = launcher
        self._open_gpus = open_gpus
        self._client_waits_awake = client_waits_awake
        self._reporter = reporter
        self._so_far = _Progress(trace_path=config.trace.path if config.trace else None)
        self._plan = plan(config)
        self._info = self._run_info()
        self._budget = Budget(config.scale.budget_s)

    def _run_info(self) -> RunInfo:
        config = self._config
        return RunInfo(
            pdrelay_version=__version__,
            git_commit=git_commit(),
            argv=list(config.argv),
            config=config.as_json(),
            model=config.model,
            seeds=[config.seed],
            started=_now(),
            experiments=list(config.experiments),
            topologies=[topology.name for topology in config.topologies],
            quick=config.quick,
            service_level=config.slo,
            baseline=config.baseline.name,
        )

    async def run(self) -> RunInfo:
        if self._config.trace is not None:
            traffic.check_trace(self._config.trace)
        self._claim()
        self._save_info()
        failures: list[str] = []
        for index, planned in enumerate(self._plan):
            left = [server for server in self._plan[index:] if self._budget.has(server.start_s)]
            where = f"{planned.topology.label}, repeat {planned.rep}"
            if planned not in left:
                self._note(f"{where}: left out, its start would pass the time limit")
                continue
            self._budget.begin_server(planned.total_s / sum(server.total_s for server in left))
            try:
                await self._one_start(planned, left[1:])
            except (PdrelayError, OSError, TimeoutError) as error:
                failures.append(str(error))
                self._note(f"{where}: {error}")
        self._info.ended = _now()
        self._save_info()
        if len(failures) == len(self._plan):
            raise LaunchError(f"no server started; the first failure: {failures[0]}")
        return self._info

    def _claim(self) -> None:
        """The run directory is ours, with what it held where we add to it. Raises ConfigError."""
        out, here = self._config.out, environment()
        here["client_waits_awake"] = self._client_waits_awake
        if not self._config.add:
            claim_directory(out)
            write_json(out / "environment.json", here)
            return
        self._info = add_to(out, self._info, here)
        self._plan = [each for each in self._plan if not is_complete(out, each.topology.name)]
        if not self._plan:
            raise ConfigError(f"{out} has every one of these topologies: nothing is left to do")
        for planned in self._plan:
            remove_partial(out, planned.topology.name)

    # ---- one server

    async def _one_start(self, planned: PlannedServer, later: list[PlannedServer]) -> None:
        topology, rep = planned.topology, planned.rep
        later_s = sum(server.total_s for server in later)
        self._tell(f"{topology.label}: starting", planned.total_s + later_s)
        async with AsyncExitStack() as stack:
            server = await self._start(topology, rep)
            stack.push_async_callback(server.stop)
            gpus = GpuWatch(self._open_gpus(), self._gpu_file(topology, rep), server.workers())
            stack.callback(gpus.stop)
            self._save_launch(topology, server)
            context = await self._prepare(topology, rep, server)
            # What its start took longer than planned is everybody's.
            self._budget.begin_server(planned.steps_s / max(planned.steps_s + later_s, 1e-9))
            await self._run_steps(context, later_s)
            write_json(self._directory(topology) / "workers.json", server.workers())

    def _gpu_file(self, topology: LabTopology, rep: int) -> Path:
        return self._directory(topology) / f"gpu{_suffix(rep)}.jsonl"

    async def _start(self, topology: LabTopology, rep: int) -> ServerHandle:
        suffix = _suffix(rep)
        directory = self._directory(topology)
        directory.mkdir(parents=True, exist_ok=True)
        return await self._launcher.start(
            topology,
            model=self._config.model,
            event_log_path=directory / f"events{suffix}.jsonl",
            log_path=directory / f"server{suffix}.log",
            extra_args=self._config.args_of(topology),
        )

    def _directory(self, topology: LabTopology) -> Path:
        return self._config.out / "topologies" / topology.name

    def _save_launch(self, topology: LabTopology, server: ServerHandle) -> None:
        known = self._so_far.launches.setdefault(
            topology.name,
            LaunchInfo(
                name=topology.name,
                num_gpus=topology.num_gpus,
                argv=server.argv,
                engine=engine_in(server.workers()),
            ),
        )
        self._info.engines[topology.name] = known.engine
        known.startup_s.append(server.startup_s)
        write_json(self._directory(topology) / "launch.json", known)

    async def _prepare(self, topology: LabTopology, rep: int, server: ServerHandle) -> Context:
        """Warm up; on the first start measure the capacity and make the trace."""
        info = await fetch_server_info(server.url)
        context = Context(
            self._config,
            topology,
            rep,
            server.url,
            info,
            pids=server.pids,
            engine=self._info.engines.get(topology.name, ""),
        )
        await self._warm_up(context)
        if "traffic" in self._config.experiments:
            if self._so_far.capacity_rps is None and not context.scale.rates:
                await self._measure_capacity(context)
            context.capacity_rps = self._so_far.capacity_rps
            context.trace_path = self._so_far.trace_path
        return context

    async def _warm_up(self, context: Context) -> None:
        """Every instance computes every length class once, with other prompts than measured."""
        lengths = [
            (length, WARMUP_OUTPUT_LEN)
            for length in context.scale.warmup_lengths
            for _ in range(2 * context.topology.num_gpus)
            if context.fits(length, WARMUP_OUTPUT_LEN)
        ]
        requests = context.prompts(lengths or [(4, 4)], "warm-up", tag="warm-up")
        mode = ClosedLoop(2 * context.topology.num_gpus)
        try:
            async with asyncio.timeout(WARMUP_S):
                result = await context.load("warm-up", requests, mode)
        except TimeoutError:
            raise LaunchError(
                f"{context.topology.label} did not answer its warm-up within {WARMUP_S:g} s; see "
                "its server.log"
            ) from None
        if not any(record.ok for record in result.records):
            raise LaunchError(
                f"{context.topology.label} answers no request: {result.records[0].error}; see its "
                "server.log"
            )

    async def _measure_capacity(self, context: Context) -> None:
        self._reporter.step(f"{context.topology.label}: capacity")
        so_far = self._so_far
        self._info.baseline = context.topology.name
        so_far.capacity_rps = self._info.capacity_rps = await traffic.measure_capacity(context)
        if so_far.trace_path is None and self._config.scale.synthetic_trace_s > 0:
            so_far.trace_path = self._config.out / SYNTHETIC_TRACE_FILE
            seed = context.seed("synthetic trace")
            seconds = self._config.scale.synthetic_trace_s
            traffic.write_synthetic_trace(so_far.trace_path, so_far.capacity_rps, seconds, seed)
        self._save_info()

    # ---- its steps

    async def _run_steps(self, context: Context, later_s: float) -> None:
        """`later_s`: of the servers after this one."""
        steps = steps_of(context)
        label = context.topology.label
        for index, step in enumerate(steps):
            ahead_s = sum(each.estimate_s for each in steps[index:])
            self._tell(f"{label}: {step.name}", ahead_s + later_s)
            if not self._budget.allows(step.estimate_s):
                self._note(f"{label}, {step.name}: left out, the time limit would be passed")
                continue
            began = time.monotonic()
            limit_s = max(_STEP_MIN_S, _STEP_FACTOR * step.estimate_s * self._budget.factor)
            try:
                async with asyncio.timeout(limit_s):
                    await step.run()
            except TimeoutError:
                self._note(f"{label}, {step.name}: given up after {limit_s:.0f} s, and the server")
                return
            except PdrelayError as error:
                self._note(f"{label}, {step.name}: {error}")
            self._budget.over(step.estimate_s, time.monotonic() - began)

    def _tell(self, name: str, ahead_s: float) -> None:
        """`ahead_s`: estimate of all that is still to come."""
        self._reporter.work_left(self._budget.elapsed_s, ahead_s * self._budget.factor)
        self._reporter.step(name)

    def _note(self, text: str) -> None:
        self._info.notes.append(" ".join(text.split()))
        self._reporter.note(text)
        self._save_info()

    def _save_info(self) -> None:
        write_json(self._config.out / "run.json", self._info)


def _suffix(rep: int) -> str:
    """Of the files of one server start."""
    return f"-{rep}" if rep else ""


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def run_lab_blocking(config: LabConfig, launcher: Launcher, reporter: Reporter) -> RunInfo:
    """`run_lab` on a loop of its own."""
    host = inspect_host()
    gpus = config.scale.name == "gpu" and host.num_gpus > 0
    selector = awake.client_selector(gpus=gpus, num_cores=host.num_cores)
    lab = run_lab(config, launcher, reporter, client_waits_awake=selector is not None)
    with awake.runner(selector) as runner:
        return runner.run(lab)
