"""The transport that these GPUs can use, asked for or next best, before any rank starts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import msgspec

from pdrelay.core.messages import Role
from pdrelay.errors import TransportError
from pdrelay.launch.resolve import ResolvedConfig
from pdrelay.launch.topology import InstanceSpec, gpu_of
from pdrelay.transport.choose import FALLBACKS, GpuProbe, choose_transport, probe_gpus

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
    pairs = _gpu_pairs(resolved, specs)
    try:
        probe = ask(_gpus(pairs))
    except TransportError as error:
        note = f"transport {resolved.transport} is taken unchecked: {error}"
        return replace(resolved, notes=(*resolved.notes, note))
    choice = choose_transport(resolved.transport, pairs, probe)
    return replace(resolved, transport=choice.name, notes=(*resolved.notes, *choice.notes))


def settle_connector(
    resolved: ResolvedConfig, specs: Sequence[InstanceSpec], ask: Ask = probe_gpus
) -> ResolvedConfig:
    """Of vLLM, where "auto" became `pdrelay`: over NCCL if these GPUs, or this container, do not
    let a process store into another's memory."""
    if resolved.num_gpus == 0 or resolved.transport != "pdrelay":
        return resolved
    pairs = _gpu_pairs(resolved, specs)
    try:
        probe = ask(_gpus(pairs))
    except TransportError as error:
        note = f"connector pdrelay is taken unchecked: {error}"
        return replace(resolved, notes=(*resolved.notes, note))
    # Whether the engine's environment has NCCL is not to be seen from here; vLLM on GPUs needs it.
    choice = choose_transport("mapped", pairs, msgspec.structs.replace(probe, nccl_error=""))
    name = "pdrelay-nccl" if choice.name == "nccl" else "pdrelay"
    return replace(resolved, transport=name, notes=(*resolved.notes, *choice.notes))


def _gpu_pairs(resolved: ResolvedConfig, specs: Sequence[InstanceSpec]) -> list[tuple[int, int]]:
    """A producer's GPU and a consumer's, each with each."""
    producers, consumers = (
        [gpu_of(spec, 0, resolved.num_gpus) for spec in specs if spec.role is role]
        for role in (Role.PREFILL, Role.DECODE)
    )
    return [(a, b) for a in producers for b in consumers]


def _gpus(pairs: Sequence[tuple[int, int]]) -> list[int]:
    return sorted({gpu for pair in pairs for gpu in pair})
