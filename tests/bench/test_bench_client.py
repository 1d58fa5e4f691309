from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiohttp import web
from fake_server import (
    ABORT,
    DONE,
    FakeServer,
    chat_chunk,
    event,
    full_answer,
    scripted,
    text_chunk,
    usage_chunk,
)

from pdrelay.bench.client import ClosedLoop, LoadResult, OpenLoop, _Stream, run_load
from pdrelay.bench.endpoint import BodyEncoder
from pdrelay.bench.record import ClientRecord, read_records, write_records
from pdrelay.bench.request import BenchRequest, with_arrivals
from pdrelay.bench.summary import summarize
from pdrelay.bench.workload import fixed, warmups_like
from pdrelay.errors import ConfigError

CHAT = "/v1/chat/completions"


def text_request(index: int = 0, max_tokens: int = 3, arrival_s: float = 0.0) -> BenchRequest:
    return BenchRequest(index, arrival_s, None, "héllo", max_tokens)


async def one(server: FakeServer, *items: Any, **options: Any) -> ClientRecord:
    """The record of one request that is answered with `items`."""
    server.reply = scripted(*items)
    options.setdefault("model", "m")
    result = await run_load(server.url, [text_request()], timeout_s=10, **options)
    assert len(result.records) == 1
    return result.records[0]


# ---- what is sent, and when


async def test_a_whole_load(server: FakeServer) -> None:
    requests = with_arrivals(fixed(8, 20, 5), [i * 0.01 for i in range(8)])
    seen: list[tuple[int, int]] = []
    result = await run_load(
        server.url,
        requests,
        return_token_ids=True,
        request_id_prefix="run",
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(i, 8) for i in range(1, 9)]
    for i, record in enumerate(result.records):
        assert record.ok and record.error == "" and record.http_status == 200
        assert record.index == i and record.request_id == f"run-{i}"
        assert record.intended_ns == result.start_ns + i * 10_000_000
        assert record.intended_ns <= record.sent_ns <= record.chunk_ns[0]
        assert record.first_token_ns == record.chunk_ns[0]
        assert record.end_ns == record.chunk_ns[-1] and record.chunk_ns == sorted(record.chunk_ns)
        assert record.num_prompt_tokens == 20 and record.num_output_tokens == 5
        assert record.num_cached_tokens == 0 and record.token_ids == [0, 1, 2, 3, 4]
        assert record.finish_reason == "length"
        assert len(record.itls_ms) == 4
    assert result.end_ns == max(r.end_ns for r in result.records)
    by_prompt = {tuple(body["prompt"]): i for i, body in enumerate(server.bodies)}
    for i, request in enumerate(requests):
        position = by_prompt[tuple(request.prompt_token_ids or [])]
        assert server.headers[position]["X-Request-Id"] == f"run-{i}"
        assert server.bodies[position] == {
            "model": "fake",
            "prompt": request.prompt_token_ids,
            "max_tokens": 5,
            "stream": True,
            "stream_options": {"include_usage": True},
            "temperature": 0.0,
            "ignore_eos": True,
            "return_token_ids": True,
        }


async def test_extensions_can_be_left_out_and_bodies_extended(server: FakeServer) -> None:
    request = BenchRequest(0, 0, None, "hi", 2, extra_body={"top_p": 0.5, "max_tokens": 1})
    result = await run_load(
        f"{server.url}/v1/", [request], model="m", ignore_eos=False, temperature=None, api_key="k"
    )
    assert result.records[0].ok
    assert server.bodies[0] == {
        "model": "m",
        "prompt": "hi",
        "max_tokens": 1,
        "stream": True,
        "stream_options": {"include_usage": True},
        "top_p": 0.5,
    }
    assert server.headers[0]["Authorization"] == "Bearer k"


async def test_open_loop_does_not_wait_for_answers(server: FakeServer) -> None:
    all_there = asyncio.Event()

    async def hold_until_all_came(body: dict[str, Any]) -> AsyncIterator[Any]:
        if server.num_running == 40:
            all_there.set()
        await all_there.wait()
        async for item in full_answer(body):
            yield item

    server.reply = hold_until_all_came
    result = await run_load(server.url, fixed(40, 16, 2), timeout_s=20)
    assert all(r.ok for r in result.records)
    assert server.max_running == 40


