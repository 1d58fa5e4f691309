"""Which instances serve: replicas, one tensor-parallel instance, or prefill and decode."""

from __future__ import annotations

from dataclasses import dataclass

from pdrelay.core.messages import Role
from pdrelay.errors import ConfigError


@dataclass(frozen=True)
class InstanceSpec:
    """One engine: its id, what it does, and how many ranks it spans."""

    instance: str
    index: int
    role: Role
    world_size: int = 1


@dataclass(frozen=True)
class Replicas:
    """`num` co-located instances behind the router."""

    num: int

    def __str__(self) -> str:
        return f"{self.num} co-located replica{'s' if self.num != 1 else ''}"


@dataclass(frozen=True)
class TensorParallel:
    """One co-located instance over `size` ranks."""

    size: int

    def __str__(self) -> str:
        return f"1 co-located instance, tensor parallel over {self.size} ranks"


@dataclass(frozen=True)
class PrefillDecode:
    """`prefill` producers and `decode` consumers."""

    prefill: int
    decode: int

    def __str__(self) -> str:
        return f"{self.prefill} prefill + {self.decode} decode"


Topology = Replicas | TensorParallel | PrefillDecode


def make_topology(
    replicas: int | None, tp: int | None, prefill: int | None, decode: int | None
) -> Topology:
    """The topology that the four flags ask for; one replica when none is given.

    Raises ConfigError when they contradict each other.
    """
    asked = [
        flag
        for flag, value in (
            ("--replicas", replicas),
            ("--tp", tp),
            ("--prefill/--decode", prefill if prefill is not None else decode),
        )
        if value is not None
    ]
    if len(asked) > 1:
        raise ConfigError(f"{' and '.join(asked)} exclude each other: give one of them")
    if prefill is not None or decode is not None:
        if prefill is None or decode is None:
            given, missing = (
                ("--prefill", "--decode") if decode is None else ("--decode", "--prefill")
            )
            raise ConfigError(f"{given} needs {missing}: give both, such as --prefill 1 --decode 1")
        return PrefillDecode(prefill, decode)
    if tp is not None:
        return TensorParallel(tp)
    return Replicas(1 if replicas is None else replicas)


def instances(topology: Topology) -> list[InstanceSpec]:
    """The instances of a topology in a stable order, producers first."""
    match topology:
        case Replicas(num):
            return [InstanceSpec(f"replica-{i}", i, Role.BOTH) for i in range(num)]
        case TensorParallel(size):
            return [InstanceSpec("tp-0", 0, Role.BOTH, size)]
        case PrefillDecode(prefill, decode):
            producers = [InstanceSpec(f"prefill-{i}", i, Role.PREFILL) for i in range(prefill)]
            consumers = [
                InstanceSpec(f"decode-{i}", prefill + i, Role.DECODE) for i in range(decode)
            ]
            return producers + consumers


def gpu_of(spec: InstanceSpec, rank: int, num_gpus: int) -> int:
    """GPUs in topology order, over again where there are more ranks (--allow-oversubscribe)."""
    return (spec.index * spec.world_size + rank) % num_gpus


def num_ranks(topology: Topology) -> int:
    return sum(spec.world_size for spec in instances(topology))


def tensor_parallel_size(topology: Topology) -> int:
    """Ranks an instance; the same for all instances of a topology."""
    return topology.size if isinstance(topology, TensorParallel) else 1
