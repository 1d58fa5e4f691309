"""What a run will do, and about how long it takes: before anything is started."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from types import MappingProxyType

from pdrelay.bench.server_info import ServerInfo
from pdrelay.errors import ConfigError
from pdrelay.lab.config import LabConfig
from pdrelay.lab.experiments import interference, shapes, streams, traffic, ttft
from pdrelay.lab.experiments.base import Context, Step
from pdrelay.lab.topology import NATIVE, LabTopology

_STEPS: Mapping[str, tuple[Callable[[Context], list[Step]], ...]] = MappingProxyType(
    {
        "ttft": (ttft.steps,),
        "traffic": (traffic.steps,),
        "interference": (interference.steps,),
        "shapes": (shapes.steps, streams.steps),
    }
)
_SOME_RATE = 1.0  # where the capacity is not measured yet: the steps' time does not depend on it


@dataclass(frozen=True)
class PlannedServer:
    """One start of one topology. Seconds are estimates."""

    topology: LabTopology
    rep: int
    start_s: float  # to start, warm up and stop it
    steps: tuple[Step, ...]  # to be read, not run

    @property
    def steps_s(self) -> float:
        return sum(step.estimate_s for step in self.steps)

    @property
    def total_s(self) -> float:
        return self.start_s + self.steps_s


def schedule(topologies: Sequence[LabTopology], repeats: int) -> list[tuple[LabTopology, int]]:
    """Starts in order: each repeat visits all topologies, one place further round each time."""
    count = len(topologies)
    return [
        (topologies[(place + rep) % count], rep) for rep in range(repeats) for place in range(count)
    ]


def steps_of(context: Context) -> list[Step]:
    """The chosen experiments' steps on one server, without the cases that were not asked for."""
    config = context.config
    found = [step for name in config.experiments for make in _STEPS[name] for step in make(context)]
    if not config.cases:
        return found
    return [step for step in found if _asked_for(context.topology, step.case, config.cases)]


def _asked_for(topology: LabTopology, case: str, patterns: Sequence[str]) -> bool:
    """`fixed` on every topology, `*pd-1-1/fixed` on those of such names."""
    names = (case, f"{topology.name}/{case}")
    return any(fnmatchcase(name, pattern) for name in names for pattern in patterns)


def plan(config: LabConfig) -> list[PlannedServer]:
    """Every start in order: as the topologies are given, but the baseline first where its capacity
    sets everybody's rates. Raises ConfigError when the cases asked for do not exist, or for a trace
    that cannot be read."""
    order = list(config.topologies)
    if not config.scale.rates:
        order.sort(key=lambda topology: topology != config.baseline)
    planned: list[PlannedServer] = []
    compiled: list[tuple[str, ...]] = []
    for topology, rep in schedule(order, config.repeats):
        graphs = _graphs(topology)
        planned.append(_server(config, topology, rep, compiled=graphs in compiled))
        compiled.append(graphs)
    if not any(server.steps for server in planned):
        raise ConfigError(
            f"--cases {','.join(config.cases)} names no case of these experiments: see what "
            "there is with --dry-run and without --cases"
        )
    return planned


def _graphs(topology: LabTopology) -> tuple[str, ...]:
    """The same for topologies whose instances an engine finds in its compile cache when one of them
    has been compiled. vLLM names its cache after the shards, whether there is a connector at all,
    and the port of NIXL's."""
    shape = "replicas" if topology.kind == "replicas" else topology.name
    return (topology.engine, shape, topology.connector)


def _server(config: LabConfig, topology: LabTopology, rep: int, *, compiled: bool) -> PlannedServer:
    info = ServerInfo(config.model, config.model)
    context = Context(config, topology, rep, "", info, capacity_rps=_SOME_RATE)
    context.trace_path = config.trace.path if config.trace else None
    native = topology.engine in ("", NATIVE)
    start_s = config.scale.pace.start(native=native, compiled=compiled)
    return PlannedServer(topology, rep, start_s, tuple(steps_of(context)))
