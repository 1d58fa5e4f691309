from __future__ import annotations

import json
import math
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdrelay.bench.record import ClientRecord
from pdrelay.bench.slo import SLO_PRESETS, Slo, parse_goodput, slo_preset
from pdrelay.bench.summary import json_rate, metric_samples, summarize
from pdrelay.bench.table import format_table
from pdrelay.bench.validity import check_run, send_lag_p99_ms
from pdrelay.errors import ConfigError

MS = 1_000_000
VLLM_KEYS = {
    "date",
    "duration",
    "completed",
    "failed",
    "total_input_tokens",
    "total_output_tokens",
    "request_throughput",
    "request_goodput",
    "output_throughput",
    "total_token_throughput",
    "max_output_tokens_per_s",
    "max_concurrent_requests",
    *(
        f"{statistic}_{metric}_ms"
        for statistic in ("mean", "median", "std", "p99")
        for metric in ("ttft", "tpot", "itl", "e2el")
    ),
}


def record(
    intended_ms: float = 0, ttft_ms: float = 10, gaps_ms: tuple[float, ...] = (), **fields: Any
) -> ClientRecord:
    times = [int((intended_ms + ttft_ms) * MS)]
    for gap in gaps_ms:
        times.append(times[-1] + int(gap * MS))
    values: dict[str, Any] = {
        "request_id": "r",
        "intended_ns": int(intended_ms * MS),
        "sent_ns": int(intended_ms * MS),
        "first_token_ns": times[0],
        "chunk_ns": times,
        "end_ns": times[-1],
        "max_tokens": len(times),
        "num_prompt_tokens": 5,
        "num_output_tokens": len(times),
    }
    return ClientRecord(**{**values, **fields})


def failed(intended_ms: float = 0, **fields: Any) -> ClientRecord:
    empty: dict[str, Any] = {"status": "failed", "error": "boom", "num_output_tokens": 0}
    return record(intended_ms, **{**empty, "first_token_ns": None, "chunk_ns": [], **fields})


records_strategy = st.lists(
    st.builds(
        record,
        st.integers(0, 5000),
        st.integers(1, 900),
        st.lists(st.integers(0, 300), max_size=12).map(tuple),
        status=st.sampled_from(["ok", "ok", "ok", "failed", "cancelled"]),
    ),
    min_size=1,
    max_size=40,
)


@settings(max_examples=80, deadline=None)
@given(records_strategy)
def test_against_the_plain_definitions(records: list[ClientRecord]) -> None:
    done = [r for r in records if r.status == "ok"]
    summary = summarize(records, slo=Slo(ttft_ms=400, tpot_ms=100))
    seconds = max(max(r.end_ns for r in records) - min(r.intended_ns for r in records), 1) / 1e9
    assert summary.keys() >= VLLM_KEYS
    assert summary["duration"] == pytest.approx(seconds)
    assert summary["completed"] == len(done)
    assert summary["completed"] + summary["failed"] + summary["cancelled"] == len(records)
    assert summary["request_throughput"] == pytest.approx(len(done) / seconds)
    tokens = sum(len(r.chunk_ns) for r in done)
    assert summary["output_throughput"] == pytest.approx(tokens / seconds)
    assert summary["total_token_throughput"] == pytest.approx((tokens + 5 * len(done)) / seconds)
    good = 0
    ttfts, tpots, itls = [], [], []
    for r in done:
        ttft = (r.chunk_ns[0] - r.intended_ns) / MS
        n = len(r.chunk_ns)
        tpot = (r.chunk_ns[-1] - r.chunk_ns[0]) / (n - 1) / MS if n > 1 else 0
        good += ttft <= 400 and tpot <= 100
        ttfts.append(ttft)
        if n > 1:
            tpots.append(tpot)
        itls += [(b - a) / MS for a, b in zip(r.chunk_ns, r.chunk_ns[1:], strict=False)]
    assert summary["request_goodput"] == pytest.approx(good / seconds)
    assert summary["attainment"] == pytest.approx(good / len(records))
    for name, samples in (("ttft", ttfts), ("tpot", tpots), ("itl", itls)):
        assert summary[f"num_{name}_samples"] == len(samples)
        if samples:
            assert summary[f"mean_{name}_ms"] == pytest.approx(np.mean(samples))
            assert summary[f"std_{name}_ms"] == pytest.approx(np.std(samples), abs=1e-9)
        if len(samples) >= 11:
            assert summary[f"median_{name}_ms"] == pytest.approx(np.median(samples))
        else:
            assert summary[f"median_{name}_ms"] is None
        if len(samples) < 64:
            assert summary[f"p90_{name}_ms"] is None and summary[f"p90_{name}_ms_ci"] is None
    busy = 0
    for t in sorted({r.sent_ns for r in done}):
        busy = max(busy, sum(r.sent_ns <= t < r.end_ns for r in done))
    assert summary["max_concurrent_requests"] == busy
    assert json.loads(msgspec.json.encode(summary)) == json.loads(json.dumps(summary))
    assert format_table(summary).count("\n") > 15


def test_percentiles_appear_at_their_floors() -> None:
    rng = np.random.default_rng(0)
    ttfts = rng.integers(1, 1000, 662)
    records = [record(i, float(t)) for i, t in enumerate(ttfts)]
    summary = summarize(records)
    assert summary["p99_ttft_ms"] == pytest.approx(np.percentile(ttfts, 99))
    low, high = summary["p99_ttft_ms_ci"]
    assert low <= summary["p99_ttft_ms"] <= high
    assert summary["p99.9_ttft_ms"] is None
    assert "below_sample_floor" not in {f["code"] for f in summary["validity_flags"]}
    summary = summarize(records[:661])
    assert summary["p99_ttft_ms"] is None and summary["p95_ttft_ms"] is not None
    (flag,) = [f for f in summary["validity_flags"] if f["code"] == "below_sample_floor"]
    assert "p99_ttft_ms" in flag["message"] and flag["severity"] == "warning"
    assert summary["valid"]
    assert "P99 TTFT (ms):                           too few samples" in format_table(summary)


