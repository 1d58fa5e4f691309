"""What the drivers of production engines share: one HTTP server an instance, on loopback."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pdrelay
from pdrelay.core.endpoint import EngineName, HttpEndpoint
from pdrelay.core.messages import Ready, Role
from pdrelay.doctor import diagnose
from pdrelay.launch.config import ServeConfig
from pdrelay.launch.driver import Launch, ProcessSpec, last_line
from pdrelay.launch.gpus import NO_MULTICAST, VARIABLE
from pdrelay.launch.ports import Ports
from pdrelay.launch.resolve import ResolvedConfig
from pdrelay.launch.run_dir import RunDir
from pdrelay.launch.topology import InstanceSpec

_QUIET = {  # no reports to anyone, no downloads where a directory is given
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONUNBUFFERED": "1",
}


def flag_of(argument: str) -> str:
    """The flag of an engine's argument, as these engines read it: `--a_b=1` is `--a-b`."""
    flag = argument.split("=", 1)[0]
    return flag.replace("_", "-") if flag.startswith("--") else flag


@dataclass(frozen=True)
class EnginePlan:
    """Everything a driver of a production engine builds commands from."""

    config: ServeConfig
    resolved: ResolvedConfig
    run_dir: RunDir
    ports: Ports
    python: str
    version: str
    model_dir: str  # what the engine loads
    gpus: Mapping[str, str]  # CUDA_VISIBLE_DEVICES by instance; empty on CPU
    engine_flags: tuple[str, ...] = ()  # that this version of it knows
    api_key: str = ""  # between front door and instances
    has_flashinfer: bool = True  # in the engine's environment

    @property
    def engine(self) -> EngineName:
        engine = self.config.engine.engine
        assert engine != "native"
        return engine

    def own_gpus(self, spec: InstanceSpec) -> str:
        """Those that the instance computes on: the first of what it sees, one a rank."""
        return ",".join(self.gpus[spec.instance].split(",")[: spec.world_size])

    def sharers(self, spec: InstanceSpec) -> int:
        """How many instances compute on this one's (first) GPU, itself included."""
        first = self.gpus[spec.instance].split(",")[0]
        return sum(gpus.split(",")[0] == first for gpus in self.gpus.values())


class ExternalDriver:
    """Base of the drivers: everything but the engine's own arguments and environment."""

    drain_signal: signal.Signals | None = signal.SIGTERM

    def __init__(self, plan: EnginePlan) -> None:
        self.plan = plan

    def arguments(self, spec: InstanceSpec, incarnation: int, port: int) -> list[str]:
        raise NotImplementedError

    def environment(self, spec: InstanceSpec) -> dict[str, str]:
        raise NotImplementedError

    def notes(self) -> list[str]:
        """What it sets for want of something in the environment, one line each."""
        return []

    def endpoint(
        self, spec: InstanceSpec, incarnation: int, ready: Ready, url: str
    ) -> HttpEndpoint:
        raise NotImplementedError

    def launch(self, spec: InstanceSpec, incarnation: int) -> Launch:
        plan = self.plan
        port = plan.ports.port(spec.instance)
        process = ProcessSpec(
            label=plan.engine,
            prefix=f"[{spec.instance}] ",
            command=(
                plan.python,
                *self.arguments(spec, incarnation, port),
                *plan.config.external.engine_args,
            ),
            env=self._environment(spec) | self.environment(spec),
            guarded=True,
        )
        url = f"http://127.0.0.1:{port}"
        return Launch((process,), self.endpoint(spec, incarnation, self._ready(spec), url))

    def _environment(self, spec: InstanceSpec) -> dict[str, str]:
        on_gpu = self.plan.resolved.device == "cuda"
        env = {**_QUIET, **(NO_MULTICAST if on_gpu else {}), **os.environ}
        if spec.instance in self.plan.gpus:
            env[VARIABLE] = self.plan.gpus[spec.instance]
        if Path(self.plan.model_dir).is_dir():
            env.setdefault("HF_HUB_OFFLINE", "1")
        return env

    def _ready(self, spec: InstanceSpec) -> Ready:
        plan = self.plan
        resolved = {"engine": plan.engine, "engine_version": plan.version}
        if plan.gpus:
            resolved["gpus"] = plan.own_gpus(spec)
        if spec.role is not Role.BOTH:
            resolved["connector"] = plan.resolved.transport
        return Ready(
            instance=spec.instance,
            role=spec.role,
            pid=0,
            layout=plan.resolved.layout,
            max_model_len=plan.resolved.max_model_len,
            transport=plan.resolved.transport,
            resolved=resolved,
        )

    def explain(self, lines: Sequence[str]) -> str:
        found = diagnose("\n".join(lines), self.plan.engine, self.plan.version)
        if not found:
            return last_line(lines)
        text = str(found[0])
        return text if found[0].line in text else f"its log says: {found[0].line}; {text}"


def import_path(run_dir: RunDir) -> str:
    """A directory in which only `pdrelay` can be imported, for an engine's PYTHONPATH: the
    directory that holds this package may hold this interpreter's own packages too."""
    directory = run_dir.path / "import"
    if not directory.exists():
        directory.mkdir()
        (directory / "pdrelay").symlink_to(Path(pdrelay.__file__).parent, target_is_directory=True)
    return str(directory)
