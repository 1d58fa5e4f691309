"""A vLLM server without a model: its HTTP surface, its P/D handshakes, made-up tokens.

Token i of a request depends on the prompt and i alone, so that whatever path a request takes its
tokens are known (`expected_tokens`). Faults are switched on by hand: `stall`, `refuse`, `fail_at`,
`disagree`. It runs in the process of a test, or as one:

    python -m pdrelay.router.fake_vllm --port 8100 [any other argument of vLLM's server]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import signal
import sys
import zlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

_STEP_S = 0.0


def token_at(prompt: Sequence[int], position: int) -> int:
    """Output token at absolute `position` (prompt length + i): a lower-case letter."""
    digest = zlib.crc32(array("I", prompt).tobytes())
    return 97 + (digest + position * 7) % 26


@dataclass
class FakeWorld:
    """What the fakes of one test share: KV that producers hold, by transfer id or remote handle."""

    held: dict[str, FakeVllm] = field(default_factory=dict)
    prompts: dict[str, list[int]] = field(default_factory=dict)  # of each hold: what its KV is of
    arrivals: dict[str, asyncio.Event] = field(default_factory=dict)
    handles: Iterator[int] = field(default_factory=itertools.count)

    def hold(self, key: str, producer: FakeVllm, prompt: list[int]) -> None:
        self.held[key] = producer
        self.prompts[key] = prompt
        self.arrival(key).set()

    def arrival(self, key: str) -> asyncio.Event:
        return self.arrivals.setdefault(key, asyncio.Event())

    def take(self, key: str) -> list[int]:
        """The consumer has read it: the producer frees its blocks."""
        self.held.pop(key)
        return self.prompts.pop(key)


class FakeVllm:
    """One instance. `requests` are the bodies it got; `aborted` the prompts of clients that left.

    With `spell` each output token is the next of the text's bytes instead, then `eos`.
    """

    def __init__(
        self,
        *,
        model: str = "tiny",
        max_model_len: int = 512,
        version: str = "0.32.0",
        connector: str = "",  # "nixl" or "pdrelay"
        api_key: str = "",
        world: FakeWorld | None = None,
        step_s: float = _STEP_S,
    ) -> None:
        self.model = model
        self.max_model_len = max_model_len
        self.version = version
        self.connector = connector
        self.api_key = api_key
        self.world = world or FakeWorld()
        self.step_s = step_s
        self.requests: list[dict[str, Any]] = []
        self.aborted: list[list[int]] = []
        self.spell: tuple[int, bytes] | None = None  # (prompt tokens, what to say behind them)
        self.eos = 257
        self.disagree = False  # every output token is another one than it should be
        self.refuse: tuple[int, str] | None = None  # (status, message) for every request
        self.fail_at: int | None = None  # output position at which a stream breaks off
        self.error_at: int | None = None  # output position at which an SSE error comes
        self.without_ids = False
        self.healthy = True
        self.running = 0
        self._go = asyncio.Event()
        self._go.set()
        self._runner: web.AppRunner | None = None
        self.url = ""

    # ---- life

    async def start(self, port: int = 0) -> None:
        app = web.Application(client_max_size=1 << 25)
        app.add_routes(
            [
                web.get("/health", self._health),
                web.get("/v1/models", self._models),
                web.get("/version", self._version),
                web.post("/v1/completions", self._completions),
            ]
        )
        self._runner = web.AppRunner(
            app, access_log=None, handler_cancellation=True, shutdown_timeout=0.1
        )
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", port, reuse_address=True)
        await site.start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    async def stop(self) -> None:
        """Cut every connection, as death does."""
        if self._runner is not None:
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

    # ---- HTTP

    async def _health(self, request: web.Request) -> web.Response:
        return web.Response(status=200 if self.healthy else 503)

    async def _models(self, request: web.Request) -> web.Response:
        self._authorize(request)
        card = {"id": self.model, "root": self.model, "max_model_len": self.max_model_len}
        return web.json_response({"object": "list", "data": [card]})

    async def _version(self, request: web.Request) -> web.Response:
        return web.json_response({"version": self.version})

    def _authorize(self, request: web.Request) -> None:
        if self.api_key and request.headers.get("Authorization") != f"Bearer {self.api_key}":
            raise web.HTTPUnauthorized

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        self._authorize(request)
        body = await request.json()
        self.requests.append(body)
        if self.refuse is not None:
            status, message = self.refuse
            return web.json_response({"error": {"message": message, "code": status}}, status=status)
        self.running += 1
        try:
            prompt = await self._load(body)
            if body["stream"]:
                return await self._stream(request, body, prompt)
            return await self._whole(body, prompt)
        except (asyncio.CancelledError, ConnectionError):
            self.aborted.append(body["prompt"])
            raise
        finally:
            self.running -= 1

    async def _load(self, body: dict[str, Any]) -> list[int]:
        """The prompt whose KV this instance works on; raises when a hand-over does not fit."""
        prompt: list[int] = body["prompt"]
        params = body.get("kv_transfer_params")
        if params is None or not params.get("do_remote_prefill"):
            return prompt
        if self.connector == "pdrelay":
            key = params["pdrelay_transfer_id"]
            assert params["pdrelay_producer"]
            await self.world.arrival(key).wait()
        else:
            key = params["remote_engine_id"]
        of = self.world.take(key)
        assert prompt[: len(of)] == of and len(prompt) - len(of) in (0, 1)
        return prompt

    def _hold(self, body: dict[str, Any]) -> dict[str, Any] | None:
        params = body.get("kv_transfer_params")
        if params is None or not params.get("do_remote_decode"):
            return None
        if self.connector == "pdrelay":
            self.world.hold(params["pdrelay_transfer_id"], self, body["prompt"])
            return {"pdrelay_producer": "fake"}
        handle = f"engine-{next(self.world.handles)}"
        self.world.hold(handle, self, body["prompt"])
        return {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "remote_engine_id": handle,
            "remote_block_ids": [1, 2],
            "remote_host": "127.0.0.1",
            "remote_port": 5600,
        }

    async def _whole(self, body: dict[str, Any], prompt: list[int]) -> web.Response:
        tokens, choice = [], {}
        for i in range(body["max_tokens"]):
            await self._step()
            tokens.append(self._token(prompt, i))
            choice = self._choice(body, prompt, tokens, i)
            if choice["finish_reason"]:
                break
        if body.get("prompt_logprobs") is not None:
            rest = [self._prompt_logprob(token) for token in prompt[1:]]
            choice["prompt_logprobs"] = [None, *rest]
        if body.get("logprobs") is not None:
            choice["logprobs"] = self._logprobs(body["logprobs"], tokens)
        answer: dict[str, Any] = {
            "choices": [choice],
            "usage": {
                "prompt_tokens": len(prompt),
                "completion_tokens": len(tokens),
                "prompt_tokens_details": {"cached_tokens": 3},
            },
        }
        if choice["finish_reason"] == "length":
            answer["kv_transfer_params"] = self._hold(body)
        return web.json_response(answer)

    async def _stream(
        self, request: web.Request, body: dict[str, Any], prompt: list[int]
    ) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        tokens: list[int] = []
        for i in range(body["max_tokens"]):
            await self._step()
            if self.fail_at == i:
                assert request.transport is not None
                request.transport.abort()
                raise ConnectionResetError("told to break off")
            if self.error_at == i:
                error = {"error": {"message": "EngineCore encountered an issue", "code": 500}}
                await response.write(_event(error))
                return response
            tokens.append(self._token(prompt, i))
            choice = self._choice(body, prompt, [tokens[-1]], i)
            if i == 0:
                choice["prompt_token_ids"] = prompt
            if body.get("logprobs") is not None:
                choice["logprobs"] = self._logprobs(body["logprobs"], [tokens[-1]])
            await response.write(_event({"choices": [choice]}))
            if choice["finish_reason"]:
                break
        if body.get("stream_options", {}).get("include_usage"):
            details = {"cached_tokens": 3}
            usage = {"prompt_tokens": len(prompt), "prompt_tokens_details": details}
            await response.write(_event({"choices": [], "usage": usage}))
        await response.write(b"data: [DONE]\n\n")
        return response

    async def _step(self) -> None:
        await self._go.wait()
        if self.step_s:
            await asyncio.sleep(self.step_s)

    def _token(self, prompt: Sequence[int], i: int) -> int:
        if self.spell is not None:
            start, text = self.spell
            position = len(prompt) + i - start
            return text[position] if position < len(text) else self.eos
        token = token_at(*self._origin(prompt, i))
        return token if not self.disagree else 97 + (token - 97 + 1) % 26

    def _origin(self, prompt: Sequence[int], i: int) -> tuple[list[int], int]:
        """A prompt that ends in its own first output token is one that is continued."""
        tokens = list(prompt)
        if len(tokens) > 1 and tokens[-1] == token_at(tokens[:-1], len(tokens) - 1):
            return tokens[:-1], len(tokens) + i
        return tokens, len(tokens) + i

    def _choice(
        self, body: dict[str, Any], prompt: list[int], new: list[int], i: int
    ) -> dict[str, Any]:
        stops = i + 1 > body.get("min_tokens", 0) and new[-1] in body.get("stop_token_ids", ())
        ended = "stop" if stops else "length" if i + 1 == body["max_tokens"] else None
        choice: dict[str, Any] = {
            "index": 0,
            "text": "".join(map(chr, new)),
            "finish_reason": ended,
            "stop_reason": new[-1] if stops else None,
        }
        if not self.without_ids:
            choice["token_ids"] = list(new)
        return choice

    def _logprobs(self, num_top: int, tokens: Sequence[int]) -> dict[str, Any]:
        top = [{f"token_id:{t + i}": -0.5 - i for i in range(max(num_top, 1))} for t in tokens]
        return {
            "tokens": [f"token_id:{token}" for token in tokens],
            "token_logprobs": [-0.5] * len(tokens),
            "top_logprobs": top,
            "text_offset": list(range(len(tokens))),
        }

    def _prompt_logprob(self, token: int) -> dict[str, Any]:
        own = {"logprob": -1.5, "rank": 2, "decoded_token": chr(token)}
        best = {"logprob": -0.5, "rank": 1, "decoded_token": "!"}
        return {str(token): own, str(token + 1): best}


def expected_tokens(prompt: Sequence[int], num: int) -> list[int]:
    """What any path over `FakeVllm` instances gives."""
    return [token_at(prompt, len(prompt) + i) for i in range(num)]


def _event(body: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(body).encode() + b"\n\n"


# ---- as a process


async def _serve(args: argparse.Namespace, api_key: str) -> None:
    fake = FakeVllm(
        model=args.served_model_name,
        max_model_len=args.max_model_len,
        api_key=api_key,
        step_s=args.step_ms / 1e3,
    )
    over = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, over.set)
    await fake.start(args.port)
    print(f"fake vLLM listens on {fake.url}", flush=True)
    await over.wait()
    await fake.stop()


def main(argv: Sequence[str] | None = None, api_key: str = "") -> int:
    """Arguments that a fake has no use for are ignored, as long as they are there."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--served-model-name", default="tiny")
    parser.add_argument("--max-model-len", type=int, default=512)
    parser.add_argument("--step-ms", type=float, default=0.0)
    args, _ = parser.parse_known_args(argv)
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_serve(args, api_key))
    return 0


if __name__ == "__main__":
    sys.exit(main())
