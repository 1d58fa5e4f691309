"""Where TTFT goes: from the client's intended send to its first token, phase by phase."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from pdrelay.core.events import EventKind
from pdrelay.lab.report.figures import PhaseRow
from pdrelay.lab.report.joined import Joined, joined
from pdrelay.lab.report.samples import group_by_case
from pdrelay.lab.report.ttft import nominal_length
from pdrelay.lab.rundir import Run


@dataclass(frozen=True)
class Phases:
    """Phases of one request's TTFT, ms. They add up to it exactly."""

    route: float
    wait: float
    prefill: float
    transfer: float
    return_: float
    hidden_transfer: float | None


def phases_of(request: Joined) -> Phases | None:
    """None when the server's record lacks an event.

    Hand-over is exposed in TTFT only where the consumer made the first token; where the producer
    did, what was still to move after prefill is hidden from TTFT and shows in the second token.
    """
    routed = request.first(EventKind.ROUTED)
    start = request.first(EventKind.PREFILL_START)
    end = request.first(EventKind.PREFILL_END)
    sampled = request.first(EventKind.FIRST_TOKEN)
    moved = request.last(EventKind.TRANSFER_END)
    first_ns = request.client.first_token_ns
    if routed is None or start is None or end is None or first_ns is None:
        return None
    tail_ns = max(0, moved.t_ns - end.t_ns) if moved else 0
    by_consumer = moved is not None and sampled is not None and sampled.instance == moved.instance
    exposed_ns = min(tail_ns, max(0, first_ns - end.t_ns)) if by_consumer else 0
    return Phases(
        route=(routed.t_ns - request.client.intended_ns) / 1e6,
        wait=(start.t_ns - routed.t_ns) / 1e6,
        prefill=(end.t_ns - start.t_ns) / 1e6,
        transfer=exposed_ns / 1e6,
        return_=(first_ns - end.t_ns - exposed_ns) / 1e6,
        hidden_transfer=(tail_ns - exposed_ns) / 1e6 if moved else None,
    )


def phase_rows(run: Run) -> list[PhaseRow]:
    """Means by topology, condition and input length of experiment 1."""
    rows = []
    for name in run.topologies:
        for condition, cases in group_by_case(run.select("ttft", name)).items():
            by_length: dict[int, list[Phases]] = {}
            for case in cases:
                for request in joined(run, case):
                    length, phases = nominal_length(request.client), phases_of(request)
                    if length is not None and phases is not None:
                        by_length.setdefault(length, []).append(phases)
            rows += [_row(name, condition, k, by_length[k]) for k in sorted(by_length)]
    return rows


def _row(topology: str, condition: str, length: int, phases: list[Phases]) -> PhaseRow:
    hidden = [p.hidden_transfer for p in phases if p.hidden_transfer is not None]
    return PhaseRow(
        topology=topology,
        condition=condition,
        input_len=length,
        n=len(phases),
        route=statistics.fmean(p.route for p in phases),
        wait=statistics.fmean(p.wait for p in phases),
        prefill=statistics.fmean(p.prefill for p in phases),
        transfer=statistics.fmean(p.transfer for p in phases),
        return_=statistics.fmean(p.return_ for p in phases),
        hidden_transfer=statistics.fmean(hidden) if hidden else None,
    )
