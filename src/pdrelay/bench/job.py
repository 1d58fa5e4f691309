"""From a BenchConfig to records and a summary: `pdrelay bench` between flags and files."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import msgspec

from pdrelay import __version__
from pdrelay.bench import arrivals
from pdrelay.bench.client import (
    ClosedLoop,
    LoadResult,
    OpenLoop,
    ProgressCallback,
    run_load,
)
from pdrelay.bench.config import DEFAULT_NUM_PROMPTS, BenchConfig
from pdrelay.bench.endpoint import CHAT
from pdrelay.bench.request import BenchRequest, with_arrivals
from pdrelay.bench.server_info import ServerInfo, as_text, fetch_server_info
from pdrelay.bench.summary import json_rate, summarize
from pdrelay.bench.token_ids import DEFAULT_LOW, DEFAULT_VOCAB_SIZE
from pdrelay.bench.traces import TraceInfo, read_trace
from pdrelay.bench.workload import fixed, from_jsonl, warmups_like
from pdrelay.errors import ConfigError


@dataclass(frozen=True)
class Plan:
    """Everything that will be sent."""

    requests: list[BenchRequest]
    warmups: list[BenchRequest]
    mode: OpenLoop | ClosedLoop
    server: ServerInfo
    trace: TraceInfo | None
    sharing_expected: bool


async def make_plan(config: BenchConfig, api_key: str | None = None) -> Plan:
    """Asks the server for its model and builds the requests.

    Raises:
        ConfigError: unreachable server, bad files, prompts that do not fit the model.
    """
    server = await _server(config, api_key)
    vocab_size = config.vocab_size or server.vocab_size or DEFAULT_VOCAB_SIZE
    low = min(DEFAULT_LOW, vocab_size - 2)
    info: TraceInfo | None = None
    timed = False
    sharing = False
    if config.trace is not None:
        requests, info = read_trace(
            config.trace,
            time_scale=config.time_scale,
            length_scale=config.length_scale,
            max_input_len=config.max_input_len,
            max_output_len=config.max_output_len,
            start_s=config.trace_start_s,
            duration_s=config.trace_duration_s,
            max_requests=config.num_prompts,
            seed=config.seed,
            vocab_size=vocab_size,
            low=low,
        )
        timed, sharing = True, info.num_shared_tokens > 0
    elif config.workload is not None:
        requests, timed = from_jsonl(
            config.workload,
            vocab_size=vocab_size,
            seed=config.seed,
            low=low,
            max_requests=config.num_prompts,
        )
        sharing = True  # what the file's prompts share is not known
    else:
        assert config.input_len is not None and config.output_len is not None
        requests = fixed(
            config.num_prompts or DEFAULT_NUM_PROMPTS,
            config.input_len,
            config.output_len,
            vocab_size,
            config.seed,
            low=low,
            shared_prefix_len=config.shared_prefix_len,
        )
        sharing = config.shared_prefix_len > 0
    requests, mode = _arrange(config, requests, timed)
    _check_fit(requests, server)
    warmups = warmups_like(
        requests, config.num_warmups, vocab_size=vocab_size, seed=config.seed, low=low
    )
    if config.endpoint == CHAT:
        texts = await as_text([*requests, *warmups], config.url, server.model, api_key=api_key)
        requests, warmups = texts[: len(requests)], texts[len(requests) :]
    return Plan(requests, warmups, mode, server, info, sharing)


async def run_plan(
    plan: Plan,
    config: BenchConfig,
    *,
    api_key: str | None = None,
    progress: ProgressCallback | None = None,
    stop: asyncio.Event | None = None,
) -> tuple[LoadResult, dict[str, Any]]:
    """Sends the plan; returns the load's result and its summary. Raises ConfigError."""
    result = await run_load(
        config.url,
        plan.requests,
        model=plan.server.model,
        endpoint=config.endpoint,
        mode=plan.mode,
        api_key=api_key,
        timeout_s=config.timeout_s,
        ignore_eos=config.ignore_eos,
        return_token_ids=config.return_token_ids,
        warmups=plan.warmups,
        progress=progress,
        stop=stop,
    )
    summary = summarize(
        result.records,
        start_ns=result.start_ns,
        end_ns=result.end_ns,
        num_unsent=result.num_unsent,
        slo=config.slo,
        num_gpus=config.num_gpus,
        ramp_up_s=config.ramp_up_s,
        sharing_expected=plan.sharing_expected,
        full_output_expected=config.ignore_eos,
        extra=_header(plan, config),
    )
    return result, summary


def _header(plan: Plan, config: BenchConfig) -> dict[str, Any]:
    """The run's identity, under vLLM's keys where it has them."""
    closed = plan.mode.concurrency if isinstance(plan.mode, ClosedLoop) else None
    rate: float | str | None = None
    if closed is not None:
        rate = "inf"  # vLLM's closed loop is an infinite rate under a concurrency limit
    elif config.rate is not None:
        rate = json_rate(config.rate)
    resolved = asdict(config)
    resolved["slo"] = msgspec.to_builtins(config.slo)
    for name in ("rate", "burstiness"):
        if resolved[name] is not None:
            resolved[name] = json_rate(resolved[name])
    return {
        "endpoint_type": "openai-chat" if config.endpoint == CHAT else "openai",
        "backend": "openai-chat" if config.endpoint == CHAT else "openai",
        "label": None,
        "model_id": plan.server.model,
        "tokenizer_id": plan.server.root,
        "num_prompts": len(plan.requests),
        "request_rate": rate,
        "burstiness": json_rate(config.burstiness),
        "max_concurrency": closed,
        "num_warmups": len(plan.warmups),
        "mode": "open loop" if closed is None else "closed loop",
        "pdrelay_version": __version__,
        "config": resolved,
        "trace": msgspec.to_builtins(plan.trace),
    }


async def _server(config: BenchConfig, api_key: str | None) -> ServerInfo:
    if config.model is None:
        return await fetch_server_info(config.url, api_key=api_key)
    unknown = ServerInfo(config.model, config.model)
    try:
        server = await fetch_server_info(config.url, api_key=api_key)
    except ConfigError:
        return unknown  # /v1/models is a courtesy when the model is named; warm-ups will tell
    return server if server.model == config.model else unknown


def _arrange(
    config: BenchConfig, requests: list[BenchRequest], timed: bool
) -> tuple[list[BenchRequest], OpenLoop | ClosedLoop]:
    if config.concurrency is not None:
        return [replace(r, arrival_s=0.0) for r in requests], ClosedLoop(config.concurrency)
    if config.rate is not None:
        times = arrivals.gamma(config.rate, len(requests), config.seed, config.burstiness)
        return with_arrivals(requests, times), OpenLoop()
    if not timed:
        raise ConfigError(
            "the workload has no arrival times: give --rate R or --concurrency C, or arrival_s on "
            "every line"
        )
    return requests, OpenLoop()


def _check_fit(requests: Sequence[BenchRequest], server: ServerInfo) -> None:
    limit = server.max_model_len
    if limit is None:
        return
    lengths = [len(r.prompt_token_ids or ()) + r.max_tokens for r in requests]
    over = sum(length > limit for length in lengths)
    if over:
        raise ConfigError(
            f"{over} of {len(requests)} requests exceed the model's {limit} tokens (the longest "
            f"has {max(lengths)}): lower the lengths, or cut a trace with --max-input-len and "
            "--max-output-len"
        )
