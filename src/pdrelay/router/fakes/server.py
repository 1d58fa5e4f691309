"""What the fake engine servers share: a loopback port, made-up tokens, faults switched on by hand.

Token i of a request depends on the prompt and i alone, so that whatever path a request takes its
tokens are known (`expected_tokens`).
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import zlib
from array import array
from collections.abc import Callable, Sequence
from typing import Any

from aiohttp import web


def token_at(prompt: Sequence[int], position: int) -> int:
    """Output token at absolute `position` (prompt length + i): a lower-case letter."""
    digest = zlib.crc32(array("I", prompt).tobytes())
    return 97 + (digest + position * 7) % 26


def expected_tokens(prompt: Sequence[int], num: int) -> list[int]:
    """What any path over fake instances gives."""
    return [token_at(prompt, len(prompt) + i) for i in range(num)]


class FakeServer:
    """One instance. `requests` are the bodies it got; `aborted` the prompts of clients that left.

    With `spell` each output token is the next of the text's bytes instead, then `eos`.
    """

    def __init__(
        self, *, model: str, max_model_len: int, version: str, api_key: str, step_s: float
    ) -> None:
        self.model = model
        self.max_model_len = max_model_len
        self.version = version
        self.api_key = api_key
        self.step_s = step_s
        self.requests: list[dict[str, Any]] = []
        self.aborted: list[list[int]] = []
        self.running = 0
        self.spell: tuple[int, bytes] | None = None  # (prompt tokens, what to say behind them)
        self.eos = 257
        self.disagree = False  # every output token is another one than it should be
        self.refuse: tuple[int, str] | None = None  # (status, message) for every request
        self.fail_at: int | None = None  # output position at which a stream breaks off
        self.error_at: int | None = None  # output position at which an error event comes
        self.without_ids = False
        self.alone = False  # in a process of its own: believes what it is told of hand-overs
        self.healthy = True
        self._go = asyncio.Event()
        self._go.set()
        self._runner: web.AppRunner | None = None
        self.url = ""

    def routes(self) -> list[web.RouteDef]:
        """Of this engine, beside /health and /v1/models."""
        raise NotImplementedError

    async def start(self, port: int = 0) -> None:
        app = web.Application(client_max_size=1 << 25)
        app.add_routes([web.get("/health", self._health), web.get("/v1/models", self._models)])
        app.add_routes(self.routes())
        self._runner = web.AppRunner(
            app, access_log=None, handler_cancellation=True, shutdown_timeout=0.1
        )
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", port, reuse_address=True)
        await site.start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    async def stop(self) -> None:
        """Cut every connection, as death does."""
        if self._runner is None:
            return
        runner, self._runner = self._runner, None
        server = runner.server
        assert server is not None
        for handler in list(server.connections):
            if handler.transport is not None:
                handler.transport.abort()
        await runner.cleanup()

    def stall(self) -> None:
        self._go.clear()

    def resume(self) -> None:
        self._go.set()

    async def step(self) -> None:
        """Before each token."""
        await self._go.wait()
        if self.step_s:
            await asyncio.sleep(self.step_s)

    def token(self, prompt: Sequence[int], i: int) -> int:
        if self.spell is not None:
            start, text = self.spell
            position = len(prompt) + i - start
            return text[position] if position < len(text) else self.eos
        token = token_at(*_origin(prompt, i))
        return token if not self.disagree else 97 + (token - 97 + 1) % 26

    def authorize(self, request: web.Request) -> None:
        if self.api_key and request.headers.get("Authorization") != f"Bearer {self.api_key}":
            raise web.HTTPUnauthorized

    async def _health(self, request: web.Request) -> web.Response:
        return web.Response(status=200 if self.healthy else 503)

    async def _models(self, request: web.Request) -> web.Response:
        self.authorize(request)
        card = {"id": self.model, "root": self.model, "max_model_len": self.max_model_len}
        return web.json_response({"object": "list", "data": [card]})


def _origin(prompt: Sequence[int], i: int) -> tuple[list[int], int]:
    """A prompt that ends in its own first output token is one that is continued."""
    tokens = list(prompt)
    if len(tokens) > 1 and tokens[-1] == token_at(tokens[:-1], len(tokens) - 1):
        return tokens[:-1], len(tokens) + i
    return tokens, len(tokens) + i


# ---- as a process


async def _serve(fake: FakeServer, port: int) -> None:
    over = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, over.set)
    await fake.start(port)
    print(f"{type(fake).__name__} listens on {fake.url}", flush=True)
    await over.wait()
    await fake.stop()


def run_fake(
    kind: Callable[..., FakeServer], argv: Sequence[str] | None = None, api_key: str = ""
) -> int:
    """Serve until SIGTERM. Arguments that a fake has no use for are ignored."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--served-model-name", default="tiny")
    parser.add_argument("--max-model-len", "--context-length", type=int, default=512)
    parser.add_argument("--step-ms", type=float, default=0.0)
    args, _ = parser.parse_known_args(argv)

    async def run() -> None:
        fake = kind(
            model=args.served_model_name,
            max_model_len=args.max_model_len,
            api_key=api_key,
            step_s=args.step_ms / 1e3,
        )
        fake.alone = True
        await _serve(fake, args.port)

    asyncio.run(run())
    return 0
