"""Experiment 4, second part: ITL with 1, 32, 64 streams at once, each of one prompt length.

A closed loop without replacement: as many requests as streams, sent together. The report reads
ITL only where (nearly) all of them decode, so that neither their prefills nor their ends count.
"""

from __future__ import annotations

from pdrelay.bench.client import ClosedLoop
from pdrelay.lab.experiments.base import Context, Step
from pdrelay.lab.rundir import STREAMS_CASE

MIN_REQUESTS = 3  # of a single stream, one after the other


def steps(context: Context) -> list[Step]:
    input_len, output_len = context.scale.stream_shape
    return [
        Step(
            f"4 shapes, {count} streams",
            f"{STREAMS_CASE}{count}",
            _seconds(context, count),
            lambda count=count: _run(context, count),  # type: ignore[misc]
        )
        for count in context.scale.stream_counts
        if context.fits(input_len, output_len)
    ]


def _num_requests(count: int) -> int:
    return max(count, MIN_REQUESTS)


def _seconds(context: Context, count: int) -> float:
    """Prefills one after the other, then decode; a step of many streams is a little longer."""
    input_len, output_len = context.scale.stream_shape
    pace, requests = context.scale.pace, _num_requests(count)
    waves = -(-requests // count)
    step_s = pace.step_s * (1 + count / 100)
    return requests * pace.prefill(input_len) + waves * output_len * step_s


async def _run(context: Context, count: int) -> None:
    input_len, output_len = context.scale.stream_shape
    name = f"{STREAMS_CASE}{count}"
    lengths = [(input_len, output_len)] * _num_requests(count)
    requests = context.prompts(lengths, name, tag="of-many")
    result = await context.load(name, requests, ClosedLoop(count))
    context.save(
        "shapes", name, result, input_len=input_len, output_len=output_len, num_streams=count
    )
