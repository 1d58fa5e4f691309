"""What a server says about itself, before a load."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import aiohttp
import msgspec

from pdrelay.bench.chunk import error_text_of_body
from pdrelay.bench.endpoint import join_url, make_headers
from pdrelay.bench.request import BenchRequest
from pdrelay.errors import ConfigError

_MAX_BYTES = 64 << 20
_DETOKENIZE_CONCURRENCY = 16


class ServerInfo(msgspec.Struct, frozen=True):
    """The first model of /v1/models. `max_model_len`, `vocab_size` are None when not given."""

    model: str
    root: str
    max_model_len: int | None = None
    vocab_size: int | None = None


class _Model(msgspec.Struct):
    id: str
    root: str | None = None
    max_model_len: int | None = None
    vocab_size: int | None = None


class _Models(msgspec.Struct):
    data: list[_Model]


class _Detokenized(msgspec.Struct):
    prompt: str


async def fetch_server_info(
    url: str,
    *,
    headers: dict[str, str] | None = None,
    api_key: str | None = None,
    timeout_s: float = 30.0,
) -> ServerInfo:
    """Asks /v1/models.

    Raises:
        ConfigError: the server cannot be reached, refuses, or has no model.
    """
    target = join_url(url, "/v1/models")
    async with aiohttp.ClientSession(headers=make_headers(headers, api_key)) as session:
        status, body = await _fetch(session, "GET", target, None, timeout_s)
    if status in (401, 403):
        raise ConfigError(f"{target} answered {status}: give the right --api-key")
    if status != 200:
        raise ConfigError(
            f"{target} answered {status} ({error_text_of_body(body)}): check --url, or name the "
            "model with --model"
        )
    try:
        models = msgspec.json.decode(body, type=_Models).data
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{target} gave no model list ({error}): is this an OpenAI-compatible server?"
        ) from error
    if not models:
        raise ConfigError(f"{target} lists no model: load one, or name it with --model")
    first = models[0]
    return ServerInfo(first.id, first.root or first.id, first.max_model_len, first.vocab_size)


async def as_text(
    requests: Sequence[BenchRequest],
    url: str,
    model: str,
    *,
    headers: dict[str, str] | None = None,
    api_key: str | None = None,
    timeout_s: float = 30.0,
) -> list[BenchRequest]:
    """The same requests with text for token ids, by the server's /detokenize (vLLM's form).

    Characters that the ids do not spell are replaced by "x", one each. The text may encode to
    other tokens than it came from: records carry the length that the server counts.

    Raises:
        ConfigError: the server has no such endpoint, or cannot be reached.
    """
    target = join_url(url, "/detokenize")
    limit = asyncio.Semaphore(_DETOKENIZE_CONCURRENCY)

    async def convert(session: aiohttp.ClientSession, request: BenchRequest) -> BenchRequest:
        if request.prompt_token_ids is None:
            return request
        payload = {"model": model, "tokens": request.prompt_token_ids}
        async with limit:
            status, body = await _fetch(session, "POST", target, payload, timeout_s)
        try:
            if status != 200:
                raise ValueError(f"HTTP {status}: {error_text_of_body(body)}")
            text = msgspec.json.decode(body, type=_Detokenized).prompt
        except ValueError as error:  # msgspec's errors and UnicodeDecodeError are ValueErrors
            raise ConfigError(
                f"{target} gave no text for token ids ({error}): use --endpoint completions, or a "
                "--workload with text prompts"
            ) from error
        text = text.replace("\ufffd", "x").replace("\0", "x")
        return replace(request, prompt_token_ids=None, prompt=text or "x")

    async with aiohttp.ClientSession(headers=make_headers(headers, api_key)) as session:
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(convert(session, r)) for r in requests]
        except* ConfigError as errors:
            raise errors.exceptions[0] from None
    return [task.result() for task in tasks]


async def _fetch(
    session: aiohttp.ClientSession, method: str, target: str, payload: Any, timeout_s: float
) -> tuple[int, bytes]:
    data = None if payload is None else msgspec.json.encode(payload)
    try:
        async with (
            asyncio.timeout(timeout_s),
            session.request(method, target, data=data) as response,
        ):
            body = await response.content.read(_MAX_BYTES)
            while not response.content.at_eof() and len(body) < _MAX_BYTES:
                body += await response.content.read(_MAX_BYTES)
            return response.status, body
    except TimeoutError as error:
        raise ConfigError(
            f"{target} did not answer within {timeout_s:g} s: is the server ready?"
        ) from error
    except (aiohttp.ClientError, OSError, ValueError) as error:
        raise ConfigError(
            f"cannot reach {target} ({' '.join(str(error).split())[:200]}): start the server or "
            "check --url"
        ) from error
