"""One run in numbers, under the keys of `vllm bench serve`'s result file and a few more."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from pdrelay.bench.percentile import percentile_ci, percentile_or_none
from pdrelay.bench.record import ClientRecord
from pdrelay.bench.slo import Slo
from pdrelay.bench.validity import check_run, send_lag_p99_ms, tokens_per_chunk

SCHEMA_VERSION = 1
PERCENTILES: tuple[float, ...] = (50, 90, 95, 99, 99.9)
METRICS = ("ttft", "ttst", "tpot", "itl", "e2el")

Floats = npt.NDArray[np.float64]


def metric_samples(records: Sequence[ClientRecord]) -> dict[str, Floats]:
    """Samples of each of METRICS in ms, from complete answers; ITL is pooled over all of them."""
    done = [r for r in records if r.ok]

    def gather(values: Iterator[float | None]) -> Floats:
        return np.array([v for v in values if v is not None], dtype=np.float64)

    gaps = [np.array(r.itls_ms, dtype=np.float64) for r in done]
    return {
        "ttft": gather(r.ttft_ms for r in done),
        "ttst": gather(r.ttst_ms for r in done),
        "tpot": gather(r.tpot_ms for r in done),
        "itl": np.concatenate(gaps) if gaps else np.zeros(0),
        "e2el": gather(r.e2e_ms for r in done),
    }


def percentile_key(p: float, metric: str) -> str:
    """`p99_ttft_ms`, `p99.9_itl_ms`: vLLM's spelling."""
    return f"p{p:g}_{metric}_ms"


