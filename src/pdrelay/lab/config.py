"""What `pdrelay lab` runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pdrelay.bench.slo import Slo
from pdrelay.lab.rundir import EXPERIMENTS
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
class Scale:
    """How much each experiment sends. Seconds are of wall time, lengths in tokens.

    `quick` meets the p50 sample floor (11) up to 2,048 tokens; `full` meets p90's (64) by repeats.
    """

    probes: tuple[tuple[int, int], ...]  # experiment 1: (input length, requests) on an idle server
    busy_probes: tuple[tuple[int, int], ...]
    num_streams: int
    stream_output_len: int
    rate_fractions: tuple[float, ...]
    traffic_s: float
    synthetic_trace_s: float  # stands in where no trace is given
    chat_output_mean: float
    chat_max_output_len: int
    quiet_s: float
    long_input_len: int
    num_long: int
    long_gap_s: float
    shape_requests: int
    budget_s: float | None  # for the whole run; steps that no longer fit are left out and named


QUICK = Scale(
    probes=((128, 12), (512, 12), (2048, 12), (8192, 3)),
    busy_probes=((128, 11), (512, 11), (2048, 11), (8192, 1)),
    num_streams=4,
    stream_output_len=400,
    rate_fractions=(0.5, 1.0, 1.5),
    traffic_s=4.0,
    synthetic_trace_s=4.0,
    chat_output_mean=64.0,
    chat_max_output_len=128,
    quiet_s=1.5,
    long_input_len=2048,
    num_long=8,
    long_gap_s=0.9,
    shape_requests=12,
    budget_s=330.0,
)

_FULL_PROBES = (*((length, 16) for length in (128, 256, 512, 1024, 2048, 4096)), (8192, 12))

FULL = Scale(
    probes=_FULL_PROBES,
    busy_probes=_FULL_PROBES,
    num_streams=4,
    stream_output_len=400,
    rate_fractions=(0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0),
    traffic_s=20.0,
    synthetic_trace_s=20.0,
    chat_output_mean=64.0,
    chat_max_output_len=256,
    quiet_s=3.0,
    long_input_len=2048,
    num_long=24,
    long_gap_s=0.9,
    shape_requests=24,
    budget_s=None,
)


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
    repeats: int = 1
    seed: int = 0
    trace: TraceConfig | None = None
    serve_args: tuple[str, ...] = ()  # passed to every server
    engine_serve_args: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # by engine
    startup_timeout_s: float = 300.0
    request_timeout_s: float = 120.0
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
