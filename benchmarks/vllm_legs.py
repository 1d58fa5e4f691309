"""Requests through one vLLM or a P/D pair of them, with the time of every token.

Each `Request` plays the proxy: it talks to P and D itself, so no hop is in the figures.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp


class RequestFailed(Exception):
    """What an instance answered instead of tokens."""


@dataclass
class Stream:
    """Tokens of one leg, and when each came (perf_counter seconds)."""

    tokens: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    params: dict[str, Any] | None = None


@dataclass
class Sample:
    """`ttft`, `decode_ttft` (to the first token that D computes), `second` (from token 1 to token
    2) in seconds; `times` of the tokens in perf_counter seconds."""

    ttft: float
    decode_ttft: float
    second: float
    times: list[float]
    tokens: list[int]

    @property
    def itls(self) -> list[float]:
        """Seconds between tokens, from the second on."""
        return [b - a for a, b in itertools.pairwise(self.times[1:])]


Request = Callable[[aiohttp.ClientSession, Sequence[int], int], Awaitable[Sample]]


async def stream(
    session: aiohttp.ClientSession,
    url: str,
    prompt: Sequence[int],
    max_tokens: int,
    params: dict[str, Any] | None = None,
    *,
    streaming: bool = True,
) -> Stream:
    """POST /v1/completions. `streaming` False: all at once, which the reply's params need.

    Raises RequestFailed.
    """
    body: dict[str, Any] = {
        "model": "bench",
        "prompt": list(prompt),
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
        "stream": streaming,
    }
    if params is not None:
        body["kv_transfer_params"] = params
    seen = Stream()
    async with session.post(f"{url}/v1/completions", json=body) as response:
        if response.status != 200:
            raise RequestFailed(f"{url} answered {response.status}: {await response.text()}")
        if not streaming:
            answer = await response.json()
            seen.params = answer.get("kv_transfer_params")
            seen.tokens = answer["choices"][0]["token_ids"]
            seen.times = [time.perf_counter()] * len(seen.tokens)
        else:
            await _read_events(response, seen, url)
    if len(seen.tokens) != max_tokens:
        raise RequestFailed(f"{url} sent {len(seen.tokens)} tokens of {max_tokens}")
    return seen


async def _read_events(response: aiohttp.ClientResponse, seen: Stream, url: str) -> None:
    async for line in response.content:
        if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
            continue
        now = time.perf_counter()
        chunk = json.loads(line[6:])
        if "error" in chunk:
            raise RequestFailed(f"{url}: {chunk['error']}")
        for choice in chunk["choices"]:
            new = choice.get("token_ids") or []
            seen.tokens += new
            seen.times += [now] * len(new)


def single(url: str) -> Request:
    """One instance."""

    async def request(
        session: aiohttp.ClientSession, prompt: Sequence[int], num_tokens: int
    ) -> Sample:
        start = time.perf_counter()
        seen = await stream(session, url, prompt, num_tokens)
        return _sample(start, seen, seen)

    return request


def pdrelay_concurrent(p: str, d: str, address: str) -> Request:
    """Both legs at once; token 1 is streamed from P, and D computes it again."""

    async def request(
        session: aiohttp.ClientSession, prompt: Sequence[int], num_tokens: int
    ) -> Sample:
        transfer_id = uuid.uuid4().hex
        to_p = {"pdrelay_transfer_id": transfer_id, "do_remote_decode": True}
        to_d = {
            "pdrelay_transfer_id": transfer_id,
            "do_remote_prefill": True,
            "pdrelay_producer": address,
        }
        start = time.perf_counter()
        first, rest = await asyncio.gather(
            stream(session, p, prompt, 1, to_p),
            stream(session, d, prompt, num_tokens, to_d),
        )
        return _sample(start, first, rest)

    return request


def sequential(p: str, d: str, first_params: dict[str, Any], *, continues: bool) -> Request:
    """P's whole answer, then D. `continues`: D gets token 1 with the prompt and goes on behind it;
    otherwise it computes token 1 itself, which is the client's first (NIXL's way)."""

    async def request(
        session: aiohttp.ClientSession, prompt: Sequence[int], num_tokens: int
    ) -> Sample:
        start = time.perf_counter()
        first = await stream(session, p, prompt, 1, dict(first_params), streaming=False)
        if not continues:
            rest = await stream(session, d, prompt, num_tokens, first.params)
            return _sample(start, rest, rest)
        rest = await stream(session, d, [*prompt, *first.tokens], num_tokens - 1, first.params)
        rest.tokens = first.tokens + rest.tokens
        decode_ttft = rest.times[0] - start
        rest.times = first.times + rest.times
        made = _sample(start, first, rest)
        made.decode_ttft = decode_ttft
        return made

    return request


def _sample(start: float, first: Stream, rest: Stream) -> Sample:
    times = rest.times
    return Sample(
        ttft=first.times[0] - start,
        decode_ttft=times[0] - start,
        second=times[1] - first.times[0],
        times=times,
        tokens=rest.tokens,
    )
