"""Topologies as the lab names them: `replicas:2`, `tp:2`, `pd:1:1`, on an engine when one is named
before them: `vllm/replicas:2`, `vllm/pd:1:1`, `vllm+nixl/pd:1:1` (with a connector)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from pdrelay.errors import ConfigError

TopologyKind = Literal["replicas", "tp", "pd"]
NATIVE = "native"
ENGINES = (NATIVE, "vllm", "sglang")
_FORM = re.compile(
    r"(?:(?P<engine>native|vllm|sglang)(?:\+(?P<connector>[a-z0-9-]{1,20}))?/)?"
    r"(?:(?P<kind>replicas|tp):(?P<count>\d{1,3})|pd:(?P<prefill>\d{1,3}):(?P<decode>\d{1,3}))"
)
_SHOWN = {"vllm": "vLLM", "sglang": "SGLang"}


@dataclass(frozen=True)
class LabTopology:
    """One topology under test. `num_gpus` counts ranks: GPUs, or cores on a CPU."""

    kind: TopologyKind
    counts: tuple[int, ...]  # (N,) or (producers, consumers)
    engine: str = ""  # "": as the run says for all
    connector: str = ""  # of P/D; "": the engine's default

    @property
    def name(self) -> str:
        """Directory name, such as `pd-1-1`, `vllm.pd-1-1`, `vllm.nixl.pd-1-1`."""
        shape = "-".join([self.kind, *map(str, self.counts)])
        engine = "" if self.engine == NATIVE else self.engine
        return ".".join(part for part in (engine, self.connector, shape) if part)

    @property
    def num_gpus(self) -> int:
        return sum(self.counts)

    @property
    def label(self) -> str:
        return label_of(self.name)

    @property
    def serve_args(self) -> list[str]:
        """The `pdrelay serve` flags that start it."""
        engine = [] if self.engine in ("", NATIVE) else ["--engine", self.engine]
        if self.connector:
            engine += ["--connector", self.connector]
        if self.kind == "pd":
            return [*engine, "--prefill", str(self.counts[0]), "--decode", str(self.counts[1])]
        flag = "--replicas" if self.kind == "replicas" else "--tp"
        return [*engine, flag, str(self.counts[0])]


def parse_topology(text: str) -> LabTopology:
    """Read one topology. Raises ConfigError."""
    match = _FORM.fullmatch(text.strip())
    if match is None:
        raise ConfigError(
            f"topology {text!r} is not known: write replicas:N, tp:N or pd:PREFILL:DECODE, with "
            "an engine as in vllm/pd:1:1 or vllm+nixl/pd:1:1"
        )
    kind: TopologyKind = "pd"
    if match["kind"]:
        kind = "replicas" if match["kind"] == "replicas" else "tp"
    counts = tuple(int(match[name]) for name in ("count", "prefill", "decode") if match[name])
    if 0 in counts:
        raise ConfigError(f"topology {text!r} has no instance: every count must be at least 1")
    engine, connector = match["engine"] or "", match["connector"] or ""
    if connector and (kind != "pd" or engine == NATIVE):
        raise ConfigError(
            f"topology {text!r}: a connector is for prefill and decode on vllm or sglang: leave it "
            "out"
        )
    return LabTopology(kind, counts, engine, connector)


def parse_topologies(text: str) -> list[LabTopology]:
    """Read a comma-separated list. Raises ConfigError for an empty list or a duplicate."""
    topologies = [parse_topology(part) for part in text.split(",") if part.strip()]
    if not topologies:
        raise ConfigError("no topology given: write for example replicas:2,pd:1:1")
    return distinct(topologies)


def distinct(topologies: list[LabTopology]) -> list[LabTopology]:
    """The same list. Raises ConfigError for a duplicate."""
    for index, topology in enumerate(topologies):
        if topology.name in [each.name for each in topologies[:index]]:
            raise ConfigError(f"topology {topology.name} is given twice: remove one")
    return topologies


def on_engines(topologies: Sequence[LabTopology], engines: Sequence[str]) -> list[LabTopology]:
    """Every topology that names no engine, on each of `engines` in turn. Raises ConfigError for
    what comes up twice."""
    found: list[LabTopology] = []
    for topology in topologies:
        if topology.engine:
            found.append(topology)
        else:
            found += [replace(topology, engine=engine) for engine in engines]
    return distinct(found)


def label_of(name: str) -> str:
    """What people read: `2 replicas`, `TP=2`, `P/D 1:1`, `vLLM P/D 1:1 (nixl)`."""
    *before, _ = name.split(".")
    engine = f"{_SHOWN.get(before[0], before[0])} " if before else ""
    connector = f" ({before[1]})" if len(before) > 1 else ""
    kind, counts = parse_name(name)
    if kind == "replicas":
        shown = "1 replica" if counts == (1,) else f"{counts[0]} replicas"
    elif kind == "tp":
        shown = f"TP={counts[0]}"
    else:
        shown = f"P/D {':'.join(map(str, counts))}"
    return f"{engine}{shown}{connector}"


def parse_name(name: str) -> tuple[str, tuple[int, ...]]:
    """Kind and counts in a topology's name: `vllm.pd-1-1` is ("pd", (1, 1))."""
    kind, *counts = name.rpartition(".")[2].split("-")
    return kind, tuple(map(int, counts))


def is_pd(name: str) -> bool:
    return name.rpartition(".")[2].startswith("pd-")


def engine_of(name: str) -> str:
    """The engine in a topology's name."""
    return name.partition(".")[0] if "." in name else NATIVE
