"""Experiment 3: streams decode, first alone, then while long prompts arrive at fixed times.

Quiet and busy windows take turns: an ITL grows with its context, so each needs the same contexts.
"""

from __future__ import annotations

from pdrelay.bench.client import OpenLoop
from pdrelay.bench.request import with_arrivals
from pdrelay.lab.experiments.base import Context, Step, prefill_s

LONG_OUTPUT_LEN = 4
SETTLE_S = 0.5  # for all streams to have begun


def steps(context: Context) -> list[Step]:
    scale = context.scale
    arrivals_s = SETTLE_S + scale.quiet_s + (scale.num_long - 1) * scale.long_gap_s
    seconds = arrivals_s + 2 * prefill_s(scale.long_input_len) + 0.5
    return [Step("3 interference", seconds, lambda: _run(context))]


async def _run(context: Context) -> None:
    scale = context.scale
    long_len = scale.long_input_len
    if not context.fits(long_len, LONG_OUTPUT_LEN):
        long_len = (context.server.max_model_len or long_len) - LONG_OUTPUT_LEN
    lengths = [(long_len, LONG_OUTPUT_LEN)] * scale.num_long
    prompts = context.prompts(lengths, "interference", tag="long")
    first_s = SETTLE_S + scale.quiet_s
    times = [first_s + index * scale.long_gap_s for index in range(scale.num_long)]
    async with context.streams("interference") as streams:
        result = await context.load("long", with_arrivals(prompts, times), OpenLoop())
    context.save(
        "interference",
        "interference",
        result,
        streams=streams,
        input_len=long_len,
        num_streams=scale.num_streams,
        long_input_len=long_len,
    )
