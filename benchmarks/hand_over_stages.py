"""Where the time of P/D requests goes, from a lab's run directory.

    python benchmarks/hand_over_stages.py runs/paced [--topology pd-1-1]

Of the idle TTFT case, medians in ms by prompt length. To the first token: `arrive` from the
client's send to the request's last byte at the front door, `route` to the choice of instances,
`reserve` from there to D's promise, `start` from there to P's first step, `prefill`, `first` from
its end to token 1 at the client. To the second: `over` from prefill's end to all of the KV at D,
`admit` to the planning of D's step, `step` to its token, `relay` from there to the client; `gap`
from token 1 to token 2 at the client, beside `ITL`. Of the interference case, gaps between tokens
of the streams at percentiles: the first of each stream (the hand-over's), and the others.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

from pdrelay.bench.record import ClientRecord
from pdrelay.core.events import EventKind, RequestRecord
from pdrelay.lab.rundir import Run, read_run

PERCENTILES = (1, 10, 50, 90, 99, 99.9, 100)


def stages(client: ClientRecord, server: RequestRecord) -> dict[str, float]:
    """Nanoseconds of one request of three tokens or more, by native ranks."""
    at: dict[EventKind, int] = {}
    for event in server.events:
        at.setdefault(event.kind, event.t_ns)
    first, second, *_ = client.chunk_ns
    gaps = [b - a for a, b in pairwise(client.chunk_ns)]
    return {
        "arrive": at[EventKind.ARRIVED] - client.sent_ns,
        "route": at[EventKind.ROUTED] - at[EventKind.ARRIVED],
        "reserve": at[EventKind.RESERVED] - at[EventKind.ROUTED],
        "start": at[EventKind.PREFILL_START] - at[EventKind.ROUTED],
        "prefill": at[EventKind.PREFILL_END] - at[EventKind.PREFILL_START],
        "first": first - at[EventKind.PREFILL_END],
        "TTFT": first - client.sent_ns,
        "over": at[EventKind.TRANSFER_END] - at[EventKind.PREFILL_END],
        "admit": at[EventKind.DECODE_ADMITTED] - at[EventKind.TRANSFER_END],
        "step": at[EventKind.TOKEN] - at[EventKind.DECODE_ADMITTED],
        "relay": second - at[EventKind.TOKEN],
        "gap": gaps[0],
        "ITL": statistics.median(gaps[1:]),
    }


def is_native(server: RequestRecord) -> bool:
    return any(event.kind is EventKind.RESERVED for event in server.events)


def idle_rows(run: Run, topology: str) -> Iterator[tuple[int, list[dict[str, float]]]]:
    servers = run.topologies[topology].by_client_id
    by_length: dict[int, list[dict[str, float]]] = {}
    for case in run.select("ttft", topology):
        if case.info.case != "idle":
            continue
        for client in case.measured:
            server = servers.get(client.request_id)
            if client.ok and server is not None and is_native(server) and len(client.chunk_ns) > 2:
                rows = by_length.setdefault(server.num_prompt_tokens, [])
                rows.append(stages(client, server))
    yield from sorted(by_length.items())


def print_idle(run: Run, topology: str) -> None:
    rows = list(idle_rows(run, topology))
    if not rows:
        print("no idle requests of native P/D there")
        return
    names = list(rows[0][1][0])
    print(f"{'ms':>6}", *(f"{name:>8}" for name in names))
    for length, each in rows:
        medians = (statistics.median(one[name] for one in each) / 1e6 for name in names)
        print(f"{length:6}", *(f"{median:8.2f}" for median in medians))


def print_gaps(run: Run, topology: str) -> None:
    first: list[float] = []
    later: list[float] = []
    for case in run.select("interference", topology):
        for stream in case.streams:
            gaps = [(b - a) / 1e6 for a, b in pairwise(stream.chunk_ns)]
            first += gaps[:1]
            later += gaps[1:]
    if not first:
        return
    print(f"{'gaps of streams, ms':<20}", *(f"{f'p{p:g}':>7}" for p in PERCENTILES))
    for name, gaps in (("first", first), ("later", later)):
        shown = (f"{at_percentile(gaps, p):7.2f}" for p in PERCENTILES)
        print(f"{f'{name}, {len(gaps)}':<20}", *shown)


def at_percentile(values: Sequence[float], percentile: float) -> float:
    """One of the values, also where there are few: this is for looking, not for claims."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percentile / 100))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--topology", default="pd-1-1")
    args = parser.parse_args()
    run = read_run(args.run)
    if args.topology not in run.topologies:
        parser.error(f"no {args.topology} there; it has {', '.join(run.topologies)}")
    print_idle(run, args.topology)
    print_gaps(run, args.topology)


if __name__ == "__main__":
    main()