async def test_closed_loop_keeps_its_concurrency(server: FakeServer) -> None:
    three = asyncio.Event()

    async def hold_until_three(body: dict[str, Any]) -> AsyncIterator[Any]:
        if server.num_running == 3:
            three.set()
        await three.wait()
        async for item in full_answer(body):
            yield item

    server.reply = hold_until_three
    result = await run_load(server.url, fixed(20, 16, 2), mode=ClosedLoop(3), timeout_s=20)
    assert [r.index for r in result.records] == list(range(20))
    assert all(r.ok for r in result.records)
    assert server.max_running == 3
    assert result.records[-1].intended_ns > result.records[0].end_ns


async def test_a_late_client_is_seen_and_voids_the_run(server: FakeServer) -> None:
    """The first answer's callback blocks the loop past the second request's time."""

    def block(done: int, total: int) -> None:
        end = time.monotonic() + 0.6
        while done == 1 and time.monotonic() < end:
            pass

    requests = [text_request(0), text_request(1, arrival_s=0.5)]
    result = await run_load(server.url, requests, model="m", progress=block)
    late = result.records[1]
    assert late.ok and late.send_lag_ms > 10
    assert late.ttft_ms is not None and late.ttft_ms > late.send_lag_ms
    summary = summarize(result.records)
    assert not summary["valid"]
    assert summary["validity_flags"][0]["code"] == "client_too_slow"


async def test_warm_ups_come_first_and_are_not_recorded(server: FakeServer) -> None:
    requests = fixed(6, 16, 2)
    warmups = warmups_like(requests, 5)
    result = await run_load(server.url, requests, warmups=warmups)
    assert len(result.records) == 6
    sent = [body["prompt"] for body in server.bodies]
    assert sorted(sent[:5]) == sorted(r.prompt_token_ids or [] for r in warmups)
    assert sorted(sent[5:]) == sorted(r.prompt_token_ids or [] for r in requests)
    ids = [headers["X-Request-Id"] for headers in server.headers]
    assert len(set(ids)) == 11


async def test_warm_ups_that_all_fail_end_the_load(server: FakeServer) -> None:
    server.reply = scripted(404, b'{"error": {"message": "no such model"}}')
    with pytest.raises(ConfigError, match="no such model"):
        await run_load(server.url, fixed(3, 16, 2), model="x", warmups=fixed(2, 16, 2))
    assert len(server.bodies) == 2


async def test_a_body_of_megabytes_arrives(server: FakeServer) -> None:
    ids = [100_000 + i for i in range(200_000)]
    result = await run_load(server.url, [BenchRequest(0, 0, ids, None, 1)])
    assert result.records[0].ok
    assert server.bodies[0]["prompt"] == ids


async def test_stop_cancels_what_runs_and_sends_nothing_more(server: FakeServer) -> None:
    stop = asyncio.Event()

    async def one_token_then_hang(body: dict[str, Any]) -> AsyncIterator[Any]:
        yield text_chunk("a")
        if server.num_running == 3:
            stop.set()
        await asyncio.Event().wait()

    server.reply = one_token_then_hang
    requests = with_arrivals(fixed(5, 16, 2), [0, 0, 0, 3600, 3600])
    result = await asyncio.wait_for(run_load(server.url, requests, stop=stop), 20)
    assert [r.status for r in result.records] == ["cancelled"] * 3
    assert result.num_unsent == 2
    assert all(r.e2e_ms is None and r.end_ns > r.sent_ns for r in result.records)
    summary = summarize(result.records, num_unsent=result.num_unsent)
    assert summary["cancelled"] == 3 and summary["unsent"] == 2 and summary["failed"] == 0


async def test_cancelling_the_load_cancels_its_requests(server: FakeServer) -> None:
    running = asyncio.Event()

    async def hang(body: dict[str, Any]) -> AsyncIterator[Any]:
        yield text_chunk("a")
        running.set()
        await asyncio.Event().wait()

    server.reply = hang
    before = asyncio.all_tasks()
    for stop in (None, asyncio.Event()):
        running.clear()
        task = asyncio.ensure_future(run_load(server.url, [text_request()], model="m", stop=stop))
        await asyncio.wait_for(running.wait(), 10)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        left = [
            t for t in asyncio.all_tasks() - before if "run_load" in repr(t) or "_Load" in repr(t)
        ]
        assert left == []


