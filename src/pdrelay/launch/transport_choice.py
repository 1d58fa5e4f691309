"""The transport that these GPUs can use, asked for or next best, before any rank starts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import msgspec

from pdrelay.core.messages import Role
from pdrelay.errors import TransportError
from pdrelay.launch.resolve import ResolvedConfig
from pdrelay.launch.topology import InstanceSpec, gpu_of
from pdrelay.transport.choose import FALLBACKS, Choice, GpuProbe, choose_transport, probe_gpus

Ask = Callable[[Sequence[int]], GpuProbe]


def settle_transport(
    resolved: ResolvedConfig,
    specs: Sequence[InstanceSpec],
    ask: Ask = probe_gpus,
) -> ResolvedConfig:
    """With a transport that works between every producer's and every consumer's GPU, and notes
    that say why it is not the one asked for. On CPU, and where nothing is chosen, unchanged."""
    if resolved.num_gpus == 0 or resolved.transport not in FALLBACKS[:-1]:
        return resolved
    wanted = resolved.transport
    choice = _choose(resolved, specs, wanted, f"transport {wanted}", ask)
    return replace(resolved, transport=choice.name, notes=(*resolved.notes, *choice.notes))


def settle_connector(
    resolved: ResolvedConfig, specs: Sequence[InstanceSpec], ask: Ask = probe_gpus
) -> ResolvedConfig:
    """Of vLLM, where "auto" became `pdrelay`: over NCCL if these GPUs, or this container, do not
    let a process store into another's memory."""
    if resolved.num_gpus == 0 or resolved.transport != "pdrelay":
        return resolved

    def ask_but_for_nccl(gpus: Sequence[int]) -> GpuProbe:
        """Whether the engine's environment has NCCL is not to be seen from here; vLLM needs it."""
        return msgspec.structs.replace(ask(gpus), nccl_error="")

    choice = _choose(resolved, specs, "mapped", "connector pdrelay", ask_but_for_nccl)
    name = "pdrelay-nccl" if choice.name == "nccl" else "pdrelay"
    return replace(resolved, transport=name, notes=(*resolved.notes, *choice.notes))


def _choose(
    resolved: ResolvedConfig, specs: Sequence[InstanceSpec], wanted: str, named: str, ask: Ask
) -> Choice:
    """Transport `wanted`, which the user knows as `named`, or what works in its place."""
    pairs = _gpu_pairs(resolved, specs)
    try:
        probe = ask(sorted({gpu for pair in pairs for gpu in pair}))
    except TransportError as error:
        return Choice(wanted, [f"{named} is taken unchecked: {error}"])
    return choose_transport(wanted, pairs, probe)


def _gpu_pairs(resolved: ResolvedConfig, specs: Sequence[InstanceSpec]) -> list[tuple[int, int]]:
    """A producer's GPU and a consumer's, each with each."""
    producers, consumers = (
        [gpu_of(spec, 0, resolved.num_gpus) for spec in specs if spec.role is role]
        for role in (Role.PREFILL, Role.DECODE)
    )
    return [(a, b) for a in producers for b in consumers]
