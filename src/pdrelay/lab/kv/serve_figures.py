"""What the hand-over costs inside real servers: P/D beside one replica, from their raw files."""

from __future__ import annotations

import statistics
from collections.abc import Callable

from pdrelay.core.events import EventKind
from pdrelay.lab.kv.figures import ServeRow
from pdrelay.lab.report.joined import Joined, joined
from pdrelay.lab.report.samples import hand_over
from pdrelay.lab.report.transfers import tail_ns, transfer_of
from pdrelay.lab.report.ttft import nominal_length
from pdrelay.lab.rundir import Run
from pdrelay.lab.stats import Estimate, percentile_estimate, ratio_estimate
from pdrelay.lab.topology import is_pd

Requests = list[list[Joined]]  # a list a repeat
Value = Callable[[Joined], float | None]


def serve_rows(run: Run) -> list[ServeRow]:
    """One row a prompt length that both servers answered."""
    pd = _by_length(run, [name for name in run.topologies if is_pd(name)])
    alone = _by_length(run, [name for name in run.topologies if not is_pd(name)])
    return [
        _row(run, length, pd[length], alone[length]) for length in sorted(pd) if length in alone
    ]


def _by_length(run: Run, names: list[str]) -> dict[int, Requests]:
    lengths: dict[int, Requests] = {}
    for name in names:
        for case in run.select("ttft", name):
            groups: dict[int, list[Joined]] = {}
            for request in joined(run, case):
                length = nominal_length(request.client)
                if length is not None:
                    groups.setdefault(length, []).append(request)
            for length, requests in groups.items():
                lengths.setdefault(length, []).append(requests)
    return lengths


def _row(run: Run, length: int, pd: Requests, alone: Requests) -> ServeRow:
    found = [transfer_of(run, request) for requests in pd for request in requests]
    moved = [transfer for transfer in found if transfer is not None]
    busy = [transfer.busy_ns / 1e6 for transfer in moved]
    tails = [tail_ns(transfer) / 1e6 for transfer in moved]
    return ServeRow(
        tokens=length,
        ttft=_median(pd, _ttft),
        ttft_alone=_median(alone, _ttft),
        ttft_ratio=ratio_estimate(_values(pd, _ttft), _values(alone, _ttft)),
        prefill=_median(pd, prefill_ms),
        prefill_alone=_median(alone, prefill_ms),
        prefill_ratio=ratio_estimate(_values(pd, prefill_ms), _values(alone, prefill_ms)),
        hand_over=_median(pd, lambda request: hand_over(request.client)),
        hand_over_alone=_median(alone, lambda request: hand_over(request.client)),
        transfer_busy=percentile_estimate([busy]),
        transfer_tail=percentile_estimate([tails]),
        num_bytes=statistics.median(t.num_bytes for t in moved) if moved else 0.0,
        num_pieces=statistics.median(t.num_pieces for t in moved) if moved else 0.0,
    )


def _ttft(request: Joined) -> float | None:
    return request.client.ttft_ms


def prefill_ms(request: Joined) -> float | None:
    """First chunk's start to last chunk's end."""
    start, end = request.first(EventKind.PREFILL_START), request.first(EventKind.PREFILL_END)
    return (end.t_ns - start.t_ns) / 1e6 if start and end else None


def _values(requests: Requests, value: Value) -> list[list[float]]:
    found = [[value(request) for request in group] for group in requests]
    return [[one for one in group if one is not None] for group in found]


def _median(requests: Requests, value: Value) -> Estimate:
    return percentile_estimate(_values(requests, value))
