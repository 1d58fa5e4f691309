"""Whether a run may be believed: flags with words, errors void it, warnings qualify it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Literal

import msgspec

from pdrelay.bench.record import ClientRecord

MAX_SEND_LAG_P99_MS = 5.0
# More than this many tokens a chunk, and chunk gaps no longer are inter-token latencies.
MAX_TOKENS_PER_CHUNK = 1.05
MAX_CACHED_FRACTION = 0.05

Severity = Literal["error", "warning"]


class Flag(msgspec.Struct, frozen=True):
    code: str  # a short stable word
    severity: Severity
    message: str  # one line: what, then what to do


class Validity(msgspec.Struct, frozen=True):
    """`valid` is False when any flag is an error."""

    valid: bool
    flags: list[Flag]


def send_lag_p99_ms(records: Sequence[ClientRecord]) -> float | None:
    """The 99th percentile of send lag by nearest rank, the maximum below 100 requests.

    No sample floor: a limit is checked here, not a figure published. None without a sent request.
    """
    lags = sorted(r.send_lag_ms for r in records if r.sent_ns)
    return lags[math.ceil(0.99 * len(lags)) - 1] if lags else None


def tokens_per_chunk(records: Sequence[ClientRecord]) -> float | None:
    """Mean output tokens a streamed chunk, of complete answers."""
    done = [r for r in records if r.ok]
    chunks = sum(len(r.chunk_ns) for r in done)
    return sum(r.num_output_tokens for r in done) / chunks if chunks else None


def check_run(
    records: Sequence[ClientRecord],
    *,
    num_unsent: int = 0,
    null_percentiles: Sequence[str] = (),
    sharing_expected: bool = True,
    full_output_expected: bool = True,
) -> Validity:
    """Judges one run.

    Args:
        num_unsent: requests that never had their turn.
        null_percentiles: summary keys left null for want of samples.
        sharing_expected: False flags prompts that the server had cached.
        full_output_expected: True (ignore_eos) flags answers shorter than max_tokens.
    """
    flags: list[Flag] = []

    def add(code: str, severity: Severity, message: str) -> None:
        flags.append(Flag(code, severity, message))

    done = [r for r in records if r.ok]
    if not done:
        add("nothing_completed", "error", "no request was completed: see the errors")
    lag = send_lag_p99_ms(records)
    if lag is not None and lag > MAX_SEND_LAG_P99_MS:
        add(
            "client_too_slow",
            "error",
            f"client too slow: p99 send lag {lag:.1f} ms is over {MAX_SEND_LAG_P99_MS:g} ms; "
            "lower the rate or free a core for the client",
        )
    failed = [r for r in records if r.status == "failed"]
    if failed:
        error, count = Counter(r.error for r in failed).most_common(1)[0]
        add(
            "failures",
            "warning",
            f"{len(failed)} of {len(records)} requests failed, {count} with: {error[:200]}",
        )
    num_cancelled = sum(r.status == "cancelled" for r in records)
    if num_cancelled or num_unsent:
        add(
            "stopped_early",
            "warning",
            f"stopped early: {num_cancelled} requests cancelled, {num_unsent} never sent",
        )
    if null_percentiles:
        add(
            "below_sample_floor",
            "warning",
            f"too few samples for {', '.join(null_percentiles)}: send more requests",
        )
    ratio = tokens_per_chunk(done)
    if ratio is not None and ratio > MAX_TOKENS_PER_CHUNK:
        add(
            "coalesced_chunks",
            "warning",
            f"{ratio:.2f} tokens a chunk: ITL is the gap between chunks, compare TPOT instead",
        )
    short = sum(r.num_output_tokens < r.max_tokens for r in done)
    if full_output_expected and short:
        add(
            "short_outputs",
            "warning",
            f"{short} answers ended before max_tokens: does the server know ignore_eos?",
        )
    prompt_tokens = sum(r.num_prompt_tokens for r in done)
    cached = sum(r.num_cached_tokens or 0 for r in done)
    if not sharing_expected and cached > MAX_CACHED_FRACTION * prompt_tokens:
        add(
            "prompts_were_cached",
            "warning",
            f"{cached / prompt_tokens:.0%} of the prompt tokens came from the prefix cache though "
            "prompts differ: use another --seed or restart the server",
        )
    return Validity(not any(flag.severity == "error" for flag in flags), flags)
