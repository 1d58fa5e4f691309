"""A minimal P/D proxy as a client: what people who bring their own have to do."""

from __future__ import annotations

import asyncio
import uuid
from typing import Any

import aiohttp


class Refused(Exception):
    """The instance did not serve the request."""


async def complete(
    session: aiohttp.ClientSession,
    url: str,
    prompt: list[int],
    max_tokens: int,
    params: dict[str, Any] | None = None,
    **more: Any,
) -> dict[str, Any]:
    """POST /v1/completions. Raises Refused for an error status or finish reason."""
    body = {
        "model": "tiny",
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
        **more,
    }
    if params is not None:
        body["kv_transfer_params"] = params
    async with session.post(f"{url}/v1/completions", json=body) as response:
        answer = await response.json()
        if response.status != 200:
            raise Refused(f"{response.status}: {answer}")
    if answer["choices"][0]["finish_reason"] not in ("length", "stop"):
        raise Refused(str(answer))
    return answer


def tokens_of(answer: dict[str, Any]) -> list[int]:
    return answer["choices"][0]["token_ids"]


def to_producer(transfer_id: str) -> dict[str, Any]:
    return {"pdrelay_transfer_id": transfer_id, "do_remote_decode": True}


def to_consumer(transfer_id: str, producer: str) -> dict[str, Any]:
    return {
        "pdrelay_transfer_id": transfer_id,
        "do_remote_prefill": True,
        "pdrelay_producer": producer,
    }


async def sequential(
    session: aiohttp.ClientSession, p_url: str, d_url: str, prompt: list[int], max_tokens: int
) -> list[int]:
    """P first; its reply's kv_transfer_params and first token go to D with the prompt."""
    first = await complete(session, p_url, prompt, 1, {"do_remote_decode": True})
    tokens = tokens_of(first)
    rest = await complete(
        session, d_url, prompt + tokens, max_tokens - 1, first["kv_transfer_params"]
    )
    return tokens + tokens_of(rest)


async def concurrent(
    session: aiohttp.ClientSession,
    p_url: str,
    d_url: str,
    producer: str,
    prompt: list[int],
    max_tokens: int,
) -> list[int]:
    """Both at once under an id of our own; D computes token 1 too, P's is there first."""
    transfer_id = uuid.uuid4().hex
    first, rest = await asyncio.gather(
        complete(session, p_url, prompt, 1, to_producer(transfer_id)),
        complete(session, d_url, prompt, max_tokens, to_consumer(transfer_id, producer)),
    )
    assert tokens_of(first) == tokens_of(rest)[:1]
    return tokens_of(rest)
