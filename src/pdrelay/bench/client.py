"""The load generator: sends on an absolute schedule, never waits for an answer to send the next.

One event loop, one aiohttp session without a connection limit. Every clock starts at the intended
send time, so that a late client shows as send lag and never hides the server's queue.
"""

from __future__ import annotations

import asyncio
import io
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import aiohttp
import msgspec

from pdrelay.bench.arrival import ArrivalClock, StampingConnector
from pdrelay.bench.backlog import Backlog
from pdrelay.bench.chunk import (
    Chunk,
    carries_tokens,
    decode_chunk,
    error_text,
    error_text_of_body,
)
from pdrelay.bench.endpoint import COMPLETIONS, BodyEncoder, join_url, make_headers
from pdrelay.bench.record import ClientRecord
from pdrelay.bench.request import BenchRequest
from pdrelay.bench.server_info import fetch_server_info
from pdrelay.bench.sse import SseParser
from pdrelay.core.clock import monotonic_ns
from pdrelay.core.heap import settled_heap
from pdrelay.core.time_slice import RELAY_SLICE_NS, request_short_slices
from pdrelay.errors import ConfigError, ProtocolError

# Servers close idle connections (uvicorn after 5 s): never reuse one that is about to go.
_KEEPALIVE_S = 2.0
# Time between building the load and its first request, so that the first is not late.
_LEAD_NS = 20_000_000
_TIMER_NS = 1_000_000  # resolution of the event loop's timers
_WARMUP_CONCURRENCY = 4
_MAX_ERROR_BYTES = 64 << 10
_MAX_AHEAD_BYTES = 256 << 20  # of bodies that are encoded before the load; further ones when due
_LARGE_BODY = 1 << 20  # aiohttp wants larger ones as a file

ProgressCallback = Callable[[int, int], None]  # (requests over, requests in all)


@dataclass(frozen=True)
class OpenLoop:
    """Send each request at its `arrival_s`, whatever the server does."""


@dataclass(frozen=True)
class ClosedLoop:
    """Keep `concurrency` requests in flight: a capacity mode, not a traffic model."""

    concurrency: int


@dataclass
class LoadResult:
    """What a load did. Records are in the order of `requests`; times are CLOCK_MONOTONIC ns."""

    records: list[ClientRecord]
    start_ns: int  # arrival_s = 0
    end_ns: int  # the last request was over
    mode: OpenLoop | ClosedLoop
    num_unsent: int = 0  # `stop` was set before their turn

    @property
    def duration_s(self) -> float:
        return (self.end_ns - self.start_ns) / 1e9


async def run_load(
    url: str,
    requests: Sequence[BenchRequest],
    *,
    model: str | None = None,
    endpoint: str = COMPLETIONS,
    mode: OpenLoop | ClosedLoop | None = None,
    headers: dict[str, str] | None = None,
    api_key: str | None = None,
    timeout_s: float = 600.0,
    ignore_eos: bool = True,
    temperature: float | None = 0.0,
    return_token_ids: bool = False,
    warmups: Sequence[BenchRequest] = (),
    request_id_prefix: str | None = None,
    progress: ProgressCallback | None = None,
    stop: asyncio.Event | None = None,
) -> LoadResult:
    """Sends `requests` to an OpenAI-compatible server and records what comes back, and when.

    The calling thread asks the kernel for short time slices (core/time_slice.py), and the collector
    rests meanwhile: on a host whose cores the server keeps busy, a late client would show as ITL.

    Args:
        url: the server's base URL, with or without /v1.
        model: None asks /v1/models.
        endpoint: the path, /v1/completions or /v1/chat/completions (text prompts only).
        mode: OpenLoop() when None.
        timeout_s: a request that takes longer, from its sending, fails.
        ignore_eos, return_token_ids: extensions of vLLM and pdrelay; turn off where refused.
        warmups: sent first, a few at a time, and not recorded.
        request_id_prefix: request i is `PREFIX-i` in X-Request-Id; unique when None.
        stop: when set, nothing more is sent and what runs is cancelled (status "cancelled").

    Returns:
        One record for each request that was sent, failed ones included.

    Raises:
        ConfigError: bad arguments, an unreachable server, or warm-ups that all failed.
    """
    mode = mode or OpenLoop()
    if not requests:
        raise ConfigError("no requests to send: give at least 1")
    if isinstance(mode, ClosedLoop) and mode.concurrency < 1:
        raise ConfigError(f"concurrency is {mode.concurrency}: give at least 1")
    if not timeout_s > 0:
        raise ConfigError(f"the timeout is {timeout_s} s: give seconds above 0")
    target = join_url(url, endpoint)
    if model is None:
        model = (await fetch_server_info(url, headers=headers, api_key=api_key)).model
    encoder = BodyEncoder(
        endpoint,
        model,
        ignore_eos=ignore_eos,
        temperature=temperature,
        return_token_ids=return_token_ids,
    )
    for request in (*requests, *warmups):
        encoder.check(request)
    connector = StampingConnector(limit=0, keepalive_timeout=_KEEPALIVE_S)
    async with aiohttp.ClientSession(
        connector=connector,
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=min(timeout_s, 60.0)),
        headers=make_headers(headers, api_key),
        auto_decompress=False,
        read_bufsize=1 << 20,
    ) as session:
        prefix = request_id_prefix or f"bench-{uuid.uuid4().hex[:12]}"
        if warmups:
            warmer = _Load(session, target, encoder, timeout_s, f"{prefix}-warmup", None, stop)
            await _warm_up(warmer, warmups)
        load = _Load(session, target, encoder, timeout_s, prefix, progress, stop)
        request_short_slices(RELAY_SLICE_NS)
        with settled_heap():
            return await load.run(requests, mode)


