"""Experiment 2: Poisson arrivals of chat-like lengths up to saturation, and a trace.

Every topology is offered the same load: rates that the scale names, or shares of the baseline's
capacity, measured once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from pdrelay.bench import arrivals
from pdrelay.bench.client import ClosedLoop, LoadResult, OpenLoop
from pdrelay.bench.request import BenchRequest, with_arrivals
from pdrelay.bench.traces import TraceInfo, read_trace
from pdrelay.bench.workload import chat_like
from pdrelay.lab.config import TraceConfig
from pdrelay.lab.experiments import fixed
from pdrelay.lab.experiments.base import Context, Step
from pdrelay.lab.rundir import POISSON_CASE

MIN_REQUESTS = 12
MAX_REQUESTS = 2000
MAX_INPUT_LEN = 1024
CAPACITY_CONCURRENCY = 8
CAPACITY_REQUESTS = 40
_DRAIN_S = 2.0


def steps(context: Context) -> list[Step]:
    """Needs context.trace_path, and context.capacity_rps where rates are shares of it."""
    scale = context.scale
    found = [_poisson_step(context, *each) for each in enumerate(offered(context))]
    found += fixed.steps(context)
    if context.config.trace is not None or scale.synthetic_trace_s > 0:
        found.append(Step("2 traffic, trace", "trace", _trace_s(context), lambda: _trace(context)))
    return found


@dataclass(frozen=True)
class Offered:
    """A load of chat-like requests."""

    rate: float  # requests/s
    fraction: float | None  # of the baseline's capacity, where that was measured

    @property
    def label(self) -> str:
        return f"{self.rate:g}/s" if self.fraction is None else f"{self.fraction:g} × capacity"


def offered(context: Context) -> list[Offered]:
    """The scale's rates, or its shares of the capacity."""
    scale, capacity = context.scale, context.capacity_rps
    if scale.rates:
        return [Offered(rate, None) for rate in scale.rates]
    assert capacity is not None
    return [Offered(fraction * capacity, fraction) for fraction in scale.rate_fractions]


def _poisson_step(context: Context, index: int, load: Offered) -> Step:
    scale = context.scale
    longest_s = scale.pace.request(MAX_INPUT_LEN, scale.chat_max_output_len)
    return Step(
        f"2 traffic, {load.label}",
        f"{POISSON_CASE}{index}",
        scale.traffic_s + longest_s + 0.5,
        lambda: _poisson(context, index, load),
    )


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
    longest = max(8, context.fitted(MAX_INPUT_LEN, scale.chat_max_output_len))
    return chat_like(
        count,
        vocab_size=context.vocab_size,
        seed=context.seed("traffic", name),
        output_mean=scale.chat_output_mean,
        max_input_len=longest,
        max_output_len=scale.chat_max_output_len,
        tag="chat",
    )


async def _poisson(context: Context, index: int, load: Offered) -> None:
    count = min(MAX_REQUESTS, max(MIN_REQUESTS, round(load.rate * context.scale.traffic_s)))
    name = f"{POISSON_CASE}{index}"
    times = arrivals.poisson(load.rate, count, context.seed("arrivals", name))
    requests = with_arrivals(_chat(context, count, name), times)
    result = await context.load(name, requests, OpenLoop())
    context.save(
        "traffic",
        name,
        result,
        rate=load.rate,
        rate_fraction=load.fraction,
        workload="chat-like, Poisson",
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
