"""The transport that these GPUs can use, asked for or next best, before any rank starts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from pdrelay.core.messages import Role
from pdrelay.errors import TransportError
from pdrelay.launch.resolve import ResolvedConfig
from pdrelay.launch.topology import InstanceSpec, gpu_of
from pdrelay.transport.choose import FALLBACKS, GpuProbe, choose_transport, probe_gpus


def settle_transport(
    resolved: ResolvedConfig,
    specs: Sequence[InstanceSpec],
    ask: Callable[[Sequence[int]], GpuProbe] = probe_gpus,
) -> ResolvedConfig:
    """With a transport that works between every producer's and every consumer's GPU, and notes
    that say why it is not the one asked for. On CPU, and where nothing is chosen, unchanged."""
    if resolved.num_gpus == 0 or resolved.transport not in FALLBACKS[:-1]:
        return resolved
    producers, consumers = (
        [gpu_of(spec, 0, resolved.num_gpus) for spec in specs if spec.role is role]
        for role in (Role.PREFILL, Role.DECODE)
    )
    pairs = [(a, b) for a in producers for b in consumers]
    try:
        probe = ask(sorted({gpu for pair in pairs for gpu in pair}))
    except TransportError as error:
        note = f"transport {resolved.transport} is taken unchecked: {error}"
        return replace(resolved, notes=(*resolved.notes, note))
    choice = choose_transport(resolved.transport, pairs, probe)
    return replace(resolved, transport=choice.name, notes=(*resolved.notes, *choice.notes))
