from __future__ import annotations

import asyncio
import subprocess
import sys

import pytest
from prometheus_client.parser import text_string_to_metric_families
from router_harness import PD, REPLICA, front_door, until

from pdrelay.errors import ConfigError
from pdrelay.router.event_log import EventLog


async def samples(front) -> dict[tuple[str, str], float]:
    """(name, instance or consumer) to value; of histograms the counts and sums."""
    _, text = await front.get("/metrics")
    found: dict[tuple[str, str], float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if not sample.name.endswith("_bucket"):
                who = sample.labels.get("instance") or sample.labels.get("consumer", "")
                key = (sample.name, who + sample.labels.get("finished_reason", ""))
                found[key] = sample.value
    return found


async def test_pd_record_holds_the_whole_life(tmp_path) -> None:
    path = tmp_path / "events.jsonl"
    async with front_door(PD, log_path=path) as front:
        headers = {"X-Request-Id": "mine"}
        await front.post("/v1/completions", {"prompt": "abc", "max_tokens": 3}, headers=headers)
        (record,) = front.records()
        assert record["client_request_id"] == "mine" and record["instances"] == list(PD)
        assert (record["num_prompt_tokens"], record["num_output_tokens"]) == (4, 3)
        assert record["finish_reason"] == "length"
        events = record["events"]
        kinds = [(e["kind"], e["instance"]) for e in events]
        assert kinds == [
            ("arrived", "router"),
            ("routed", "router"),
            ("prefill_start", "prefill-0"),
            ("prefill_end", "prefill-0"),
            ("first_token", "prefill-0"),
            ("transfer_start", "prefill-0"),
            ("transfer_end", "decode-0"),
            ("decode_admitted", "decode-0"),
            ("token", "decode-0"),
            ("token", "decode-0"),
            ("finished", "router"),
        ]
        transfer = events[6]
        assert transfer["num_bytes"] == 4 * 1024 and transfer["transport"] == "fake"
        first = events[4]["t_ns"]
        assert events[0]["t_ns"] <= events[1]["t_ns"] <= events[2]["t_ns"] <= first
        assert first <= events[8]["t_ns"] <= events[9]["t_ns"] <= events[10]["t_ns"]


async def test_failed_and_left_requests_have_records_too(tmp_path) -> None:
    path = tmp_path / "events.jsonl"
    async with front_door(PD, auto=False, log_path=path) as front:
        left = asyncio.create_task(front.post("/v1/completions", {"prompt": "abc"}))
        await until(lambda: front.flow.num_requests)
        left.cancel()
        await until(lambda: not front.flow.num_requests)
        lost = asyncio.create_task(front.post("/v1/completions", {"prompt": "abc"}))
        await until(lambda: front.flow.num_requests)
        front.clients["decode-0"].kill()
        await lost
        first, second = front.records()
        assert first["finish_reason"] == "abort" and "gone" in first["events"][-1]["detail"]
        assert second["events"][-1]["kind"] == "failed"
        assert "worker_lost" in second["events"][-1]["detail"]


async def test_metrics_of_a_pair() -> None:
    async with front_door(PD) as front:
        for _ in range(2):
            await front.post("/v1/completions", {"prompt": "abc", "max_tokens": 4})
        await front.post("/v1/completions", {"prompt": 5})
        got = await samples(front)
        assert got["vllm:time_to_first_token_seconds_count", "prefill-0"] == 2
        assert got["vllm:inter_token_latency_seconds_count", "decode-0"] == 6
        assert got["vllm:e2e_request_latency_seconds_count", "decode-0"] == 2
        assert got["vllm:prompt_tokens_total", "prefill-0"] == 8
        assert got["vllm:generation_tokens_total", "prefill-0"] == 2
        assert got["vllm:generation_tokens_total", "decode-0"] == 6
        assert got["vllm:request_success_total", "decode-0length"] == 2
        assert got["pdrelay:kv_transfer_bytes_total", "decode-0"] == 2 * 4 * 1024
        assert got["pdrelay:kv_transfer_seconds_count", "decode-0"] == 2
        assert got["vllm:num_requests_running", "decode-0"] == 0
        assert ("vllm:num_requests_waiting", "prefill-0") in got
        assert ("vllm:kv_cache_usage_perc", "prefill-0") in got
        assert ("vllm:prefix_cache_queries_total", "prefill-0") in got
        assert ("vllm:prefix_cache_hits_total", "prefill-0") in got
        assert ("vllm:num_preemptions_total", "decode-0") in got
        assert got["pdrelay:instance_up", "decode-0"] == 1
        _, text = await front.get("/metrics")
        assert (
            'pdrelay:request_failures_total{code="invalid_request",model_name="tiny"} 1.0' in text
        )
        for state in ("free", "cached", "used", "in_transfer"):
            assert f'role="prefill",state="{state}"' in text


async def test_two_front_doors_in_one_process_share_nothing() -> None:
    async with front_door(REPLICA) as one, front_door(REPLICA) as other:
        await one.post("/v1/completions", {"prompt": "x"})
        assert (await samples(one))["vllm:prompt_tokens_total", "replica-0"] == 2
        assert (await samples(other))["vllm:prompt_tokens_total", "replica-0"] == 0


def test_event_log_that_cannot_be_opened(tmp_path) -> None:
    with pytest.raises(ConfigError, match="--event-log"):
        EventLog(tmp_path / "missing" / "events.jsonl")


def test_the_front_door_imports_no_torch() -> None:
    code = (
        "import sys, pdrelay.router.app, pdrelay.router.fakes.native, pdrelay.router.bridge, "
        "pdrelay.model.tokenizer, pdrelay.router.server\n"
        "sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