async def _warm_up(load: _Load, warmups: Sequence[BenchRequest]) -> None:
    result = await load.run(warmups, ClosedLoop(_WARMUP_CONCURRENCY))
    if result.num_unsent or any(r.status == "cancelled" for r in result.records):
        return  # stopped
    if not any(record.ok for record in result.records):
        raise ConfigError(
            f"every warm-up request failed ({result.records[0].error}): check the model name, the "
            "endpoint and the lengths"
        )


class _Load:
    def __init__(
        self,
        session: aiohttp.ClientSession,
        target: str,
        encoder: BodyEncoder,
        timeout_s: float,
        prefix: str,
        progress: ProgressCallback | None,
        stop: asyncio.Event | None,
    ) -> None:
        self._session = session
        self._target = target
        self._encoder = encoder
        self._timeout_s = timeout_s
        self._prefix = prefix
        self._progress = progress
        self._stop = stop
        self._num_done = 0
        self._num_total = 0
        self._backlog = Backlog()
        self._bodies: dict[int, bytes] = {}  # by position; encoded and not sent yet

    async def run(
        self, requests: Sequence[BenchRequest], mode: OpenLoop | ClosedLoop
    ) -> LoadResult:
        self._num_total = len(requests)
        await self._encode_ahead(requests)
        start_ns = monotonic_ns() + _LEAD_NS
        records: dict[int, ClientRecord] = {}
        driver = asyncio.ensure_future(
            self._open_loop(requests, start_ns, records)
            if isinstance(mode, OpenLoop)
            else self._closed_loop(requests, mode.concurrency, start_ns, records)
        )
        stopper = asyncio.ensure_future(self._stop.wait()) if self._stop is not None else None
        try:
            await asyncio.wait(
                [driver] if stopper is None else [driver, stopper],
                return_when=asyncio.FIRST_COMPLETED,
            )
            if not driver.done():
                driver.cancel()
            try:
                await driver
            except asyncio.CancelledError:
                if stopper is None or not stopper.done():
                    raise
        finally:
            for task in (driver, stopper):
                if task is not None:
                    task.cancel()
            await asyncio.gather(
                driver, *([stopper] if stopper is not None else []), return_exceptions=True
            )
        ordered = [records[i] for i in sorted(records)]
        end_ns = max((r.end_ns for r in ordered), default=start_ns)
        return LoadResult(ordered, start_ns, end_ns, mode, len(requests) - len(ordered))

    async def _encode_ahead(self, requests: Sequence[BenchRequest]) -> None:
        """Now, while nobody waits: a long prompt's takes as long as several tokens of others."""
        num_bytes = 0
        for position, request in enumerate(requests):
            if num_bytes >= _MAX_AHEAD_BYTES:
                return
            self._bodies[position] = self._encoder(request)
            num_bytes += len(self._bodies[position])
            await asyncio.sleep(0)  # another load may be under way

    def _body(self, position: int, request: BenchRequest) -> bytes:
        body = self._bodies.pop(position, None)
        return self._encoder(request) if body is None else body

    async def _open_loop(
        self, requests: Sequence[BenchRequest], start_ns: int, records: dict[int, ClientRecord]
    ) -> None:
        order = sorted(range(len(requests)), key=lambda i: requests[i].arrival_s)
        async with asyncio.TaskGroup() as group:
            for position in order:
                request = requests[position]
                body = self._body(position, request)  # while there is time
                intended_ns = start_ns + round(request.arrival_s * 1e9)
                await _sleep_until(intended_ns)
                record = self._open_record(position, request, intended_ns)
                records[position] = record
                group.create_task(self._send(record, body))

    async def _closed_loop(
        self,
        requests: Sequence[BenchRequest],
        concurrency: int,
        start_ns: int,
        records: dict[int, ClientRecord],
    ) -> None:
        await _sleep_until(start_ns)
        pending = iter(enumerate(requests))

        async def slot() -> None:
            for position, request in pending:
                body = self._body(position, request)
                record = self._open_record(position, request, monotonic_ns())
                records[position] = record
                await self._send(record, body)

        async with asyncio.TaskGroup() as group:
            for _ in range(min(concurrency, len(requests))):
                group.create_task(slot())

    def _open_record(self, position: int, request: BenchRequest, intended_ns: int) -> ClientRecord:
        return ClientRecord(
            request_id=f"{self._prefix}-{position}",
            index=request.index,
            tag=request.tag,
            intended_ns=intended_ns,
            end_ns=intended_ns,
            max_tokens=request.max_tokens,
            num_prompt_tokens=len(request.prompt_token_ids or ()),
            status="cancelled",
            error="cancelled before it was sent",
            chunk_ns=[],
        )

    async def _send(self, record: ClientRecord, body: bytes) -> None:
        """Sends one request and fills its record; only cancellation leaves here."""
        record.sent_ns = monotonic_ns()
        stream = _Stream(record)
        try:
            async with (
                asyncio.timeout(self._timeout_s),
                self._session.post(
                    self._target,
                    data=body if len(body) < _LARGE_BODY else io.BytesIO(body),
                    headers={"X-Request-Id": record.request_id},
                ) as response,
            ):
                record.http_status = response.status
                stream.abandon = response.close
                if response.status != 200:
                    text = error_text_of_body(await _read_some(response))
                    stream.fail(f"HTTP {response.status}: {text}")
                elif not response.content_type.startswith("text/event-stream"):
                    text = error_text_of_body(await _read_some(response))
                    stream.fail(f"{response.content_type} instead of an event stream: {text}")
                else:
                    read, clock = response.content.readany, ArrivalClock(response)
                    while data := await read():
                        if stream.hold(data, clock.now_ns()):
                            self._backlog.add(stream.catch_up)
                    stream.finish()
        except asyncio.CancelledError:
            stream.cancel()
            raise
        except TimeoutError:
            stream.fail(f"not complete after {self._timeout_s:g} s")
        except (aiohttp.ClientError, OSError, ProtocolError) as error:
            stream.fail(_words(error))
        self._num_done += 1
        if self._progress is not None:
            self._progress(self._num_done, self._num_total)