# ---- how answers are read


async def test_chunks_of_several_tokens_count_by_usage_or_ids(server: FakeServer) -> None:
    chunks = (text_chunk("ab", ids=[1, 2]), text_chunk("c", "length", ids=[3]))
    record = await one(server, *chunks, usage_chunk(7, 3, cached=4), DONE)
    assert (record.num_output_tokens, len(record.chunk_ns)) == (3, 2)
    assert (record.num_prompt_tokens, record.num_cached_tokens) == (7, 4)
    record = await one(server, *chunks, DONE)  # no usage
    assert record.num_output_tokens == 3 and record.token_ids == [1, 2, 3]
    record = await one(server, text_chunk("ab"), text_chunk("c", "stop"), DONE)  # neither
    assert record.num_output_tokens == 2
    assert record.ok and record.tpot_ms == pytest.approx(record.itls_ms[0])


async def test_the_role_chunk_and_a_bare_finish_are_no_tokens(server: FakeServer) -> None:
    record = await one(
        server,
        chat_chunk({"role": "assistant", "content": ""}),
        chat_chunk({"content": ""}),  # a token whose bytes are held back
        chat_chunk({"content": "é"}),
        chat_chunk({"reasoning_content": "hm"}),
        chat_chunk({}, "stop"),
        usage_chunk(4, 3),
        DONE,
        endpoint=CHAT,
    )
    assert record.ok and len(record.chunk_ns) == 3 and record.finish_reason == "stop"
    assert server.bodies[0]["messages"] == [{"role": "user", "content": "héllo"}]
    record = await one(server, text_chunk("a"), text_chunk(""), text_chunk("", "stop"), DONE)
    assert len(record.chunk_ns) == 2


async def test_token_ids_decide_where_the_server_sends_them(server: FakeServer) -> None:
    record = await one(
        server,
        text_chunk("", ids=[]),
        text_chunk("", ids=[4]),
        text_chunk("xy", ids=[]),
        text_chunk("", "stop", ids=[5]),
        DONE,
    )
    assert record.ok and len(record.chunk_ns) == 2 and record.token_ids == [4, 5]


async def test_a_stop_during_warm_up_ends_the_load(server: FakeServer) -> None:
    stop = asyncio.Event()

    async def hang(body: dict[str, Any]) -> AsyncIterator[Any]:
        yield text_chunk("a")
        stop.set()
        await asyncio.Event().wait()

    server.reply = hang
    load = run_load(server.url, fixed(2, 16, 2), warmups=fixed(1, 8, 2), stop=stop)
    result = await asyncio.wait_for(load, 20)
    assert result.records == [] and result.num_unsent == 2


async def test_an_answer_that_ends_at_its_first_token(server: FakeServer) -> None:
    record = await one(server, text_chunk("", "stop"), usage_chunk(4, 1), DONE)
    assert record.ok and len(record.chunk_ns) == 1
    assert record.tpot_ms is None and record.ttst_ms is None and record.itls_ms == []


async def test_events_split_across_writes_inside_a_character(server: FakeServer) -> None:
    raw = text_chunk("日本é") + text_chunk("語", "length") + usage_chunk(5, 2) + DONE

    async def dribble(body: dict[str, Any]) -> AsyncIterator[Any]:
        for i in range(len(raw)):
            yield raw[i : i + 1]
            await asyncio.sleep(0)

    server.reply = dribble
    result = await run_load(server.url, [text_request()], model="m")
    assert result.records[0].ok and result.records[0].num_output_tokens == 2


async def test_a_chunk_is_stamped_when_it_comes_and_not_at_the_end(server: FakeServer) -> None:
    written: list[int] = []

    async def reply(body: dict[str, Any]) -> AsyncIterator[Any]:
        for text in "abc":
            await asyncio.sleep(0.02)
            written.append(time.monotonic_ns())
            yield text_chunk(text)
        yield text_chunk("d", "length")
        yield DONE
        await asyncio.sleep(0.02)
        written.append(time.monotonic_ns())

    server.reply = reply
    result = await run_load(server.url, [text_request()], model="m")
    record = result.records[0]
    assert len(record.chunk_ns) == 4
    assert all(t >= w for t, w in zip(record.chunk_ns, written, strict=True) if w != written[3])
    assert record.end_ns == record.chunk_ns[3]


