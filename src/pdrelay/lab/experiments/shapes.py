"""Experiment 4: the handout's three shapes, open loop at a low rate."""

from __future__ import annotations

from pdrelay.bench import arrivals
from pdrelay.bench.client import OpenLoop
from pdrelay.bench.request import with_arrivals
from pdrelay.lab.experiments.base import Context, Step

# (name, input length, output length, requests/s): low rates for `tiny` on two cores, so that the
# shapes are seen without queues.
SHAPES = (
    ("short-short", 100, 20, 6.0),
    ("long-short", 2048, 30, 2.0),
    ("short-long", 20, 200, 3.0),
)


def steps(context: Context) -> list[Step]:
    count = context.scale.shape_requests
    return [
        Step(
            f"4 shapes, {name}",
            count / rate + 0.6,
            lambda shape=(name, input_len, output_len, rate): _run(context, *shape),  # type: ignore[misc]
        )
        for name, input_len, output_len, rate in SHAPES
        if context.fits(input_len, output_len)
    ]


async def _run(context: Context, name: str, input_len: int, output_len: int, rate: float) -> None:
    count = context.scale.shape_requests
    prompts = context.prompts([(input_len, output_len)] * count, "shapes", name, tag=name)
    times = arrivals.poisson(rate, count, context.seed("arrivals", name))
    result = await context.load(name, with_arrivals(prompts, times), OpenLoop())
    context.save("shapes", name, result, rate=rate, input_len=input_len, output_len=output_len)
