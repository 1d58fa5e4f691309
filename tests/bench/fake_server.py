"""An OpenAI-compatible server whose answers are scripted, in the test's own event loop or a thread.

A reply is an async generator over what to put on the wire: bytes are written and flushed, an int
is an HTTP status (first item only), `ABORT` cuts the connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

ABORT = object()
DONE = b"data: [DONE]\n\n"

Reply = Callable[[dict[str, Any]], AsyncIterator[Any]]


def event(payload: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(payload, ensure_ascii=False).encode() + b"\n\n"


def text_chunk(text: str, finish: str | None = None, ids: list[int] | None = None) -> bytes:
    choice: dict[str, Any] = {"index": 0, "text": text, "finish_reason": finish}
    if ids is not None:
        choice["token_ids"] = ids
    return event({"object": "text_completion", "choices": [choice]})


def chat_chunk(delta: dict[str, Any], finish: str | None = None) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return event({"object": "chat.completion.chunk", "choices": [choice]})


def usage_chunk(prompt: int, completion: int, cached: int | None = None) -> bytes:
    usage: dict[str, Any] = {"prompt_tokens": prompt, "completion_tokens": completion}
    if cached is not None:
        usage["prompt_tokens_details"] = {"cached_tokens": cached}
    return event({"choices": [], "usage": usage})


def prompt_len(body: dict[str, Any]) -> int:
    prompt = body.get("prompt")
    if prompt is None:
        prompt = body["messages"][0]["content"]
    return len(prompt)


async def full_answer(body: dict[str, Any]) -> AsyncIterator[Any]:
    """max_tokens chunks of one token each, as vLLM streams them."""
    n = body["max_tokens"]
    chat = "messages" in body
    if chat:
        yield chat_chunk({"role": "assistant", "content": ""})
    for i in range(n):
        finish = "length" if i == n - 1 else None
        if chat:
            yield chat_chunk({"content": "é"}, finish)
        else:
            ids = [i] if body.get("return_token_ids") else None
            yield text_chunk("é", finish, ids)
        await asyncio.sleep(0)
    yield usage_chunk(prompt_len(body), n, cached=0)
    yield DONE


def scripted(*items: Any) -> Reply:
    async def reply(body: dict[str, Any]) -> AsyncIterator[Any]:
        for item in items:
            yield item

    return reply


@dataclass
class FakeServer:
    reply: Reply = full_answer
    models: list[dict[str, Any]] = field(
        default_factory=lambda: [{"id": "fake", "root": "fake-root", "max_model_len": 4096}]
    )
    detokenize: bool = True
    api_key: str | None = None
    url: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[Mapping[str, str]] = field(default_factory=list)
    num_running: int = 0
    max_running: int = 0

    async def start(self) -> web.AppRunner:
        app = web.Application(client_max_size=64 << 20)
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/v1/completions", self._generate)
        app.router.add_post("/v1/chat/completions", self._generate)
        app.router.add_post("/detokenize", self._detokenize)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = runner.addresses[0][1]
        self.url = f"http://127.0.0.1:{port}"
        return runner

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[FakeServer]:
        runner = await self.start()
        try:
            yield self
        finally:
            await runner.cleanup()

    @contextlib.contextmanager
    def in_thread(self) -> Iterator[FakeServer]:
        """For code under test that owns the event loop of its thread."""
        loop = asyncio.new_event_loop()
        thread = threading.Thread(target=loop.run_forever)
        thread.start()
        runner = asyncio.run_coroutine_threadsafe(self.start(), loop).result(10)
        try:
            yield self
        finally:
            asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(10)
            loop.call_soon_threadsafe(loop.stop)
            thread.join(10)
            loop.close()

    def _refuses(self, request: web.Request) -> bool:
        wanted = None if self.api_key is None else f"Bearer {self.api_key}"
        return wanted is not None and request.headers.get("Authorization") != wanted

    async def _models(self, request: web.Request) -> web.Response:
        if self._refuses(request):
            return web.json_response({"error": {"message": "bad key"}}, status=401)
        return web.json_response({"object": "list", "data": self.models})

    async def _detokenize(self, request: web.Request) -> web.Response:
        if not self.detokenize:
            raise web.HTTPNotFound
        tokens = (await request.json())["tokens"]
        return web.json_response({"prompt": bytes(tokens).decode("utf-8", "replace")})

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        self.headers.append(request.headers)
        if self._refuses(request):
            return web.json_response({"error": {"message": "bad key"}}, status=401)
        self.num_running += 1
        self.max_running = max(self.max_running, self.num_running)
        try:
            return await self._stream(request, body)
        finally:
            self.num_running -= 1

    async def _stream(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        response: web.StreamResponse | None = None
        status = 200
        async for item in self.reply(body):
            if isinstance(item, web.Response):
                return item
            if isinstance(item, int):
                status = item
                continue
            if response is None:
                kind = "text/event-stream" if status == 200 else "application/json"
                response = web.StreamResponse(status=status, headers={"Content-Type": kind})
                await response.prepare(request)
            if item is ABORT:
                assert request.transport is not None
                request.transport.close()
                return response
            await response.write(item)
        assert response is not None
        await response.write_eof()
        return response
