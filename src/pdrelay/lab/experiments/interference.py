"""Experiment 3: streams decode, first alone, then while long prompts arrive at fixed times.

Quiet and busy windows take turns: an ITL grows with its context, so each needs the same contexts.
Long prompts come in groups with a pause between, in which a slow server works off its queue.
"""

from __future__ import annotations

from pdrelay.bench.client import OpenLoop
from pdrelay.bench.request import with_arrivals
from pdrelay.lab.experiments.base import Context, Step
from pdrelay.lab.scale import Scale

LONG_OUTPUT_LEN = 4
SETTLE_S = 0.5  # for all streams to have begun


def steps(context: Context) -> list[Step]:
    scale = context.scale
    seconds = long_times(scale)[-1] + 2 * scale.pace.prefill(scale.long_input_len) + 0.5
    return [Step("3 interference", "interference", seconds, lambda: _run(context))]


def long_times(scale: Scale) -> list[float]:
    """When long prompts are sent, seconds from the streams' start."""
    first_s = SETTLE_S + scale.quiet_s
    return [
        first_s + index * scale.long_gap_s + index // scale.long_group * scale.long_pause_s
        for index in range(scale.num_long)
    ]


async def _run(context: Context) -> None:
    scale = context.scale
    long_len = context.fitted(scale.long_input_len, LONG_OUTPUT_LEN)
    lengths = [(long_len, LONG_OUTPUT_LEN)] * scale.num_long
    prompts = with_arrivals(context.prompts(lengths, "interference", tag="long"), long_times(scale))
    async with context.streams("interference") as streams:
        result = await context.load("long", prompts, OpenLoop())
    context.save(
        "interference",
        "interference",
        result,
        streams=streams,
        input_len=long_len,
        num_streams=scale.num_streams,
        long_input_len=long_len,
        long_gap_s=scale.long_gap_s,
    )
