"""Experiment 2, second part: Poisson arrivals of one request size, for a queue's prediction.

First some of the same size on the idle server: what one costs without a queue.
"""

from __future__ import annotations

from pdrelay.bench import arrivals
from pdrelay.bench.client import ClosedLoop, OpenLoop
from pdrelay.bench.request import with_arrivals
from pdrelay.lab.experiments.base import Context, Step
from pdrelay.lab.rundir import FIXED_CASE, FIXED_IDLE_CASE
from pdrelay.lab.scale import FixedLoad

NUM_IDLE = 12
IDLE_OUTPUT_LEN = 2


def steps(context: Context) -> list[Step]:
    load, pace = context.scale.fixed, context.scale.pace
    if load is None or not context.fits(load.input_len, load.output_len):
        return []
    idle_s = NUM_IDLE * pace.request(load.input_len, IDLE_OUTPUT_LEN)
    seconds = load.num_requests / load.rate + 2 * pace.request(load.input_len, load.output_len)
    return [
        Step(
            f"2 traffic, {load.input_len:,} in / {load.output_len} out at {load.rate:g}/s",
            FIXED_CASE,
            idle_s + seconds,
            lambda: _run(context, load),
        )
    ]


async def _run(context: Context, load: FixedLoad) -> None:
    lengths = [(load.input_len, IDLE_OUTPUT_LEN)] * NUM_IDLE
    prompts = context.prompts(lengths, "fixed", "idle", tag="fixed")
    result = await context.load(FIXED_IDLE_CASE, prompts, ClosedLoop(1))
    context.save(
        "traffic",
        FIXED_IDLE_CASE,
        result,
        input_len=load.input_len,
        output_len=IDLE_OUTPUT_LEN,
    )
    count = load.num_requests
    lengths = [(load.input_len, load.output_len)] * count
    prompts = context.prompts(lengths, "fixed", tag="fixed")
    times = arrivals.poisson(load.rate, count, context.seed("arrivals", "fixed"))
    result = await context.load(FIXED_CASE, with_arrivals(prompts, times), OpenLoop())
    context.save(
        "traffic",
        FIXED_CASE,
        result,
        rate=load.rate,
        input_len=load.input_len,
        output_len=load.output_len,
        workload=f"{load.input_len:,} in / {load.output_len} out, Poisson",
    )