async def test_tokens_that_come_together_do_not_wait_for_each_others_parsing(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    parsed: list[int] = []
    feed = _Stream.feed

    def noted(self: _Stream, data: bytes, now_ns: int) -> None:
        parsed.append(time.monotonic_ns())
        feed(self, data, now_ns)
        if len(parsed) == 2:
            seen.set()

    monkeypatch.setattr(_Stream, "feed", noted)
    go, seen = asyncio.Event(), asyncio.Event()

    async def reply(body: dict[str, Any]) -> AsyncIterator[Any]:
        if server.num_running == 2:
            go.set()
        await go.wait()
        yield text_chunk("a")
        await seen.wait()
        yield text_chunk("b", "length") + DONE

    server.reply = reply
    result = await run_load(server.url, [text_request(0), text_request(1)], model="m")
    stamps = [record.chunk_ns[0] for record in result.records]
    assert max(stamps) < parsed[0]


async def test_bodies_are_made_before_the_load_starts(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    encode = BodyEncoder.__call__

    def noted(self: BodyEncoder, request: BenchRequest) -> bytes:
        made.append(time.monotonic_ns())
        return encode(self, request)

    monkeypatch.setattr(BodyEncoder, "__call__", noted)
    for mode in (OpenLoop(), ClosedLoop(1)):
        result = await run_load(server.url, fixed(3, 16, 2), model="m", mode=mode)
        assert len(made) == 3 and max(made) < result.start_ns
        made.clear()
    monkeypatch.setattr(
        "pdrelay.bench.client._MAX_AHEAD_BYTES", 100
    )  # more than one, less than two
    for mode in (OpenLoop(), ClosedLoop(1)):
        result = await run_load(server.url, fixed(3, 16, 2), model="m", mode=mode)
        assert [record.status for record in result.records] == ["ok"] * 3
        assert [at < result.start_ns for at in made] == [True, False, False]
        made.clear()


async def test_a_server_that_talks_nonsense_is_left_at_once(server: FakeServer) -> None:
    async def nonsense_then_hang(body: dict[str, Any]) -> AsyncIterator[Any]:
        yield text_chunk("a")
        yield b"data: {nonsense\n\n"
        await asyncio.Event().wait()

    server.reply = nonsense_then_hang
    load = run_load(server.url, [text_request()], model="m", timeout_s=600)
    (record,) = (await asyncio.wait_for(load, 20)).records
    assert record.status == "failed" and record.error.startswith("ProtocolError: a chunk is not")
    assert len(record.chunk_ns) == 1


def test_times_of_a_record() -> None:
    record = ClientRecord(request_id="r", intended_ns=1_000_000, end_ns=0)
    stream = _Stream(record)
    stream.feed(text_chunk("a") + text_chunk("b")[:9], 3_000_000)
    stream.feed(text_chunk("b")[9:], 7_000_000)
    stream.feed(text_chunk("c", "length") + usage_chunk(1, 5), 11_000_000)
    stream.feed(DONE, 90_000_000)
    stream.finish()
    assert record.ok and record.chunk_ns == [3_000_000, 7_000_000, 11_000_000]
    assert (record.ttft_ms, record.ttst_ms, record.e2e_ms) == (2.0, 6.0, 10.0)
    assert record.itls_ms == [4.0, 4.0]
    assert record.tpot_ms == 2.0  # five tokens by usage


async def test_no_done_is_fine_after_a_finish_reason(server: FakeServer) -> None:
    record = await one(server, text_chunk("a", "stop"), b'data: {"choices": []}')
    assert record.ok


# ---- failures


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ((429, b'{"error": {"message": "queue full", "code": 429}}'), "HTTP 429: queue full"),
        ((500, b"<html>oops\n</html>"), "HTTP 500: <html>oops </html>"),
        ((503, b'{"detail": "later"}'), "HTTP 503"),
        (
            (text_chunk("a"), event({"error": {"message": "worker lost", "code": 503}})),
            "worker lost",
        ),
        ((text_chunk("a"), b'event: error\ndata: {"message": "gone"}\n\n'), "gone"),
        ((text_chunk("a"), event({"object": "error", "message": "old style"})), "old style"),
        ((text_chunk("a"),), "ended before [DONE]"),
        ((text_chunk("a"), ABORT), "ClientPayloadError"),
        ((text_chunk("a"), b"data: {nonsense\n\n"), "ProtocolError"),
        ((text_chunk("a"), b'data: {"choices": 3}\n\n'), "ProtocolError"),
        ((text_chunk("a"), b'data: "\xff\xfe"\n\n'), "ProtocolError"),
        ((DONE,), "no token"),
        ((web.json_response({"choices": [{"text": "whole"}]}),), "application/json instead"),
    ],
)
async def test_failures_are_records_with_words(
    server: FakeServer, items: tuple[Any, ...], message: str
) -> None:
    record = await one(server, *items)
    assert record.status == "failed" and not record.ok
    assert message in record.error and "\n" not in record.error
    assert record.e2e_ms is None and record.tpot_ms is None
    started = items[0] == text_chunk("a")
    assert (record.first_token_ns is not None) == started
    assert record.num_output_tokens == int(started)


