"""What `pdrelay lab` runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pdrelay.bench.slo import Slo
from pdrelay.lab.rundir import EXPERIMENTS
from pdrelay.lab.scale import Scale
from pdrelay.lab.topology import NATIVE, LabTopology


@dataclass(frozen=True)
class TraceConfig:
    """A real trace and how it is cut to size; see bench.traces.read_trace."""

    path: Path
    time_scale: float = 1.0
    max_input_len: int | None = None
    max_output_len: int | None = None
    duration_s: float | None = None  # of the trace itself, before scaling


@dataclass(frozen=True)
class LabConfig:
    """The whole run. `baseline` is the topology on which the capacity is measured."""

    model: str
    topologies: tuple[LabTopology, ...]
    out: Path
    scale: Scale
    quick: bool
    slo: Slo
    experiments: tuple[str, ...] = EXPERIMENTS
    cases: tuple[str, ...] = ()  # patterns of case names, as fnmatch reads them; (): all
    repeats: int = 1
    seed: int = 0
    trace: TraceConfig | None = None
    serve_args: tuple[str, ...] = ()  # passed to every server
    engine_serve_args: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # by engine
    startup_timeout_s: float = 300.0
    request_timeout_s: float = 120.0
    add: bool = False  # to what `out` holds, instead of a new directory
    argv: tuple[str, ...] = field(default=())

    @property
    def baseline(self) -> LabTopology:
        """One replica when it is among the topologies, else the first."""
        single = [t for t in self.topologies if t.kind == "replicas" and t.counts == (1,)]
        return (single or list(self.topologies))[0]

    def args_of(self, topology: LabTopology) -> tuple[str, ...]:
        """Flags of `pdrelay serve` beside the topology's own."""
        return (*self.serve_args, *self.engine_serve_args.get(topology.engine or NATIVE, ()))

    def as_json(self) -> dict[str, Any]:
        """For run.json: plain values, the topologies by name."""
        values = asdict(self)
        values["topologies"] = [topology.name for topology in self.topologies]
        values["out"] = self.out.name
        values["slo"] = {"ttft_ms": self.slo.ttft_ms, "tpot_ms": self.slo.tpot_ms}
        values["trace"] = None if self.trace is None else asdict(self.trace)
        if self.trace is not None:
            values["trace"]["path"] = self.trace.path.name
        del values["argv"]
        return values
