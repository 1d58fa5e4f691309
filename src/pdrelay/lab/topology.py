"""Topologies as the lab names them: `replicas:2`, `tp:2`, `pd:1:1`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from pdrelay.errors import ConfigError

TopologyKind = Literal["replicas", "tp", "pd"]
_FORM = re.compile(r"(?:(replicas|tp):(\d{1,3})|pd:(\d{1,3}):(\d{1,3}))")


@dataclass(frozen=True)
class LabTopology:
    """One topology under test. `num_gpus` counts ranks: GPUs, or cores on a CPU."""

    kind: TopologyKind
    counts: tuple[int, ...]  # (N,) or (producers, consumers)

    @property
    def name(self) -> str:
        """Directory name, such as `pd-1-1`."""
        return "-".join([self.kind, *map(str, self.counts)])

    @property
    def num_gpus(self) -> int:
        return sum(self.counts)

    @property
    def label(self) -> str:
        return label_of(self.name)

    @property
    def serve_args(self) -> list[str]:
        """The `pdrelay serve` flags that start it."""
        if self.kind == "pd":
            return ["--prefill", str(self.counts[0]), "--decode", str(self.counts[1])]
        flag = "--replicas" if self.kind == "replicas" else "--tp"
        return [flag, str(self.counts[0])]


def parse_topology(text: str) -> LabTopology:
    """Read one topology. Raises ConfigError."""
    match = _FORM.fullmatch(text.strip())
    if match is None:
        raise ConfigError(
            f"topology {text!r} is not known: write replicas:N, tp:N or pd:PREFILL:DECODE"
        )
    kind, count, prefill, decode = match.groups()
    counts = (int(count),) if kind else (int(prefill), int(decode))
    if 0 in counts:
        raise ConfigError(f"topology {text!r} has no instance: every count must be at least 1")
    if kind == "replicas":
        return LabTopology("replicas", counts)
    return LabTopology("tp" if kind else "pd", counts)


def parse_topologies(text: str) -> list[LabTopology]:
    """Read a comma-separated list. Raises ConfigError for an empty list or a duplicate."""
    topologies = [parse_topology(part) for part in text.split(",") if part.strip()]
    if not topologies:
        raise ConfigError("no topology given: write for example replicas:2,pd:1:1")
    for index, topology in enumerate(topologies):
        if topology in topologies[:index]:
            raise ConfigError(f"topology {topology.name} is given twice: remove one")
    return topologies


def label_of(name: str) -> str:
    """What people read: `2 replicas`, `TP=2`, `P/D 1:1`."""
    kind, *counts = name.split("-")
    if kind == "replicas":
        return "1 replica" if counts == ["1"] else f"{counts[0]} replicas"
    if kind == "tp":
        return f"TP={counts[0]}"
    return f"P/D {':'.join(counts)}"


def is_pd(name: str) -> bool:
    return name.startswith("pd-")