async def test_an_error_after_all_tokens_still_fails_the_request(server: FakeServer) -> None:
    record = await one(server, text_chunk("a", "length"), event({"error": "too bad"}), DONE)
    assert record.status == "failed" and record.error == "too bad"


async def test_one_failure_leaves_the_others_alone(server: FakeServer) -> None:
    async def odd_ones_fail(body: dict[str, Any]) -> AsyncIterator[Any]:
        if body["max_tokens"] % 2:
            yield text_chunk("a")
            yield ABORT
        else:
            async for item in full_answer(body):
                yield item

    server.reply = odd_ones_fail
    result = await run_load(server.url, [text_request(i, 2 + i) for i in range(6)], model="m")
    assert [r.status for r in result.records] == ["ok", "failed"] * 3


async def test_a_request_that_takes_too_long_fails(server: FakeServer) -> None:
    async def hang(body: dict[str, Any]) -> AsyncIterator[Any]:
        yield text_chunk("a")
        await asyncio.Event().wait()

    server.reply = hang
    result = await run_load(server.url, [text_request()], model="m", timeout_s=0.2)
    assert result.records[0].status == "failed"
    assert "not complete after 0.2 s" in result.records[0].error


async def test_a_server_that_is_not_there(unused_url: str) -> None:
    with pytest.raises(ConfigError, match="cannot reach"):
        await run_load(unused_url, [text_request()])
    result = await run_load(unused_url, [text_request()], model="m")
    assert result.records[0].status == "failed" and "Connect" in result.records[0].error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": "127.0.0.1:8000"}, "http://HOST:PORT"),
        ({"url": "http://:80"}, "http://HOST:PORT"),
        ({"url": "http://h:99999"}, "http://HOST:PORT"),
        ({"requests": []}, "no requests"),
        ({"mode": ClosedLoop(0)}, "concurrency"),
        ({"timeout_s": 0}, "timeout"),
        ({"timeout_s": float("nan")}, "timeout"),
        ({"endpoint": CHAT, "requests": fixed(1, 3, 1)}, "text"),
        ({"requests": [BenchRequest(0, 0, None, None, 1)]}, "exactly one"),
    ],
)
async def test_bad_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "url": "http://127.0.0.1:1",
        "requests": [text_request()],
        "model": "m",
    }
    arguments.update(options)
    with pytest.raises(ConfigError, match=message):
        await run_load(arguments.pop("url"), arguments.pop("requests"), **arguments)


async def test_records_survive_a_file(server: FakeServer, tmp_path: Any) -> None:
    result: LoadResult = await run_load(server.url, fixed(3, 16, 2), return_token_ids=True)
    path = tmp_path / "requests.jsonl"
    write_records(path, result.records)
    assert read_records(path) == result.records
    path.write_text('{"schema_version": 99, "request_id": "", "intended_ns": 0, "end_ns": 0}\n')
    with pytest.raises(ConfigError, match=":1: schema 99"):
        read_records(path)
    path.write_text("\n{}\n")
    with pytest.raises(ConfigError, match=":2:"):
        read_records(path)
    with pytest.raises(ConfigError, match="cannot read"):
        read_records(tmp_path / "none")
