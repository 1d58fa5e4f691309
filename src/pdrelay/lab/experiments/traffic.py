"""Experiment 2: Poisson arrivals of chat-like lengths up to saturation, and a trace.

Rates are shares of the baseline's capacity, measured once, so that every topology is offered the
same load.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from pdrelay.bench import arrivals
from pdrelay.bench.client import ClosedLoop, LoadResult, OpenLoop
from pdrelay.bench.request import BenchRequest, with_arrivals
from pdrelay.bench.traces import TraceInfo, read_trace
from pdrelay.bench.workload import chat_like
from pdrelay.lab.config import TraceConfig
from pdrelay.lab.experiments.base import Context, Step

MIN_REQUESTS = 12
MAX_REQUESTS = 1000
CAPACITY_CONCURRENCY = 8
CAPACITY_REQUESTS = 40
_DRAIN_S = 2.0


def steps(context: Context) -> list[Step]:
    """Needs context.capacity_rps and context.trace_path."""
    seconds = context.scale.traffic_s
    poisson = [
        Step(
            f"2 traffic, {fraction:g} × capacity",
            seconds + _DRAIN_S * max(0.5, fraction),
            lambda index=index, fraction=fraction: _poisson(context, index, fraction),  # type: ignore[misc]
        )
        for index, fraction in enumerate(context.scale.rate_fractions)
    ]
    return [*poisson, Step("2 traffic, trace", _trace_s(context), lambda: _trace(context))]


async def measure_capacity(context: Context) -> float:
    """Requests/s that the server completes with CAPACITY_CONCURRENCY chat-like ones in flight."""
    requests = _chat(context, CAPACITY_REQUESTS, "capacity")
    result = await context.load("capacity", requests, ClosedLoop(CAPACITY_CONCURRENCY))
    return steady_rate(result)


def steady_rate(result: LoadResult) -> float:
    """Completions/s until the last request was sent: the drain is left out."""
    last_sent_ns = max((record.sent_ns for record in result.records), default=result.start_ns)
    done = sum(record.ok and record.end_ns <= last_sent_ns for record in result.records)
    seconds = (last_sent_ns - result.start_ns) / 1e9
    if done == 0 or seconds <= 0:
        return sum(record.ok for record in result.records) / max(result.duration_s, 1e-3)
    return done / seconds


def _chat(context: Context, count: int, name: str) -> list[BenchRequest]:
    scale = context.scale
    limit = context.server.max_model_len
    longest = 1024 if limit is None else max(8, min(1024, limit - scale.chat_max_output_len))
    return chat_like(
        count,
        vocab_size=context.vocab_size,
        seed=context.seed("traffic", name),
        output_mean=scale.chat_output_mean,
        max_input_len=longest,
        max_output_len=scale.chat_max_output_len,
        tag="chat",
    )


async def _poisson(context: Context, index: int, fraction: float) -> None:
    assert context.capacity_rps is not None
    rate = fraction * context.capacity_rps
    count = min(MAX_REQUESTS, max(MIN_REQUESTS, round(rate * context.scale.traffic_s)))
    name = f"poisson-{index}"
    times = arrivals.poisson(rate, count, context.seed("arrivals", name))
    requests = with_arrivals(_chat(context, count, name), times)
    result = await context.load(name, requests, OpenLoop())
    context.save(
        "traffic", name, result, rate=rate, rate_fraction=fraction, workload="chat-like, Poisson"
    )


# ---- the trace


def write_synthetic_trace(path: Path, capacity_rps: float, seconds: float, seed: int) -> None:
    """A bursty Azure-format CSV of `seconds` at half the capacity, made here.

    It stands in where no trace is given, so that the section is filled; the report names it so.
    """
    count = min(MAX_REQUESTS, max(MIN_REQUESTS, round(capacity_rps / 2 * seconds)))
    times = arrivals.gamma(count / seconds, count, seed, burstiness=0.4)
    lengths = chat_like(count, seed=seed, output_mean=64.0, max_output_len=128)
    lines = ["TIMESTAMP,ContextTokens,GeneratedTokens"]
    for at, request in zip(times, lengths, strict=True):
        whole, fraction = divmod(round(at * 1e7), 10**7)
        clock = f"{whole // 60:02}:{whole % 60:02}.{fraction:07}"
        prompt = len(request.prompt_token_ids or ())
        lines.append(f"2023-11-16 00:{clock},{prompt},{request.max_tokens}")
    path.write_text("\n".join(lines) + "\n", encoding="ascii")


def check_trace(trace: TraceConfig) -> None:
    """Raises ConfigError when the trace cannot be read or its window is empty."""
    read_trace(trace.path, duration_s=trace.duration_s, max_input_len=1, max_output_len=1)


def trace_requests(context: Context) -> tuple[list[BenchRequest], TraceInfo]:
    """The trace as given, or the synthetic one, capped to the model's context; read once."""
    if context.trace is None:
        context.trace = _read_requests(context)
    return context.trace


def _read_requests(context: Context) -> tuple[list[BenchRequest], TraceInfo]:
    assert context.trace_path is not None
    trace = context.config.trace or TraceConfig(context.trace_path)
    limit = context.server.max_model_len
    output_cap = trace.max_output_len
    input_cap = trace.max_input_len
    if limit is not None:
        output_cap = min(output_cap or limit // 2, limit // 2)
        input_cap = min(input_cap or limit, limit - output_cap)
    requests, info = read_trace(
        context.trace_path,
        time_scale=trace.time_scale,
        max_input_len=input_cap,
        max_output_len=output_cap,
        duration_s=trace.duration_s,
        seed=context.seed("trace"),
        vocab_size=context.vocab_size,
    )
    return [replace(request, tag="trace") for request in requests], info


async def _trace(context: Context) -> None:
    requests, info = trace_requests(context)
    result = await context.load("trace", requests, OpenLoop())
    context.save(
        "traffic",
        "trace",
        result,
        rate=info.num_requests / max(info.duration_s, 1e-3),
        distinct_prompts=info.num_shared_tokens == 0,
        workload=describe(info, synthetic=context.config.trace is None),
        num_shared_tokens=info.num_shared_tokens,
    )


def describe(info: TraceInfo, *, synthetic: bool) -> str:
    """One line: which trace, and what was changed."""
    if synthetic:
        return f"made here, bursty, Azure format ({info.num_requests} requests)"
    name = info.path.rpartition("/")[2]
    words = [f"{info.num_requests} requests", f"time × {info.time_scale:g}"]
    if info.num_input_capped:
        words.append(f"{info.num_input_capped} prompts capped to {info.max_input_len:,}")
    if info.num_output_capped:
        words.append(f"{info.num_output_capped} outputs capped to {info.max_output_len:,}")
    if info.num_shared_tokens:
        share = info.num_shared_tokens / max(1, info.total_input_tokens)
        words.append(f"{share:.0%} of prompt tokens shared")
    return f"{name} ({', '.join(words)})"


def _trace_s(context: Context) -> float:
    if context.config.trace is None:
        return context.scale.synthetic_trace_s + _DRAIN_S
    _, info = trace_requests(context)
    return info.duration_s + _DRAIN_S
