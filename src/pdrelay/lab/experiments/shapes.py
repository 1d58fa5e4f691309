"""Experiment 4: the handout's three shapes, open loop at a low rate."""

from __future__ import annotations

from pdrelay.bench import arrivals
from pdrelay.bench.client import OpenLoop
from pdrelay.bench.request import with_arrivals
from pdrelay.lab.experiments.base import Context, Step
from pdrelay.lab.scale import Shape


def steps(context: Context) -> list[Step]:
    count, pace = context.scale.shape_requests, context.scale.pace
    return [
        Step(
            f"4 shapes, {shape.name}",
            shape.name,
            count / shape.rate + pace.request(shape.input_len, shape.output_len),
            lambda shape=shape: _run(context, shape),  # type: ignore[misc]
        )
        for shape in context.scale.shapes
        if context.fits(shape.input_len, shape.output_len)
    ]


async def _run(context: Context, shape: Shape) -> None:
    count, name = context.scale.shape_requests, shape.name
    lengths = [(shape.input_len, shape.output_len)] * count
    prompts = context.prompts(lengths, "shapes", name, tag=name)
    times = arrivals.poisson(shape.rate, count, context.seed("arrivals", name))
    result = await context.load(name, with_arrivals(prompts, times), OpenLoop())
    context.save(
        "shapes",
        name,
        result,
        rate=shape.rate,
        input_len=shape.input_len,
        output_len=shape.output_len,
    )
