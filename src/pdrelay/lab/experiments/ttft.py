"""Experiment 1: TTFT against input length, on an idle server and while streams decode.

Probes go one at a time in a shuffled order of lengths, so that drift hits all lengths alike.
"""

from __future__ import annotations

import random

from pdrelay.bench.client import ClosedLoop
from pdrelay.bench.request import BenchRequest
from pdrelay.lab.experiments.base import Context, Step

PROBE_OUTPUT_LEN = 8  # enough gaps to tell the hand-over from an ordinary one
_BUSY_FACTOR = 1.6


def steps(context: Context) -> list[Step]:
    scale = context.scale
    pace = scale.pace
    idle_s = sum(count * pace.request(length, PROBE_OUTPUT_LEN) for length, count in scale.probes)
    busy_s = sum(
        count * pace.request(length, PROBE_OUTPUT_LEN) for length, count in scale.busy_probes
    )

    async def idle() -> None:
        probes = _probes(context, "idle", scale.probes)
        result = await context.load("ttft-idle", probes, ClosedLoop(1))
        context.save("ttft", "idle", result, num_streams=0)

    async def busy() -> None:
        probes = _probes(context, "busy", scale.busy_probes)
        async with context.streams("ttft-busy") as streams:
            result = await context.load("ttft-busy", probes, ClosedLoop(1))
        context.save("ttft", "busy", result, streams=streams, num_streams=scale.num_streams)

    both = [
        Step("1 TTFT, idle", "idle", idle_s, idle),
        Step("1 TTFT, streams decoding", "busy", busy_s * _BUSY_FACTOR, busy),
    ]
    return both if scale.busy_probes else both[:1]


def _probes(
    context: Context, condition: str, counts: tuple[tuple[int, int], ...]
) -> list[BenchRequest]:
    lengths = [
        length
        for length, count in counts
        for _ in range(count)
        if context.fits(length, PROBE_OUTPUT_LEN)
    ]
    random.Random(context.seed("ttft", condition)).shuffle(lengths)
    shapes = [(length, PROBE_OUTPUT_LEN) for length in lengths]
    requests = context.prompts(shapes, "ttft", condition)
    for request, length in zip(requests, lengths, strict=True):
        request.tag = f"probe-{length}"
    return requests