async def _sleep_until(when_ns: int) -> None:
    """Returns at `when_ns`, to some 10 µs.

    asyncio's epoll rounds timeouts up to a millisecond, which would show in every TTFT: sleep to
    the millisecond before, then let the loop turn without blocking.
    """
    wait_ns = when_ns - monotonic_ns() - _TIMER_NS
    if wait_ns > 0:
        await asyncio.sleep(wait_ns / 1e9)
    while monotonic_ns() < when_ns:  # noqa: ASYNC110 - at most a millisecond, and no event to wait for
        await asyncio.sleep(0)


async def _read_some(response: aiohttp.ClientResponse) -> bytes:
    body = b""
    while len(body) < _MAX_ERROR_BYTES and (data := await response.content.readany()):
        body += data
    return body


def _nothing() -> None:
    pass


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"


class _Stream:
    """Turns the bytes of one answer into its record."""

    def __init__(self, record: ClientRecord) -> None:
        self.abandon: Callable[[], None] = _nothing  # ends an answer that cannot be understood
        self._record = record
        self._parser = SseParser()
        self._over = False  # [DONE], or failed
        self._num_tokens = 0  # by token ids
        self._last_ns = 0  # last chunk with a choice
        self._completion_tokens: int | None = None
        self._held: list[tuple[bytes, int]] = []  # (bytes, when they arrived)

    def hold(self, data: bytes, now_ns: int) -> bool:
        """Take bytes, to be parsed by `catch_up`; whether these are the first that wait for it."""
        self._held.append((data, now_ns))
        return len(self._held) == 1

    def catch_up(self) -> None:
        held, self._held = self._held, []
        try:
            for data, now_ns in held:
                self.feed(data, now_ns)
        except ProtocolError as error:
            self.fail(_words(error))
            self.abandon()

    def feed(self, data: bytes, now_ns: int) -> None:
        if self._over:
            return
        for payload in self._parser.feed(data):
            self._event(payload, now_ns)

    def _event(self, payload: bytes, now_ns: int) -> None:
        if self._over:
            return
        if payload is self._parser.error:  # that event, not a chunk read along with it
            self.fail(error_text_of_body(payload))
            return
        if payload == b"[DONE]":
            self._complete()
            return
        try:
            chunk = decode_chunk(payload)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ProtocolError(f"a chunk is not what the API sends: {error}") from error
        if chunk.error is not None:
            self.fail(error_text(chunk.error))
        elif chunk.object == "error":
            self.fail(chunk.message or "the server reported an error without a message")
        else:
            self._take(chunk, now_ns)

    def _take(self, chunk: Chunk, now_ns: int) -> None:
        record = self._record
        if chunk.usage is not None:
            record.num_prompt_tokens = chunk.usage.prompt_tokens or record.num_prompt_tokens
            self._completion_tokens = chunk.usage.completion_tokens
            details = chunk.usage.prompt_tokens_details
            if details is not None and details.cached_tokens is not None:
                record.num_cached_tokens = details.cached_tokens
        if not chunk.choices:
            return
        choice = chunk.choices[0]
        if choice.finish_reason is not None:
            record.finish_reason = choice.finish_reason
        # An answer that ends at its first token may have no text at all.
        last_and_only = choice.finish_reason is not None and not record.chunk_ns
        if carries_tokens(choice) or last_and_only:
            record.chunk_ns.append(now_ns)
            self._last_ns = now_ns
            if choice.token_ids:
                self._num_tokens += len(choice.token_ids)
                if record.token_ids is None:
                    record.token_ids = []
                record.token_ids += choice.token_ids

    def finish(self) -> None:
        """The stream is at its end: complete if [DONE] or a finish reason came."""
        self.catch_up()
        for payload in self._parser.finish():
            self._event(payload, monotonic_ns())
        if self._over:
            return
        if self._record.finish_reason:
            self._complete()
        else:
            self.fail("the stream ended before [DONE]")

    def _complete(self) -> None:
        record = self._record
        if not record.chunk_ns:
            self.fail("the stream held no token")
            return
        self._count()
        record.status = "ok"
        record.error = ""
        record.end_ns = self._last_ns
        self._over = True

    def fail(self, message: str) -> None:
        self._stop("failed", message)

    def cancel(self) -> None:
        self._stop("cancelled", "cancelled by the client")

    def _stop(self, status: str, message: str) -> None:
        self.catch_up()  # what came before counts
        if self._over:
            return
        self._count()
        self._record.status = "failed" if status == "failed" else "cancelled"
        self._record.error = message or "failed without a message"
        self._record.end_ns = monotonic_ns()
        self._over = True

    def _count(self) -> None:
        record = self._record
        record.first_token_ns = record.chunk_ns[0] if record.chunk_ns else None
        if self._completion_tokens is not None:
            record.num_output_tokens = self._completion_tokens
        else:
            record.num_output_tokens = max(self._num_tokens, len(record.chunk_ns))