def summarize(
    records: Sequence[ClientRecord],
    *,
    start_ns: int | None = None,
    end_ns: int | None = None,
    num_unsent: int = 0,
    slo: Slo | None = None,
    num_gpus: int | None = None,
    ramp_up_s: float = 0.0,
    sharing_expected: bool = True,
    full_output_expected: bool = True,
    extra: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The summary of one run's records (warm-ups are not among them).

    Latencies are of complete answers; failures show in `failed`, `completion_rate`, `attainment`
    and goodput. A percentile below its sample floor is None, the key stays. `*_ci` keys are 95 %
    order-statistic intervals [low, high], or None.

    Args:
        start_ns, end_ns: the load's; by default the first intended send and the last end.
        slo: makes `request_goodput` (requests/s that meet it) and `attainment` (their fraction of
            all requests that were due) numbers instead of None.
        num_gpus: makes `request_goodput_per_gpu` a number.
        ramp_up_s: requests intended earlier than this after the start are left out of everything.
        sharing_expected, full_output_expected: see `check_run`.
        extra: keys to put first, such as vLLM's `model_id`, `request_rate`.
    """
    if start_ns is None:
        start_ns = min((r.intended_ns for r in records), default=0)
    if end_ns is None:
        end_ns = max((r.end_ns for r in records), default=start_ns)
    measured_ns = start_ns + round(ramp_up_s * 1e9)
    num_ramp_up = sum(r.intended_ns < measured_ns for r in records)
    records = [r for r in records if r.intended_ns >= measured_ns]
    done = [r for r in records if r.ok]
    duration_s = max(end_ns - measured_ns, 1) / 1e9
    total_input = sum(r.num_prompt_tokens for r in done)
    total_output = sum(r.num_output_tokens for r in done)
    num_due = len(records) + num_unsent
    result: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "date": datetime.now().strftime("%Y%m%d-%H%M%S"),
        **(extra or {}),
        "duration": duration_s,
        "completed": len(done),
        "failed": sum(r.status == "failed" for r in records),
        "cancelled": sum(r.status == "cancelled" for r in records),
        "unsent": num_unsent,
        "ramp_up_excluded": num_ramp_up,
        "completion_rate": len(done) / num_due if num_due else None,
        "total_input_tokens": total_input,
        "total_output_tokens": total_output,
        "total_cached_tokens": _total_cached(done),
        "request_throughput": len(done) / duration_s,
        **_goodput(records, num_due, duration_s, slo, num_gpus),
        "output_throughput": total_output / duration_s,
        "total_token_throughput": (total_input + total_output) / duration_s,
        **_steady(records, done, measured_ns),
        "max_output_tokens_per_s": _peak_tokens_per_s(done),
        "max_concurrent_requests": _peak_concurrency(done),
        "tokens_per_chunk": tokens_per_chunk(done),
        "send_lag_p99_ms": send_lag_p99_ms(records),
    }
    nulls: list[str] = []
    for metric, samples in metric_samples(done).items():
        result.update(_statistics(metric, samples, nulls))
    validity = check_run(
        records,
        num_unsent=num_unsent,
        null_percentiles=nulls,
        sharing_expected=sharing_expected,
        full_output_expected=full_output_expected,
    )
    result["valid"] = validity.valid
    result["validity_flags"] = msgspec.to_builtins(validity.flags)
    return result


def _statistics(metric: str, samples: Floats, nulls: list[str]) -> dict[str, Any]:
    some = len(samples) > 0
    stats: dict[str, Any] = {
        f"num_{metric}_samples": len(samples),
        f"mean_{metric}_ms": float(samples.mean()) if some else None,
        f"median_{metric}_ms": percentile_or_none(samples, 50),
        f"std_{metric}_ms": float(samples.std()) if some else None,
        f"max_{metric}_ms": float(samples.max()) if some else None,
    }
    for p in PERCENTILES:
        key = percentile_key(p, metric)
        value = percentile_or_none(samples, p)
        stats[key] = value
        ci = percentile_ci(samples, p) if value is not None else None
        stats[f"{key}_ci"] = list(ci) if ci is not None else None
        # p99.9 is a bonus of long runs: not having it is no flaw.
        if value is None and some and p <= 99:
            nulls.append(key)
    return stats


def _total_cached(done: Sequence[ClientRecord]) -> int | None:
    known = [r.num_cached_tokens for r in done if r.num_cached_tokens is not None]
    return sum(known) if known else None


def _goodput(
    records: Sequence[ClientRecord],
    num_due: int,
    duration_s: float,
    slo: Slo | None,
    num_gpus: int | None,
) -> dict[str, Any]:
    if slo is None:
        return {
            "request_goodput": None,
            "request_goodput_per_gpu": None,
            "attainment": None,
            "slo": None,
        }
    num_good = sum(slo.met_by(r) for r in records)
    goodput = num_good / duration_s
    return {
        "request_goodput": goodput,
        "request_goodput_per_gpu": goodput / num_gpus if num_gpus else None,
        "attainment": num_good / num_due if num_due else None,
        "slo": msgspec.to_builtins(slo),
    }


def _steady(
    records: Sequence[ClientRecord], done: Sequence[ClientRecord], measured_ns: int
) -> dict[str, Any]:
    """Throughput while requests still arrived: the drain after the last one is left out."""
    last_ns = max((r.intended_ns for r in records), default=measured_ns)
    span_s = (last_ns - measured_ns) / 1e9
    if span_s <= 0:
        return {"steady_duration": 0.0, "steady_output_throughput": None}
    tokens = 0.0
    for r in done:
        inside = sum(t <= last_ns for t in r.chunk_ns)
        tokens += r.num_output_tokens * inside / len(r.chunk_ns)
    return {"steady_duration": span_s, "steady_output_throughput": tokens / span_s}


def _peak_tokens_per_s(done: Sequence[ClientRecord]) -> float:
    """Chunks in the busiest whole second after the first send, as vLLM counts them."""
    if not done:
        return 0.0
    first = min(r.sent_ns for r in done)
    times = np.concatenate([np.array(r.chunk_ns, dtype=np.int64) for r in done])
    return float(np.bincount((times - first) // 1_000_000_000).max())


def _peak_concurrency(done: Sequence[ClientRecord]) -> int:
    """Requests in flight at once, an end before a start at the same instant."""
    edges = sorted([(r.sent_ns, 1) for r in done] + [(r.end_ns, -1) for r in done])
    running = peak = 0
    for _, step in edges:
        running += step
        peak = max(peak, running)
    return peak


def json_rate(rate: float) -> float | str:
    """vLLM writes an infinite rate as "inf"; JSON has no number for it."""
    return rate if math.isfinite(rate) else "inf"
