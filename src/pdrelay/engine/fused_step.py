"""Which rows a step's kernels store into a consumer's pages, besides the own ones.

One consumer a step: the one to which most of its rows go. What is not stored so is copied.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pdrelay.core.hand_over import Fused
from pdrelay.core.scheduler import Chunk, StepPlan
from pdrelay.engine.outgoing import Outgoing
from pdrelay.engine.peer import Peer
from pdrelay.engine.step import RemoteSlots


@dataclass(frozen=True)
class FusedStep:
    """What one step stores into one consumer's pages, from `start_ns` on."""

    peer: Peer
    start_ns: int
    stores: list[tuple[Outgoing, Fused]]


def reachable(plan: StepPlan, outgoing: Mapping[str, Outgoing]) -> list[tuple[Outgoing, Chunk]]:
    """Chunks of requests (`outgoing`: by id) whose consumers have a pool that kernels reach."""
    found = []
    for chunk in plan.chunks:
        out = outgoing.get(chunk.request.request_id)
        if out is not None and out.peer.pool is not None:
            found.append((out, chunk))
    return found


def busiest(stores: Sequence[tuple[Outgoing, Chunk]]) -> Peer | None:
    """To which most rows go."""
    rows: dict[Peer, int] = {}
    for outgoing, chunk in stores:
        rows[outgoing.peer] = rows.get(outgoing.peer, 0) + chunk.length
    return max(rows, key=lambda peer: rows[peer], default=None)


def fuse(
    plan: StepPlan, outgoing: Mapping[str, Outgoing], now_ns: int
) -> tuple[FusedStep, RemoteSlots] | None:
    """Claims the rows that it names: the step must follow. None: it stores for no consumer."""
    known = [store for store in reachable(plan, outgoing) if store[0].hand_over.slots_known]
    peer = busiest(known)
    if peer is None or peer.pool is None:
        return None
    slots = np.full(sum(chunk.length for chunk in plan.chunks), -1, np.int64)
    step = FusedStep(peer, now_ns, [])
    for out, chunk in known:
        fused = out.fuse(chunk.start, chunk.start + chunk.length) if out.peer is peer else None
        if fused is not None:
            first = _row_of(plan, chunk) + fused.start - chunk.start
            stop = first + fused.stop - fused.start
            slots[first:stop] = out.hand_over.slots(fused, out.block_size)
            step.stores.append((out, fused))
    return (step, RemoteSlots(peer.pool.tensor, slots)) if step.stores else None


def _row_of(plan: StepPlan, chunk: Chunk) -> int:
    row = 0
    for other in plan.chunks:
        if other is chunk:
            break
        row += other.length
    return row
