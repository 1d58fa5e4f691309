"""What `pdrelay bench` was asked to do, validated before anything is sent."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pdrelay.bench.endpoint import ENDPOINTS, join_url
from pdrelay.bench.slo import Slo, parse_goodput, slo_preset
from pdrelay.bench.token_ids import check_vocab
from pdrelay.bench.workload import MAX_LEN
from pdrelay.errors import ConfigError

DEFAULT_NUM_PROMPTS = 100
MAX_NUM = 10_000_000
MAX_RATE = 1e6  # requests/s
MAX_CONCURRENCY = 10_000  # open sockets
MAX_SECONDS = 1e7
MAX_VOCAB = 10_000_000


def parse_int(flag: str, text: str, low: int, high: int) -> int:
    """Raises ConfigError unless `text` is a decimal integer in [low, high]."""
    try:
        value = int(text) if len(text) < 20 else None
    except ValueError:
        value = None
    if value is None or not low <= value <= high:
        raise ConfigError(f"{flag} is {text[:40]!r}: give an integer from {low} to {high}")
    return value


def parse_float(
    flag: str, text: str, high: float, *, zero: bool = False, inf: bool = False
) -> float:
    """Raises ConfigError unless `text` is a number above 0 (or 0), at most `high` (or inf)."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if inf and value == math.inf:
        return value
    if not ((value >= 0 if zero else value > 0) and value <= high):
        least = "from 0" if zero else "above 0"
        extra = ", or inf" if inf else ""
        raise ConfigError(
            f"{flag} is {text[:40]!r}: give a number {least}, at most {high:g}{extra}"
        )
    return value


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """Lengths in tokens, times in seconds. Exactly one traffic source is set.

    `rate` and `concurrency` are both None when the traffic source brings its own arrival times.
    """

    url: str
    endpoint: str  # the path
    model: str | None
    input_len: int | None
    output_len: int | None
    shared_prefix_len: int
    workload: str | None
    trace: str | None
    time_scale: float
    length_scale: float
    max_input_len: int | None
    max_output_len: int | None
    trace_start_s: float
    trace_duration_s: float | None
    rate: float | None
    concurrency: int | None
    burstiness: float
    num_prompts: int | None
    num_warmups: int
    seed: int
    vocab_size: int | None
    slo: Slo | None
    num_gpus: int | None
    ramp_up_s: float
    timeout_s: float
    ignore_eos: bool
    return_token_ids: bool


def _need_with(args: Mapping[str, Any], owner: str, flags: tuple[str, ...]) -> None:
    for flag in flags:
        if args[flag.replace("-", "_")] is not None:
            raise ConfigError(f"--{flag} belongs to --{owner}: give --{owner}, or leave it out")


def _check_source(args: Mapping[str, Any]) -> None:
    lengths = args["input_len"] is not None or args["output_len"] is not None
    sources = [lengths, args["workload"] is not None, args["trace"] is not None]
    if sum(sources) != 1:
        raise ConfigError(
            f"{sum(sources)} traffic sources given: give exactly one of --input-len N --output-len "
            "M, --workload FILE, --trace FILE"
        )
    if lengths and (args["input_len"] is None or args["output_len"] is None):
        raise ConfigError("--input-len and --output-len go together: give both")
    if not lengths:
        _need_with(args, "input-len", ("shared-prefix-len",))
    if args["trace"] is None:
        trace_flags = ("time-scale", "length-scale", "max-input-len", "max-output-len")
        _need_with(args, "trace", (*trace_flags, "trace-start", "trace-duration"))


def _check_arrivals(args: Mapping[str, Any]) -> None:
    if args["rate"] is not None and args["concurrency"] is not None:
        raise ConfigError("--rate and --concurrency exclude each other: give one")
    if args["input_len"] is not None and args["rate"] is None and args["concurrency"] is None:
        raise ConfigError("no arrival process: give --rate R (open loop) or --concurrency C")
    if args["rate"] is None:
        _need_with(args, "rate", ("burstiness",))
    if args["time_scale"] is not None and (args["rate"] or args["concurrency"]) is not None:
        raise ConfigError(
            "--time-scale stretches the trace's own arrivals, which --rate and --concurrency "
            "replace: give only one of them"
        )


def _slo(args: Mapping[str, Any]) -> Slo | None:
    if args["goodput"] is not None and args["slo"] is not None:
        raise ConfigError("--goodput and --slo exclude each other: give one")
    if args["slo"] is not None:
        return slo_preset(args["slo"])
    return parse_goodput(args["goodput"]) if args["goodput"] is not None else None


def make_config(args: Mapping[str, Any]) -> BenchConfig:
    """Validates flags (as strings, None when not given; names with underscores).

    Raises:
        ConfigError: the first thing that is wrong, in one line with its fix.
    """

    def integer(name: str, low: int, high: int) -> int | None:
        text = args[name]
        return None if text is None else parse_int(f"--{name.replace('_', '-')}", text, low, high)

    def number(name: str, high: float, *, zero: bool = False, inf: bool = False) -> float | None:
        flag = f"--{name.replace('_', '-')}"
        text = args[name]
        return None if text is None else parse_float(flag, text, high, zero=zero, inf=inf)

    def either(value: float | None, default: float) -> float:
        return default if value is None else value

    _check_source(args)
    _check_arrivals(args)
    join_url(args["url"], "/v1/models")
    config = BenchConfig(
        url=args["url"],
        endpoint=ENDPOINTS[args["endpoint"]],
        model=args["model"],
        input_len=integer("input_len", 1, MAX_LEN),
        output_len=integer("output_len", 1, MAX_LEN),
        shared_prefix_len=integer("shared_prefix_len", 0, MAX_LEN) or 0,
        workload=args["workload"],
        trace=args["trace"],
        time_scale=either(number("time_scale", 1e6), 1.0),
        length_scale=either(number("length_scale", 1e6), 1.0),
        max_input_len=integer("max_input_len", 1, MAX_LEN),
        max_output_len=integer("max_output_len", 1, MAX_LEN),
        trace_start_s=either(number("trace_start", 1e9, zero=True), 0.0),
        trace_duration_s=number("trace_duration", 1e9),
        rate=number("rate", MAX_RATE, inf=True),
        concurrency=integer("concurrency", 1, MAX_CONCURRENCY),
        burstiness=either(number("burstiness", 1e6, inf=True), 1.0),
        num_prompts=integer("num_prompts", 1, MAX_NUM),
        num_warmups=parse_int("--num-warmups", args["num_warmups"], 0, 10_000),
        seed=parse_int("--seed", args["seed"], 0, 2**63 - 1),
        vocab_size=integer("vocab_size", 1, MAX_VOCAB),
        slo=_slo(args),
        num_gpus=integer("num_gpus", 1, 100_000),
        ramp_up_s=parse_float("--ramp-up", args["ramp_up"], MAX_SECONDS, zero=True),
        timeout_s=parse_float("--timeout", args["timeout"], MAX_SECONDS),
        ignore_eos=not args["no_ignore_eos"],
        return_token_ids=args["return_token_ids"],
    )
    if config.vocab_size is not None:
        check_vocab(0, config.vocab_size)
    return config