def test_ramp_up_is_left_out_and_the_drain_of_steady_throughput() -> None:
    records = [record(0, 100), record(1000, 100), record(2000, 10, (10, 2000))]
    summary = summarize(records, ramp_up_s=0.5)
    assert summary["completed"] == 2 and summary["ramp_up_excluded"] == 1
    assert summary["duration"] == pytest.approx(4.02 - 0.5)
    assert summary["steady_duration"] == pytest.approx(1.5)
    assert summary["steady_output_throughput"] == pytest.approx(1 / 1.5)


def test_unsent_requests_count_against_attainment() -> None:
    summary = summarize([record(), record()], num_unsent=2, slo=Slo(ttft_ms=50), num_gpus=2)
    assert summary["attainment"] == 0.5 and summary["completion_rate"] == 0.5
    assert summary["request_goodput_per_gpu"] == pytest.approx(summary["request_goodput"] / 2)


def test_an_empty_and_an_all_failed_run_have_all_keys() -> None:
    full = summarize([record(0, 10, (5,))]).keys()
    for records in ([], [failed(), failed(5)]):
        summary = summarize(records)
        assert summary.keys() == full and not summary["valid"]
        assert summary["mean_ttft_ms"] is None and summary["request_throughput"] == 0
        format_table(summary)


def test_validity_flags() -> None:
    def codes(*args: Any, **options: Any) -> dict[str, str]:
        return {f.code: f.severity for f in check_run(*args, **options).flags}

    good = [record(i, 10, (5, 5)) for i in range(200)]
    assert check_run(good).valid and codes(good) == {}
    assert codes([]) == {"nothing_completed": "error"}
    late = [record(i, 10, sent_ns=int((i + 6) * MS)) for i in range(2)]
    assert codes(good + late) == {}  # 1 % late requests are p99's business to ignore
    assert codes([*good, *late, *late]) == {"client_too_slow": "error"}
    assert not check_run(late).valid
    assert codes([*good, failed(error="x")]) == {"failures": "warning"}
    assert codes([*good, failed(status="cancelled")]) == {"stopped_early": "warning"}
    assert codes(good, num_unsent=1) == {"stopped_early": "warning"}
    assert codes([record(0, 1, (2,), num_output_tokens=4)]) == {"coalesced_chunks": "warning"}
    short = [record(0, 1, (2,), max_tokens=9)]
    assert codes(short) == {"short_outputs": "warning"}
    assert codes(short, full_output_expected=False) == {}
    cached = [record(0, 1, num_cached_tokens=4)]
    assert codes(cached) == {}
    assert codes(cached, sharing_expected=False) == {"prompts_were_cached": "warning"}
    assert codes(good, null_percentiles=["p99_ttft_ms"]) == {"below_sample_floor": "warning"}


def test_send_lag_is_a_nearest_rank_percentile_of_what_was_sent() -> None:
    lags = [record(0, sent_ns=i * MS) for i in range(1, 201)]
    assert send_lag_p99_ms(lags) == 198
    assert send_lag_p99_ms(lags[:50]) == 50
    assert send_lag_p99_ms([failed(sent_ns=0)]) is None


def test_samples_come_from_complete_answers_only() -> None:
    samples = metric_samples([record(0, 10, (1, 2)), record(0, 99, (7,), status="failed")])
    assert {name: values.tolist() for name, values in samples.items()} == {
        "ttft": [10], "ttst": [11], "itl": [1, 2], "tpot": [1.5], "e2el": [13]
    }  # fmt: skip


def test_service_levels() -> None:
    assert parse_goodput(["ttft:500", "tpot:50.5"]) == Slo(ttft_ms=500, tpot_ms=50.5)
    assert slo_preset("llama3.1-8b-interactive") == Slo(ttft_ms=500, tpot_ms=30)
    assert len(SLO_PRESETS) == 6
    limit = Slo(ttft_ms=10, tpot_ms=5, e2el_ms=15)
    assert limit.met_by(record(0, 10, (5,)))
    assert not limit.met_by(record(0, 10.1, (1,)))
    assert not limit.met_by(record(0, 5, (5.1,)))
    assert not limit.met_by(record(0, 9, (3, 4)))
    assert limit.met_by(record(0, 10))  # one token has no TPOT
    assert not limit.met_by(failed())


@pytest.mark.parametrize(
    "pairs",
    [[], ["ttft"], ["ttft:x"], ["itl:5"], ["ttft:-1"], ["ttft:nan"], ["ttft:inf"],
     ["ttft:1", "ttft:2"], ["ttft:1:2"], [""], ["tpot:1e99"]],
)  # fmt: skip
def test_bad_service_levels_are_refused(pairs: list[str]) -> None:
    with pytest.raises(ConfigError):
        parse_goodput(pairs)


def test_unknown_presets_name_the_known() -> None:
    with pytest.raises(ConfigError, match="llama2-70b"):
        slo_preset("gpt")


def test_infinite_rates_are_words_in_json() -> None:
    assert json_rate(math.inf) == "inf" and json_rate(2.5) == 2.5
